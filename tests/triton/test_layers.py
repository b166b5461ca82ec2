"""Each variant of LoRA by the Triton kernels, and what it keeps for its backward."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.choice import choose as selection
from tests.layers import test_group
from tests.support.models import NAMES, check, check_memory

# No Triton kernel computes DoRA's norm.
every_variant = pytest.mark.parametrize("name", [name for name in NAMES if "DoRA" not in name])


def test_layer_of_one_variant_is_its_formula() -> None:
    with lora_kernels.backend("triton"):
        check("QLoRALinear", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted on a CPU")
@pytest.mark.parametrize("strategy", selection.STRATEGIES["triton"])
@pytest.mark.parametrize("name", ["LoRALinear", "QLoRALinear", "AdaLoRALinear"])
def test_layer_with_each_strategy_keeps_no_more_than_its_formula(name: str, strategy: str) -> None:
    with lora_kernels.backend("triton", strategy):
        check_memory(name, torch.bfloat16, dropout=0.0, cycles=True)


@pytest.mark.proof
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_of_every_variant_is_its_formula(name: str, dtype: torch.dtype) -> None:
    with lora_kernels.backend("triton"):
        check(name, dtype)


@pytest.mark.proof
@pytest.mark.parametrize("cls", test_group.CLASSES)
def test_group_of_projections_is_its_formula(cls: Any) -> None:
    with lora_kernels.backend("triton"):
        test_group.check(("q", "v"), torch.bfloat16, cls)


@pytest.mark.proof
@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes are counted on a CPU")
@every_variant
@pytest.mark.parametrize("strategy", selection.STRATEGIES["triton"])
def test_layer_of_every_variant_keeps_no_more_than_its_formula(name: str, strategy: str) -> None:
    with lora_kernels.backend("triton", strategy):
        check_memory(name, torch.float32, dropout=0.0, cycles=True)
