"""A backend made wrong on purpose: `bench` shows ✗ in its row and `verify` ends with 1."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import cli, ops, timing
from lora_kernels.backends import native
from lora_kernels.measure import baselines, bench_variants
from lora_kernels.measure import case as cases

pytest.importorskip("peft")

BACKEND = "cpu" if native.module else "eager"
# What is wrong -> the op, and the place of the result in what it returns.
RESULTS = {
    "y": ("lora_linear", 0), "dx": ("lora_linear_backward", 0), "dA": ("lora_linear_backward", 1),
    "dB": ("lora_linear_backward", 2), "dg": ("lora_linear_backward", 3),
    "dc": ("lora_linear_backward", 4), "dbias": ("lora_linear_backward", 5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype, **_: 1e9)
    monkeypatch.setattr(baselines, "no_compiler", lambda device: "torch.compile takes long")


def broken(monkeypatch: pytest.MonkeyPatch, output: str, by: float = 1.01) -> None:
    """The backend's result is off by a hundredth: less than what a test of losses would see."""
    name, place = RESULTS[output]

    def spoil(of: Any, name: str) -> None:
        op: Callable[..., Any] = getattr(of, name)

        def wrong(*args: Any) -> Any:
            found = op(*args)
            if found is None or found[place] is None:
                return found
            changed = (*found[:place], found[place] * by, *found[place + 1 :])
            return found._make(changed) if hasattr(found, "_make") else changed

        monkeypatch.setattr(of, name, wrong)

    spoil(ops._BACKENDS[BACKEND], name)


@pytest.mark.parametrize("output", ["y", "dx", "dA", "dB"])
def test_bench_shows_no_time_of_a_wrong_result(
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(monkeypatch, output)
    file, lines = tmp_path / "here.json", tmp_path / "here.csv"
    command = ["bench", "--shapes", "64x48x32", "--ranks", "5", "--seconds", "0.01"]
    command += ["--dtypes", "float32", "--json", str(file), "--csv", str(lines)]
    assert cli.main(command) == 1
    # A wrong y is another y's gradients as well, but no rounding's.
    assert f"ours ✗ ({output} MISS" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert rows
    for row in rows:
        assert not row["correct"] and "ours" not in row["seconds"] | row["tax"]
        assert output in row["misses"]["ours"] and "addmm" in row["seconds"]
    with lines.open(newline="") as text:
        results = {line["result"][:1] for line in csv.DictReader(text) if line["call"] == "ours"}
    assert results == {"✗"}


@pytest.mark.parametrize("output", [None, *RESULTS])
def test_verify_ends_with_1(
    output: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"everything": {"gate": True, "column_scale": True, "bias": True}}
    monkeypatch.setattr("lora_kernels.measure.verify.OPTIONS", options)
    monkeypatch.setattr("lora_kernels.measure.verify.SHAPES", ((70, 65, 63, 5),))
    monkeypatch.setattr("lora_kernels.measure.verify.DTYPES", ((torch.float32, None),))
    monkeypatch.setattr("lora_kernels.measure.verify.MULTI_QUANTS", ())
    command = ["verify", "--engines", "scalar" if BACKEND == "cpu" else "eager"]
    if output is None:
        assert cli.main(command) == 0 and "✗" not in capsys.readouterr().out
        return
    broken(monkeypatch, output)
    assert cli.main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    missed = [line.partition("✗ ")[2].split(" ")[0] for line in lines if "✗" in line]
    assert missed and set(missed) == {output}


def test_a_wrong_variant_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_variants, "SIZES", (8, 48, 32))
    row = bench_variants.norm_row(torch.float32, 0.0)
    assert not row.misses and "ours" in row.seconds
    norm = ops._BACKENDS[BACKEND].dora_norm
    monkeypatch.setattr(ops._BACKENDS[BACKEND], "dora_norm", lambda *args: norm(*args) * 1.01)
    row = bench_variants.norm_row(torch.float32, 0.0)
    assert set(row.misses) == {"ours", "ours on NF4"}
    assert "ours" not in row.seconds and "panels" in row.seconds
    assert "ours ✗ (y MISS: rms" in bench_variants.Variants().line(row)


@pytest.mark.slow  # bitsandbytes' layers
def test_a_wrong_4_bit_layer_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    broken(monkeypatch, "y")
    command = ["bench", "--quant", "nf4", "--shapes", "40x64x96", "--dtypes", "float32"]
    assert cli.main([*command, "--seconds", "0.01"]) == 1
    assert "ours ✗ (y MISS: rms" in capsys.readouterr().out


def test_a_case_that_is_judged_anew_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected is kept from one engine to the next; it is no kernel's."""
    case = cases.Case(70, 33, 31, 5)
    assert all(verdict.ok for verdict in cases.judge(case).values())
    broken(monkeypatch, "dA")
    verdicts = cases.judge(case)
    assert [name for name, verdict in verdicts.items() if not verdict.ok] == ["dA"]
    assert all(verdict.ok for verdict in cases.judge(replace(case, frozen=("lora_A",))).values())
