"""Each variant of LoRA, dense and 4-bit, by the Triton kernels against its formula."""

from typing import Any

import pytest
import torch

import lora_kernels
from tests.layers import test_group
from tests.layers.variants import check, every_variant


@pytest.mark.parametrize("name", ["QDoRALinear", "AdaLoRALinear"])
def test_some(name: str) -> None:
    with lora_kernels.backend("triton"):
        check(name, torch.bfloat16)


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
