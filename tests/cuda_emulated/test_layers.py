"""Each variant of LoRA, dense and 4-bit, by the CUDA kernels against its formula, and what it keeps
for its backward."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels import selection
from tests.layers import test_group
from tests.layers.variants import check, check_memory, every_variant

bf16 = torch.bfloat16
EVEN, ODD = 64, 67  # of K: for the matrix units, and for the ordinary multipliers


@pytest.mark.parametrize(
    ("name", "inner"),
    [("DoRALinear", EVEN), ("QHierarchicalLoRALinear", ODD), ("LoRAConv1D", EVEN)],
)
def test_some(name: str, inner: int) -> None:
    check(name, bf16, inner)


@pytest.mark.parametrize("strategy", [None, *selection.STRATEGIES["cuda"]])
@pytest.mark.parametrize("name", ["LoRALinear", "QDoRALinear", "AdaLoRALinear"])
def test_nothing_is_alive_beside_the_formula(name: str, strategy: str | None) -> None:
    with lora_kernels.backend("cuda", strategy):
        # Rows that all strategies take, and a K.
        check_memory(name, bf16, sizes=(9, EVEN))


@pytest.mark.proof
@every_variant
@pytest.mark.parametrize(
    ("dtype", "inner"), [(torch.float32, ODD), (bf16, ODD), (bf16, EVEN)], ids=str
)
def test_y_and_every_gradient(name: str, dtype: torch.dtype, inner: int) -> None:
    check(name, dtype, inner)


@pytest.mark.parametrize("cls", test_group.CLASSES)
def test_projections_of_one_x(cls: Any) -> None:
    test_group.check(("q", "v"), bf16, cls)


@pytest.mark.proof
@every_variant
def test_nothing_is_alive_of_any_variant(name: str) -> None:
    check_memory(name, torch.float32)
