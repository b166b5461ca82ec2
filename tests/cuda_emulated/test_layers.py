"""Each variant of LoRA, dense and 4-bit, by the CUDA kernels against its formula, and what it keeps
for its backward."""

import pytest
import torch

import lora_kernels
from lora_kernels import select
from tests.layers.variants import check, check_memory, every_variant


@pytest.mark.parametrize("name", ["DoRALinear", "QAdaLoRALinear", "HierarchicalLoRALinear"])
def test_some(name: str) -> None:
    check(name, torch.bfloat16)


@pytest.mark.parametrize("strategy", [None, *select.STRATEGIES["cuda"]])
@pytest.mark.parametrize("name", ["LoRALinear", "QDoRALinear", "AdaLoRALinear"])
def test_nothing_is_alive_beside_the_formula(name: str, strategy: str | None) -> None:
    with lora_kernels.backend("cuda", strategy):
        check_memory(name, torch.bfloat16)


@pytest.mark.proof
@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_y_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.proof
@every_variant
def test_nothing_is_alive_of_any_variant(name: str) -> None:
    check_memory(name, torch.float32)
