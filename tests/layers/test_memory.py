"""Bytes alive between forward and backward: each variant, each engine; see `check_memory`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_kernels.oracle import case as cases
from tests.ops.engines import every_engine
from tests.support.models import K, M, check_memory, every_variant, hidden, make


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with cases.engine(request.param):
        yield request.param


@every_variant
@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_alive_beside_the_formula(dtype: torch.dtype, engine: str, name: str) -> None:
    check_memory(name, dtype)


@pytest.mark.parametrize("name", ["LoRALinear", "QDoRALinear", "MemoryEfficientLoRALinear"])
def test_memory_without_dropout_holds_no_mask(name: str) -> None:
    check_memory(name, torch.bfloat16, dropout=0.0)


def test_a_tensor_on_a_context_is_seen() -> None:
    """Both counts see it; `hidden` looks into what attributes hold."""
    layer, x = make("LoRALinear"), torch.randn(M, K, requires_grad=True)
    y = layer(x)
    assert not hidden(y)
    y.grad_fn.kept = {"deep": (1, [y.detach()])}  # type: ignore[union-attr]
    assert hidden(y) == [f"{type(y.grad_fn).__name__}.kept"]
