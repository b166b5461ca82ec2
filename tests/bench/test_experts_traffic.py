"""The counts of experts by `bench --count`, and those that the documents print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels.bench import experts_traffic
from lora_kernels.bench.blocks import Count, is_known_loss, judge
from lora_kernels.bench.experts_traffic import EXPERTS, KINDS, TOKENS, count_experts
from lora_kernels.bench.results import Row

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

KERNELS = Path(__file__).parents[2].joinpath("benchmarks/KERNELS.md")


LAYER = [Row(dtype="bf16", M=1, K=1, N=1, R=1, mode="step", moved={"ours": 1, "peft": 2})]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_counts_in_the_docs_are_those_counted(experts: int, tokens: int) -> None:
    def cell(kind: str) -> str:
        steps = count_experts(kind, experts, tokens)
        said = [f"{step.bytes / 1e6:.0f} / {step.kernels}" for step in steps]
        return ", ".join([*said, f"{max(step.peak for step in steps) / 1e6:.0f}"])

    start = f"| {experts}, {tokens} | "
    (row,) = [line for line in KERNELS.read_text().splitlines() if line.startswith(start)]
    assert row.split(" | ")[2:] == [*map(cell, KINDS[:-1]), f"{cell(KINDS[-1])} |"]


def test_missing_says_why_no_experts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experts_traffic.missing() is None
    monkeypatch.setattr(experts_traffic, "qwen3_moe", lambda: None)
    assert experts_traffic.missing() == "want transformers 5, whose experts are parameters"
    monkeypatch.delattr(experts_traffic.functional, "grouped_mm")
    assert experts_traffic.missing() == f"torch {torch.__version__} has no grouped_mm to count"
    assert not [*experts_traffic.rows(judge)]


def test_rows_have_every_kind_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_traffic, "EXPERTS", (8,))
    monkeypatch.setattr(experts_traffic, "TOKENS", (16, 1))
    rows = [*experts_traffic.rows(judge)]
    assert [(row.M, row.mode) for row in rows] == [
        (tokens, mode) for tokens in (16, 1) for mode in ("forward", "backward")
    ]
    for row, step in zip(rows[:2], count_experts("ours, NF4", 8, 16), strict=True):
        assert tuple(row.moved) == KINDS and not row.misses
        assert row.what == "8 experts 2048→768, top 8"
        found = row.moved, row.kernels, row.peak_bytes
        assert [each["ours, NF4"] for each in found] == [step.bytes, step.kernels, step.peak]


def test_known_losses_are_those_counted_and_no_other_loss_passes() -> None:
    rows = [*experts_traffic.rows(judge)]
    lost = [row for row in rows if row.misses]
    assert {(row.what, row.M, row.misses["ours"]) for row in lost} == experts_traffic.KNOWN_LOSSES
    assert all(map(is_known_loss, lost)) and len(lost) == 4  # both directions of two sizes
    assert not Count().has_failed(rows)
    *_, said = Count().summary([*rows, *LAYER])
    assert said.startswith("experts: 12 rows, ours loses 4 to PEFT (4 in bytes, 0 in peak); 4 are")
    for changed in (replace(lost[0], M=1), replace(lost[0], misses={"ours": "bytes, peak"})):
        assert Count().has_failed([*rows, changed])
