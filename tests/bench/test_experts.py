"""`bench --experts` on layers small enough for a test."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.bench import experts, table
from lora_kernels.bench.experts import Shape


@pytest.mark.parametrize("model", sorted({shape.model for shape in experts.SHAPES}))
def test_experts_rows_of_each_model_time_every_call(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "TOKENS", 8)
    entries = experts.entries_of(Shape(model, 4, 2, 128, 64), torch.bfloat16)
    step, token = (row for entry in entries for row in table.time_calls(entry, 0.01))
    assert (step.M, token.M) == (8, 1) and step.kind == token.kind == "experts"
    for row, more in ((step, ["ours, 4 tenants"]), (token, [])):
        assert not row.misses and row.judged == ["ours", "ours, NF4", "peft", *more]
        assert list(row.seconds) == ["frozen", "ours", "ours, NF4", "peft", *more]
        assert row.baseline == "frozen"
