"""The pictures of RESULTS.md, and what `benchmarks.report --check` notices."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pictures, report
from lora_kernels.bench import results
from lora_kernels.bench.roofline import Sizes, flops, moved

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", params=report.runs(), ids=lambda run: run.name)
def data(request: pytest.FixtureRequest) -> Any:
    return request.param.dense


def test_the_committed_files_are_in_step_whatever_their_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "sources", lambda: "those of no result")
    assert report.main(check=True) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "in step" and said[1].startswith("no failure: measured on other sources")


def test_results_of_older_sources_are_marked_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest run's sources count in the tables, and the tree's in `--check`."""
    facts = {
        "a.json: layers": {"sources": "new", "date": "2026-12-02", "commit": "c2"},
        "b.json: layers": {"sources": "old", "date": "2026-12-01", "commit": "c1"},
        "b.json: 4-bit": {"date": "2026-12-03", "commit": "c3"},
    }
    monkeypatch.setattr(report, "provenances", lambda: facts)
    assert [report.commit(each) for each in facts.values()] == [
        "commit c2",
        "commit c1 (**older sources**)",
        "commit c3 (**older sources**)",
    ]
    monkeypatch.setattr(report, "sources", lambda: "new")
    report.main(check=True)
    words = "no failure: measured on other sources than these: b.json: layers, b.json: 4-bit"
    assert capsys.readouterr().out.endswith(f"\n{words}\n")


