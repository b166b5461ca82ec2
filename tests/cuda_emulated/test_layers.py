"""Each variant of LoRA, dense and 4-bit, by the CUDA kernels against its formula."""

from typing import Any

import pytest
import torch

from tests.layers import test_group
from tests.layers.variants import check, every_variant

bf16 = torch.bfloat16
EVEN, ODD = 64, 67  # of K: for the matrix units, and for the ordinary multipliers


@pytest.mark.parametrize(
    ("name", "inner"),
    [("DoRALinear", EVEN), ("QHierarchicalLoRALinear", ODD), ("LoRAConv1D", EVEN)],
)
def test_some(name: str, inner: int) -> None:
    check(name, bf16, inner)


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
