"""Frozen lora_A or lora_B (LoRA-FA, MiCA): what is saved, and the gradients that are left."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lora_kernels import backend, lora_linear
from tests.autograd import frozen
from tests.autograd.cases import BACKENDS, OPTIONS, K, M, N, make_case, require_grad

OF_LINEAR = [
    kinds
    for n in (0, 1, 2, 3)
    for kinds in itertools.combinations((*frozen.FACTORS, "rank_gate"), n)
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kinds", OF_LINEAR, ids="-".join)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("x_shape", [(M, K), (2, 3, K)], ids=str)
def test_frozen_factors_of_lora_linear(
    x_shape: Any, option: str, kinds: tuple[str, ...], name: str, recompute: bool
) -> None:
    with backend(name):
        frozen.check_linear(option, kinds, x_shape, recompute)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("index", "kinds", "p"), frozen.every_multi, ids=str)
def test_frozen_factors_of_multi_lora_linear(index: Any, kinds: Any, p: float, name: str) -> None:
    with backend(name):
        frozen.check_multi(index, kinds, p)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kinds", "p"), frozen.every_experts, ids=str)
def test_frozen_factors_of_lora_experts_linear(kinds: Any, p: float, name: str) -> None:
    with backend(name):
        frozen.check_experts(kinds, p)


def test_compiled_with_a_frozen_lora_A() -> None:
    """Dynamic shapes too: the stand-in for x takes them from dy."""
    case = make_case("plain", torch.float32)
    leaves = require_grad(case, ("x", "lora_B"))
    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (M, 2 * M):
        case["x"] = leaves["x"] = torch.randn(rows, K, requires_grad=True)
        dy = torch.randn(rows, N)
        got, want = (
            torch.autograd.grad(function(**case), leaves.values(), dy)
            for function in (compiled, lora_linear)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