def test_digest_of_sources_changes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lora_kernels"
    monkeypatch.setattr(results, "PACKAGE", package)
    digests = set()
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("ops/a.py", "peft/a.py", "../csrc/cpu/a.h", "__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        for text in ("1", "2"):
            (package / name).write_text(text)
            digests.add(results.sources())
    (package / "bench").mkdir()
    for name in ("bench/a.py", "cli.py", "info.py", "verify.py"):
        (package / name).write_text("3")
    assert len(digests) == 8 and results.sources() in digests


def test_the_same_results_give_the_same_bytes(data: Any) -> None:
    first, second = (pictures.lora_tax(data, "machine, date", "digest") for _ in range(2))
    assert first == second
    assert pictures.source(first) == "digest"
    assert pictures.source(first[:-20].replace(b"Source", b"Author")) is None
    assert pictures.source(b"no picture") is None


def test_every_candidate_is_drawn(data: Any) -> None:
    """A candidate that is in the results and in no picture would be a loss that is not shown."""
    names = {name for row in data["rows"] for name in row["tax"]}
    assert names - set(pictures.TAX) <= {"frozen", "peft, 16-bit adapters"}


def test_a_row_that_misses_the_tolerance_is_drawn(data: Any) -> None:
    row = next(row for row in data["rows"] if row["mode"] == "step")
    tax = {name: t for name, t in row["tax"].items() if name != "ours"}
    wrong = {**row, "tax": tax, "misses": {"ours": "y MISS"}}
    sound, missed = ({"rows": [r, data["rows"][0]]} for r in (row, wrong))
    assert pictures.lora_tax(sound, "", "") != pictures.lora_tax(missed, "", "")


LIMITS: dict[str, Any] = {
    "copy_bandwidth": 1e9,
    "read_bandwidth": 2e9,
    "product_peak": {"float32": 1e9, "bfloat16": 3e9},
    "peak": {"float32": 4e9, "bfloat16": 8e9},
}


def test_limits_are_the_processor_s_and_never_one_library_s() -> None:
    machine = results.limits(LIMITS)
    assert machine is not None and machine.bandwidth == 2e9
    assert machine.peaks == {torch.float32: 4e9, torch.bfloat16: 8e9}
    assert results.limits({**LIMITS, "peak": None}) is None
    assert results.limits({k: v for k, v in LIMITS.items() if k != "peak"}) is None
    assert results.limits({}) is None


def test_share_of_the_peak_above_one_is_marked_and_without_a_peak_is_left_out() -> None:
    row = {"M": 1, "K": 1000, "N": 1000, "R": 0, "mode": "forward", "dtype": "float32"}
    shares = [
        report.flops_share({**row, "seconds": {"ours": {"p50": p50}}}, limits)
        for p50, limits in ((1e-3, LIMITS), (4e-4, LIMITS), (1e-3, {**LIMITS, "peak": None}))
    ]
    assert shares == ["50%", "125% ✗", "–"]


def test_roofline_is_drawn_of_a_run_with_limits_alone(data: Any, tmp_path: Path) -> None:
    for facts, drawn in (({"peak": None}, False), (LIMITS, True)):
        found = {**data, "provenance": {**data["provenance"], **facts}}
        file = tmp_path / "here.json"
        file.write_text(json.dumps({"layers": found}))
        pictures_of = report.Run(file).drawn()
        assert (tmp_path / "here-roofline.png" in pictures_of) is drawn
        for _, draw in pictures_of.values():
            assert draw().startswith(b"\x89PNG")
    assert "the processor's peak is 4 GFLOP/s float32" in report.machine(found["provenance"])


def test_pages_name_the_processor_and_have_no_share_above_the_limit() -> None:
    for run in report.runs():
        assert run.dense["provenance"]["processor"] in report.machine(run.dense["provenance"])
    for document in (report.RESULTS, *report.FIGURES):
        assert not re.search(r"\b1\d\d ?% of|\d% ✗", document.read_text())


def test_points_of_the_roofline(data: Any) -> None:
    """A call of 2 s: 2·MNK + 2·R·(N + K)·M operations, x, W, y, A and B moved once."""
    row: dict[str, Any] = dict(zip("MKNR", (3, 5, 7, 2), strict=True))
    row |= {"dtype": "float32", "mode": "forward"}
    row["seconds"] = {"ours": {"p50": 2.0}, "frozen": {"p50": 1.0}}
    points = {name: rest for name, *rest in pictures._points({"rows": [row]}, "float32")}
    base, thin = 2 * 3 * 5 * 7, 2 * 3 * 2 * (5 + 7)
    operands = 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert points["ours"] == [(base + thin) / (operands + 4 * 2 * (5 + 7)), (base + thin) / 2]
    assert points["frozen"] == [base / operands, base]
    assert not list(pictures._points({"rows": [row]}, "bfloat16"))


SIZES = Sizes(3, 7, 5, 2, torch.bfloat16)
# x, y and W in 16 bits, A and B in float32: bytes of a forward, and of its backward.
FORWARD = (2 * 3 * 5, 2 * 3 * 7, 2 * 7 * 5, 4 * 2 * (7 + 5))
BACKWARD = (2 * FORWARD[0], FORWARD[1], FORWARD[2], 2 * FORWARD[3])  # x and dx, dY, W, A, B, dA, dB
CODES = 7 * 5 * 33 / 64  # bytes: half of one a weight, and one for 64


@pytest.mark.parametrize(
    ("sizes", "forward", "step"),
    [
        (SIZES, sum(FORWARD), sum(FORWARD) + sum(BACKWARD)),
        (
            replace(SIZES, four_bit=True),
            sum(FORWARD) - FORWARD[2] + CODES,
            sum(FORWARD) + sum(BACKWARD) - 2 * (FORWARD[2] - CODES),
        ),
        (
            replace(SIZES, adapter_itemsize=2),
            sum(FORWARD) - FORWARD[3] // 2,
            sum(FORWARD) + sum(BACKWARD) - 3 * FORWARD[3] // 2,
        ),
        (replace(SIZES, R=0), sum(FORWARD[:3]), sum(FORWARD[:3]) + sum(BACKWARD[:3])),
        (replace(SIZES, M=0), sum(FORWARD[2:]), sum(FORWARD[2:]) + sum(BACKWARD[2:])),
    ],
    ids=["dense", "codes", "16-bit adapters", "frozen", "no rows"],
)
def test_moved_counts_each_operand_once_a_direction(
    sizes: Sizes, forward: float, step: float
) -> None:
    assert (moved(sizes), moved(sizes, step=True)) == (forward, step)


def test_flops_of_a_step_has_two_base_gemms_and_six_skinny_ones() -> None:
    """Forward: x·Wᵀ, P and S·Bᵀ. Backward: dY·W, dS, dB, dA and the update of dx."""
    base, to_ranks, from_ranks = 2 * 3 * 7 * 5, 2 * 3 * 5 * 2, 2 * 3 * 7 * 2
    assert flops(SIZES) == base + to_ranks + from_ranks
    assert flops(SIZES, step=True) == 2 * base + 3 * to_ranks + 3 * from_ranks


def test_check_notices_a_picture_of_other_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = report.runs()[0]
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(report, "OVERVIEW", tmp_path / "results" / report.OVERVIEW.name)
    file = tmp_path / "results" / run.file.name
    file.parent.mkdir()
    shutil.copy(run.file, file)
    png = report.Run(file).tax_png

    def stale() -> str:
        assert report.main(check=True) == 1
        return capsys.readouterr().out

    assert png.name in stale() and report.OVERVIEW.name in stale()
    named, draw = report.overview(report.runs())
    report.OVERVIEW.write_bytes(draw())
    assert pictures.source(report.OVERVIEW.read_bytes()) == named
    assert report.OVERVIEW.name not in stale()
    png.write_bytes(pictures.lora_tax(run.dense, "", pictures.digest(run.dense)))
    assert png.name not in stale()
    png.write_bytes(pictures.lora_tax(run.dense, "", pictures.digest(run.codes or {})))
    assert png.name in stale()


def test_machines_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two machines that have not measured the same each show their rows."""
    dense = report.runs()[0].dense
    steps = [row for row in dense["rows"] if row["mode"] == "step" and row["R"] == 16]
    row = next(row for row in steps if row["M"] > 1)
    for name, shape in (("amxbf16", 48), ("an-arm", 80)):
        file = tmp_path / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        rows = [row, {**row, "M": shape}]
        file.write_text(json.dumps({"layers": {**dense, "rows": rows}}))
    monkeypatch.setattr(report, "HERE", tmp_path)
    amx, other = report.runs()
    assert (amx.name, other.name) == ("AMX", "an-arm")
    lines = {
        line.split(" | ")[0]: line for line in report.render("cpu.md.j2", [amx, other]).splitlines()
    }
    tax = [report.cell(row, name) for name in ("ours", "addmm", "peft")]
    sizes = f"×{row['K']}×{row['N']}"
    for M, cells in ((row["M"], tax + tax), (48, tax + ["–"] * 3), (80, ["–"] * 3 + tax)):
        assert lines[f"| {M}{sizes}"].endswith(f" | {' | '.join(cells)} |")
    page = report.render("RESULTS.md.j2", [amx, other])
    assert "### Forward and backward: AMX" in page
    assert "### Forward and backward: an-arm" in page
    assert "4-bit bases" not in page and "Variants" not in page


def test_a_run_of_capped_instructions_is_in_results_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense = report.runs()[0].dense
    step = next(row for row in dense["rows"] if row["mode"] == "step" and row["R"] == 16)
    capped = {**dense["provenance"], "capped_by": {"ATEN_CPU_CAPABILITY": "avx2"}}
    slow = {**step, "tax": {**step["tax"], "ours": 9 * step["tax"]["ours"]}}
    results_folder = tmp_path / "results"
    results_folder.mkdir()
    for name, facts, row in (("avx512", dense["provenance"], step), ("avx2", capped, slow)):
        run = {**dense, "provenance": facts, "rows": [{**row, "M": 64}]}
        (results_folder / f"{name}.json").write_text(json.dumps({"layers": run}))
    document = tmp_path / "README.md"
    document.write_text("\n".join(report.MARKS))
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(report, "OVERVIEW", results_folder / report.OVERVIEW.name)
    monkeypatch.setattr(report, "FIGURES", {document: "README.md.j2"})
    assert report.main(check=False) == 0
    ratio = step["tax"]["ours"] / step["tax"]["peft"]
    assert f"**{ratio:.2f} to {ratio:.2f} of PEFT's time**" in document.read_text()
    page = (tmp_path / "RESULTS.md").read_text()
    assert "### Forward and backward: AVX2, capped" in page
    assert "capped by ATEN_CPU_CAPABILITY=avx2: " in page
    named, _ = report.overview([report.Run(results_folder / "avx512.json")])
    assert pictures.source(report.OVERVIEW.read_bytes()) == named


def test_ratios_in_readme_are_between_adapters_of_one_dtype(tmp_path: Path) -> None:
    dense = report.runs()[0].dense
    tax = {"ours": 0.5, "ours, fp32 adapters": 0.8, "peft": 1.0, "peft, 16-bit adapters": 0.9}
    step = {"mode": "step", "R": 16, "M": 64, "K": 32, "N": 48, "dtype": "bfloat16", "tax": tax}
    (tmp_path / "avx2.json").write_text(json.dumps({"layers": {**dense, "rows": [step]}}))
    run = report.Run(tmp_path / "avx2.json")
    assert [*report.tax_ranges([run])] == [("bfloat16", "0.80 to 0.80", "0.56 to 0.56")]
    # A call that missed the tolerance has no time, and none of another dtype takes its place.
    missed = {**step, "tax": {name: t for name, t in tax.items() if name != "ours, fp32 adapters"}}
    assert report.over_peer(missed, "peft") == 0.5
    assert report.over_peer({**missed, "misses": {"ours, fp32 adapters": "y"}}, "peft") is None
    _, draw = report.overview([run])
    assert draw().startswith(b"\x89PNG")


def test_to_draw_without_matplotlib_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert report.main(check=False) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().out
    assert not (tmp_path / "RESULTS.md").exists()
