"""Each variant of LoRA by the CUDA kernels, and what it keeps for its backward."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.choice import choose as selection
from tests.layers import test_group
from tests.support.models import check, check_memory, every_variant

bf16 = torch.bfloat16
EVEN, ODD = 64, 67  # of K: for tensor cores, and for CUDA cores


@pytest.mark.parametrize(
    ("name", "inner"),
    [("DoRALinear", EVEN), ("QHierarchicalLoRALinear", ODD), ("LoRAConv1D", EVEN)],
)
def test_layer_of_some_variants_is_its_formula(name: str, inner: int) -> None:
    check(name, bf16, inner)


@pytest.mark.parametrize("strategy", [None, *selection.STRATEGIES["cuda"]])
@pytest.mark.parametrize("name", ["LoRALinear", "QDoRALinear", "AdaLoRALinear"])
def test_layer_with_each_strategy_keeps_no_more_than_its_formula(
    name: str, strategy: str | None
) -> None:
    with lora_kernels.backend("cuda", strategy):
        # Rows that all strategies take, and a K.
        check_memory(name, bf16, sizes=(9, EVEN))


@pytest.mark.proof
@every_variant
@pytest.mark.parametrize(
    ("dtype", "inner"), [(torch.float32, ODD), (bf16, ODD), (bf16, EVEN)], ids=str
)
def test_layer_of_every_variant_is_its_formula(name: str, dtype: torch.dtype, inner: int) -> None:
    check(name, dtype, inner)


@pytest.mark.parametrize("cls", test_group.CLASSES)
def test_group_of_projections_is_its_formula(cls: Any) -> None:
    test_group.check(("q", "v"), bf16, cls)


@pytest.mark.proof
@every_variant
def test_layer_of_every_variant_keeps_no_more_than_its_formula(name: str) -> None:
    check_memory(name, torch.float32)
