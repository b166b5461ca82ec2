"""`bench --experts` on layers small enough for a test."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.bench import experts
from lora_kernels.bench.experts import Shape


@pytest.mark.parametrize("model", sorted({shape.model for shape in experts.SHAPES}))
def test_experts_rows_of_each_model_time_every_call(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "TOKENS", 8)
    step, token = experts.rows(Shape(model, 4, 2, 64, 32), torch.bfloat16, seconds=0.01)
    assert (step.M, token.M) == (8, 1) and step.kind == token.kind == "experts"
    for row in (step, token):
        assert not row.misses and row.judged == ["ours"]
        assert list(row.seconds) == ["frozen", "ours", "ours, NF4", "peft"]
        assert row.baseline == "frozen"
