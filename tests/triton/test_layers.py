"""Each variant of LoRA, dense and 4-bit, by the Triton kernels against its formula, and what it
keeps for its backward."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import selection
from tests.layers import test_group
from tests.layers.variants import check, check_memory, every_variant


@pytest.mark.parametrize("name", ["QDoRALinear", "AdaLoRALinear"])
def test_some(name: str) -> None:
    with lora_kernels.backend("triton"):
        check(name, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted on a CPU")
@pytest.mark.parametrize("strategy", selection.STRATEGIES["triton"])
@pytest.mark.parametrize("name", ["LoRALinear", "QDoRALinear", "AdaLoRALinear"])
def test_nothing_is_alive_beside_the_formula(name: str, strategy: str) -> None:
    with lora_kernels.backend("triton", strategy):
        check_memory(name, torch.bfloat16, cycles=True)


@pytest.mark.proof
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_y_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    with lora_kernels.backend("triton"):
        check(name, dtype)


@pytest.mark.proof
@pytest.mark.parametrize("cls", test_group.CLASSES)
def test_projections_of_one_x(cls: Any) -> None:
    with lora_kernels.backend("triton"):
        test_group.check(("q", "v"), torch.bfloat16, cls)


@pytest.mark.proof
@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted on a CPU")
@every_variant
@pytest.mark.parametrize("strategy", selection.STRATEGIES["triton"])
def test_nothing_is_alive_of_any_variant(name: str, strategy: str) -> None:
    with lora_kernels.backend("triton", strategy):
        check_memory(name, torch.float32, cycles=True)
