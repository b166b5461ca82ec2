"""The end of `bench`: its summary, rows that were timed under load, and peers that are wrong."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report
from lora_kernels import cli, timing
from lora_kernels.measure import baselines, bench_layers
from lora_kernels.measure import case as cases
from lora_kernels.measure.results import Row, ratios, summary
from lora_kernels.timing import Times

SMALL = ["bench", "--shapes", "24x48x32", "--ranks", "3", "--seconds", "0", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype, **_: 1e9)
    monkeypatch.setattr(baselines, "no_compiler", lambda device: "torch.compile takes long")
    monkeypatch.setattr(
        bench_layers, "overhead", lambda *_: {"ours, forward": 0, "eager, forward": 0}
    )


def row(M: int, misses: dict[str, str] | None = None, **p50: float) -> Row:
    seconds = {name: Times(t, t, t, 9) for name, t in p50.items()}
    return Row(M=M, K=48, N=32, R=3, mode="step", seconds=seconds, misses=misses or {})


def test_summary_counts_rows_by_peer_and_names_the_worst() -> None:
    rows = [
        row(1, frozen=1, ours=2, addmm=4, peft=8),
        row(2, {"eager": "y MISS"}, frozen=1, ours=2, addmm=1, eager=4, peft=4),
        row(3, frozen=1, ours=3, addmm=3),
        row(4, {"ours": "y MISS"}, frozen=1, addmm=1),
    ]
    rows[1].under_load = True
    assert list(summary(rows)) == [
        "ours over each peer, medians of the same row; below 1 ours is faster:",
        "    addmm  faster in 1 of 3 rows, slower in 1; median 1.000; worst 2.000: "
        "float32 2×48×32 r=3 step",
        "    peft   faster in 2 of 2 rows, slower in 0; median 0.375; worst 0.500: "
        "float32 2×48×32 r=3 step",
        "    eager  faster in 1 of 1 rows, slower in 0; median 0.500; worst 0.500: "
        "float32 2×48×32 r=3 step; 1 of its results miss the tolerance",
        "1 results of ours miss the tolerance (✗) and have no time",
        "1 of 4 rows were timed under load: measure them again",
    ]
    assert list(summary([])) == []


def test_summary_compares_like_with_like() -> None:
    """PEFT's float32 adapters with ours, its several adapters with as many, its LoRA with LoRA."""
    times = {
        "frozen": 1, "stream": 1, "ours": 2, "ours, fp32 adapters": 3, "peft": 6, "LoRA": 4,
        "peft, 16-bit adapters": 8, "PEFT's LoRA": 5, "PEFT's, 4": 6, "ours, 4": 9, "dense": 1,
    }  # fmt: skip
    each = row(1, **times)
    found = {name: pairs[0][0] for name, pairs in ratios([each]).items()}
    assert found == {
        "peft": 3 / 6, "peft, 16-bit adapters": 2 / 8, "PEFT's LoRA": 4 / 5, "PEFT's, 4": 9 / 6,
        "dense": 2 / 1,
    }  # fmt: skip
    # Ours in another dtype does not stand in for one that is wrong.
    del each.seconds["ours, fp32 adapters"]
    assert ratios([each])["peft"][0][0] == 2 / 6
    each.misses = {"ours, fp32 adapters": ""}
    assert "peft" not in ratios([each])


@pytest.mark.parametrize("others", [0.2, 1.7])
def test_bench_marks_rows_timed_under_load(
    others: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "getloadavg", lambda: (threads + others, 0.0, 0.0))
    file, lines = tmp_path / "here.json", tmp_path / "here.csv"
    assert cli.main([*SMALL, "--json", str(file), "--csv", str(lines)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert {(each["load"], each["own_load"]) for each in rows} == {(threads + others, threads)}
    loaded = others > 1
    assert [each["under_load"] for each in rows] == [loaded] * 3
    said = f"[under load: average {threads + others:.1f}, at most {threads} of it the bench]"
    assert out.count(said) == 3 * loaded
    assert ("3 of 3 rows were timed under load" in out) == loaded
    with lines.open(newline="") as text:
        assert {each["under_load"] for each in csv.DictReader(text)} == {str(loaded)}


def test_bench_ends_with_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(SMALL) == 0
    last = [line.split() for line in capsys.readouterr().out.splitlines() if " of 3 rows, " in line]
    assert [words[0] for words in last] == ["addmm", "eager", "peft"]


def test_bench_times_a_wrong_peer_and_marks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that loses a little more than the limit is still what people would use."""

    def half(args: dict[str, Any]) -> Any:
        def call(**args: Any) -> Tensor:
            return cases.plain_pytorch(**{**args, "scaling": args["scaling"] / 2})

        return call

    monkeypatch.setattr(baselines, "eager", half)
    file, lines = tmp_path / "here.json", tmp_path / "here.csv"
    assert cli.main([*SMALL, "--json", str(file), "--csv", str(lines)]) == 0
    out = capsys.readouterr().out
    for each in json.loads(file.read_text())["rows"]:
        tax = f"{each['tax']['eager']:.3f} ✗"
        assert each["correct"] and set(each["misses"]) == {"eager"}
        assert f"eager {tax} (y MISS: rms" in out
        assert report.cell(each, "eager") == tax
    assert "; 3 of its results miss the tolerance" in out
    with lines.open(newline="") as text:
        results = [each["result"] for each in csv.DictReader(text) if each["call"] == "eager"]
    assert len(results) == 3 and all(result.startswith("✗ y MISS") for result in results)
