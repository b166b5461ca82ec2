"""Each variant of LoRA by the CUDA kernels, and what it keeps for its backward."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Choice, Strategy
from tests.layers import test_group
from tests.support.models import M, check, check_memory, every_variant

bf16 = torch.bfloat16
INNER = 64  # of K, which the kernels take


@pytest.fixture(autouse=True)
def eager_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's norm runs by the eager backend, as beside kernels that qualified."""
    eager = Choice("eager", Strategy.PANELS, "")
    monkeypatch.setattr(selection, "choose_norm", lambda problem: eager)


@pytest.mark.parametrize("name", ["DoRALinear", "QHierarchicalLoRALinear", "LoRAConv1D"])
def test_layer_of_some_variants_is_its_formula(name: str) -> None:
    check(name, bf16, INNER)


@pytest.mark.parametrize("strategy", [None, *selection.STRATEGIES["cuda"]])
@pytest.mark.parametrize(
    "name", ["LoRALinear", "QDoRALinear", "AdaLoRALinear", "MemoryEfficientLoRALinear"]
)
def test_layer_with_each_strategy_keeps_no_more_than_its_formula(
    name: str, strategy: str | None
) -> None:
    with lora_kernels.backend("cuda", strategy):
        # Rows that all strategies take.
        check_memory(name, bf16, dropout=0.0, sizes=(9, INNER))


@pytest.mark.proof
@every_variant
def test_layer_of_every_variant_is_its_formula(name: str) -> None:
    check(name, bf16, INNER)


@pytest.mark.parametrize("cls", test_group.CLASSES)
def test_group_of_projections_is_its_formula(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_group, "K", INNER)
    monkeypatch.setattr(test_group, "MEMBERS", {"q": 33, "k": 9, "v": 14})  # 56 columns in one
    test_group.check(("q", "v"), bf16, cls)


@pytest.mark.proof
@every_variant
def test_layer_of_every_variant_keeps_no_more_than_its_formula(name: str) -> None:
    check_memory(name, bf16, dropout=0.0, sizes=(M, INNER))
