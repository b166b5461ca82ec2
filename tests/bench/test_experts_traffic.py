"""The counts of experts by `bench --count`, and those that the documents print."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_kernels.bench import experts_traffic
from lora_kernels.bench.experts_traffic import EXPERTS, KINDS, TOKENS, count_experts

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

KERNELS = Path(__file__).parents[2].joinpath("benchmarks/KERNELS.md")


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


def test_lines_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_traffic, "qwen3_moe", lambda: None)
    assert list(experts_traffic.lines()) == [
        "experts: want transformers 5, whose experts are parameters"
    ]
    monkeypatch.delattr(experts_traffic.functional, "grouped_mm")
    assert list(experts_traffic.lines()) == [
        f"experts: torch {torch.__version__} has no grouped_mm to count"
    ]


def test_lines_have_every_kind_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_traffic, "EXPERTS", (8,))
    monkeypatch.setattr(experts_traffic, "TOKENS", (16, 1))
    many, one = experts_traffic.lines()
    for tokens, line in ((16, many), (1, one)):
        assert line.startswith(f"8 experts 2048×768, {tokens} tokens top 8, MB/kernels forward and")
        forward, backward = count_experts("ours, NF4", 8, tokens)
        peak = max(forward.peak, backward.peak) / 1e6
        said = f"{forward.bytes / 1e6:.0f}/{forward.kernels}"
        said += f" and {backward.bytes / 1e6:.0f}/{backward.kernels}, {peak:.0f}"
        assert f": ours, NF4 {said}; ours " in line and "; peft " in line
