"""`bench --head` on a head small enough for a test."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.bench import head, table
from lora_kernels.bench.head import Shape
from tests.support.threads import threads as threads

pytest.importorskip("trl", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_rows_time_every_call_and_count_its_bytes(dtype: torch.dtype) -> None:
    entries = head.entries_of(Shape("tiny", 300, 24, 2000), dtype)
    found = [row for entry in entries for row in table.time_calls(entry, 0.01)]
    assert [row.what for row in found] == ["head tiny loss", "head tiny log_probs"]
    peers = ["pytorch", "torch.compile"] if dtype is torch.float32 else ["pytorch"]
    names = ["ours", *peers, "ours, no adapter", "trl, no adapter"]
    for row in found:
        assert row.kind == "head" and row.baseline == "pytorch"
        assert not row.misses and row.judged == names
        assert list(row.seconds) == names
        assert row.peak_bytes["ours"] < row.peak_bytes["pytorch"]
        assert "head tiny" in str(row)


def test_head_losses_agree() -> None:
    """float32 sums of 500 terms in another order."""
    args = head.inputs(Shape("tiny", 30, 24, 500), torch.float32)
    for mode in head.MODES:
        for group in ("", "no adapter"):
            calls = head.losses(args, mode).items()
            values = [f(args["x"]).item() for n, f in calls if n.endswith("adapter") is bool(group)]
            assert len(values) >= 2 and values == pytest.approx([values[0]] * len(values), rel=1e-6)
