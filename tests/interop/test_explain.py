"""`explain`'s table, its reasons, and `assert_fused`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lora_kernels
from lora_kernels import select
from lora_kernels.backends import native
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.layers import LoRALinear
from lora_kernels.peft import Explanation, Row, explain, fuse

from .tiny import SIZES, batch, mlp

needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")


def test_table() -> None:
    table = Explanation([Row("a.up", "fused", "cpu", "s", "why"), Row("b", "x", "y", "z", "w w")])
    assert str(table) == repr(table) == (
        "layer  state  backend  strategy  reason\n"
        "a.up   fused  cpu      s         why\n"
        "b      x      y        z         w w\n"
        "2 LoRA layers: 1 fused, 1 x"
    )  # fmt: skip


def test_shares_of_the_parameters() -> None:
    rows = [Row(name, state, "", "", "") for name, state in zip("abc", "xxy", strict=True)]
    sizes = {"a": 1, "b": 4, "c": 11}
    summary = str(Explanation(rows, sizes)).splitlines()[-1]
    assert summary == "3 LoRA layers: 2 x (31.2%), 1 y (68.8%) of the LoRA parameters"
    assert str(Explanation(rows[:2], sizes)).splitlines()[-1] == "2 LoRA layers: 2 x"
    R, (K, hidden, N) = 5, SIZES
    want = {"up": R * (K + hidden), "down": R * (hidden + N)}
    got = explain(fuse(mlp(torch.float32))).parameters
    assert got == {f"base_model.model.{name}": n for name, n in want.items()}


@needs_native
def test_fused() -> None:
    explanation = explain(fuse(mlp(torch.float32)))
    explanation.assert_fused()
    assert {(row.state, row.backend) for row in explanation.rows} == {("fused", "cpu")}
    assert "2 LoRA layers: 2 fused" in str(explanation)


def test_not_fused_yet() -> None:
    explanation = explain(mlp(torch.float32))
    assert [row.reason for row in explanation.rows] == ["fuse() was not called"] * 2
    with pytest.raises(RuntimeError) as error:
        explanation.assert_fused()
    assert str(error.value) == (
        "want all fused, got 2 LoRA layers: 2 not fused\n"
        "  base_model.model.up: not fused (peft): fuse() was not called\n"
        "  base_model.model.down: not fused (peft): fuse() was not called"
    )


def test_the_eager_backend_does_not_count() -> None:
    model = fuse(mlp(torch.float32))
    with lora_kernels.backend("eager"):
        explanation = explain(model)
    assert {(row.state, row.backend) for row in explanation.rows} == {("not fused", "eager")}
    with pytest.raises(RuntimeError, match="eager backend was asked for"):
        explanation.assert_fused()


@needs_native
def test_reasons_of_the_choice_of_backend() -> None:
    """Rank, dtype of x, and autocast, which makes y another dtype."""
    assert "rank 300" in explain(fuse(mlp(torch.float32, r=300))).rows[0].reason
    model = fuse(mlp(torch.float32))
    assert explain(model, x_dtype=torch.bfloat16).rows[0].state == "fused"
    assert "float64" in explain(fuse(mlp(torch.float64))).rows[0].reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explain(model).assert_fused()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asks_for_the_choice_that_the_op_asks_for(
    dtype: torch.dtype,
    adapters: list[str],
    autocast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fuse(mlp(dtype))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up", "down"]))
    model.base_model.set_adapter(adapters)
    choose, asked = select.choose, []

    def recorder(problem: Problem) -> Choice:
        asked.append(problem._replace(rows=None))  # which explain does not know
        return choose(problem)

    monkeypatch.setattr(select, "choose", recorder)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        explain(model, x_dtype=dtype)
        by_explain = list(asked)
        asked.clear()
        up, down = model.base_model.model.up, model.base_model.model.down
        up(batch(dtype)), down(torch.ones(2, SIZES[1], dtype=dtype))
    assert by_explain == asked and len(asked) == 2


def test_dense_layers() -> None:
    model = nn.ModuleDict({"a": LoRALinear(8, 8), "b": LoRALinear(8, 8), "c": LoRALinear(8, 8)})
    model["b"].merge()
    model["c"].enabled = False
    a, b, c = explain(model).rows
    assert (a.state, a.backend) == (("fused", "cpu") if native.module else ("not fused", "eager"))
    assert b == Row("b", "not fused", "torch", "F.linear", "the adapter is merged")
    assert c == Row("c", "not fused", "torch", "F.linear", "the adapter is disabled")


def test_every_row_has_a_reason() -> None:
    for model in (mlp(torch.float32), fuse(mlp(torch.float32)), LoRALinear(8, 8)):
        assert all(row.reason and row.strategy for row in explain(model).rows)
