"""`bench --host` with few rounds, and its judgement of given times."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import report
from lora_kernels.bench import host, peers, stub_drivers
from lora_kernels.bench.blocks import build_block
from lora_kernels.bench.results import Row, flat, ratios
from lora_kernels.bench.timing import Times
from lora_kernels.oracle import tolerance
from lora_kernels.peft import fuse

pytest.importorskip("peft")

KEY = Row(what="host layer", M=70, K=32, N=32, R=8, mode="step")


def times(minimum: float) -> Times:
    return Times(minimum, minimum, 9 * minimum, 9 * minimum, 60)


def given(ours: Sequence[float]) -> Callable[..., host.Measured]:
    """Return measurements of ours in turn, of PEFT's as 1."""
    each = iter(ours)
    return lambda *_: ({"ours": times(next(each)), "peft": times(1.0)}, {})


def test_host_suite_has_a_row_for_each_block_kind_and_mode(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "LIMIT", torch.inf)
    threads = torch.get_num_threads()
    ran = run("--host")
    assert torch.get_num_threads() == threads
    kinds = [cell.name for cell in host.cells()]
    found = [(row["what"], row["dtype"], row["mode"]) for row in ran.rows]
    assert found == [*itertools.product([f"host {n}" for n in host.NAMES], kinds, host.MODES)]
    for row in ran.rows:
        peers = {"peft"} if row["what"] == "host decoder" else {"peft", "unsloth"}
        assert row["seconds"].keys() == {"ours", *peers}
        assert row["M"] == (1 if row["mode"] == "one_row" else 70) and row["own_load"] == 1
        for each in row["seconds"].values():
            assert 0 < each["minimum"] <= each["p50"] and each["rounds"] == 2
    assert ran.status == 0 and ran.out.startswith("An emulation on a CPU of the host's part")
    assert float(ran.csv[0]["minimum_ms"]) == ran.rows[0]["seconds"]["ours"]["minimum"] * 1e3
    file = tmp_path / "host.json"
    file.write_text(json.dumps({"host": ran.data}))
    monkeypatch.setattr(report, "JSON_HOST", file)
    table = report.table(report.host_head(), report.host_rows(ran.rows))
    assert len(table.splitlines()) == 2 + len(host.NAMES) * len(kinds)
    page = report.render("RESULTS.md.j2", report.runs())
    assert table in page and "An emulation on a CPU" in page
    monkeypatch.setattr(report, "JSON_HOST", tmp_path / "none.json")
    assert "An emulation" not in report.render("RESULTS.md.j2", report.runs())


@pytest.mark.parametrize("name", host.NAMES)
def test_host_calls_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(calls: dict[str, Callable[[], Any]], device: str) -> host.Measured:
        found = {n: [y] if isinstance(y := call(), Tensor) else y for n, call in calls.items()}
        peft = found.pop("peft")
        for results in found.values():
            for mine, want in zip(results, peft, strict=True):
                # GEMMs of at most 70 terms; in a decoder layer about ten, one after another.
                assert tolerance.rms_error(mine.detach(), want.detach().double()) < 1e-5
        return given([1.0])()

    monkeypatch.setattr(host, "measure", compare)
    with host.emulated("cpu"):
        rows = [*host.block_rows(name, host.CELLS[0], "cpu")]
    assert [row.mode for row in rows] == [*host.MODES]


@pytest.mark.skipif(stub_drivers.unavailable_reason() is not None, reason="Triton is not installed")
def test_host_launches_decodings_and_gated_kernels_of_both_sides() -> None:
    pytest.importorskip("bitsandbytes")
    cell = next(cell for cell in host.CELLS if cell.base == "nf4")
    block = build_block(host.block_of("mlp", 64), cell, 8, "cpu")
    sides = {"ours": fuse(nn.Sequential(copy.deepcopy(block)))[0], "peft": block}
    weight = peers.projections_of(block)[0]
    before, found = weight.dense(torch.float32), {}
    with host.emulated("cpu"), stub_drivers.stub_drivers() as launched:
        for (name, module), (mode, M) in itertools.product(sides.items(), host.MODES.items()):
            x = torch.zeros(M, 64, dtype=cell.dtype).requires_grad_(mode in host.STEPS)
            trained = [p for p in module.parameters() if p.requires_grad]
            with torch.set_grad_enabled(mode in host.STEPS):
                call = host.call_of(module, x, trained, mode, cell)
                launched.clear()
                call()
            found[name, mode] = dict(launched)
    once = {"gated_update_kernel": 1}
    backward = {"gated_update_backward_kernel": 1, "gated_gradients_kernel": 1}
    assert found == {
        ("ours", "step"): {"dequantize_kernel": 6} | once | backward,
        ("ours", "checkpointed"): {"dequantize_kernel": 8} | once | backward,
        ("ours", "no_grad"): {"dequantize_kernel": 3} | once,
        ("ours", "one_row"): {"gemm_4bit": 3} | once,
        ("peft", "step"): {"dequantize_blockwise": 6, "dequantize_4bit": 6},
        ("peft", "checkpointed"): {"dequantize_blockwise": 9, "dequantize_4bit": 9},
        ("peft", "no_grad"): {"dequantize_blockwise": 3, "dequantize_4bit": 3},
        ("peft", "one_row"): {"gemm_4bit": 3},
    }
    assert torch.equal(weight.dense(torch.float32), before)  # bitsandbytes computes again
    assert torch.tensor(1e-40).mul(1.0) > 0  # and a CPU subnormal numbers


@pytest.mark.parametrize(
    ("ours", "kept", "lost"),
    [
        ([1.05], 1.05, ""),
        ([1.06, 1.05], 1.05, ""),
        ([1.06, 1.07], 1.07, "1.060 and 1.070 times PEFT's, want at most 1.05"),
    ],
)
def test_host_row_above_the_limit_is_measured_again_and_lost_if_above_twice(
    ours: list[float], kept: float, lost: str, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    row = host.measured(KEY, given(ours))
    assert row.seconds["ours"].minimum == kept and row.misses == ({"ours": lost} if lost else {})
    monkeypatch.setattr(host, "NAMES", ("layer",))
    monkeypatch.setattr(host, "CELLS", host.CELLS[:1])
    monkeypatch.setattr(host, "MODES", {"no_grad": 70})
    monkeypatch.setattr(host, "measure", given(ours))
    ran = run("--host")
    assert ran.status == bool(lost)
    assert ("1 of 1 rows take more than 1.05 times PEFT's time, twice" in ran.out) == bool(lost)


def test_host_row_compares_minima_and_prints_the_ratio_first() -> None:
    seconds = {"ours": Times(30e-6, 1.0, 1.0, 1.0, 60), "peft": Times(40e-6, 41e-6, 41e-6, 1.0, 60)}
    row = host.measured(KEY, lambda: (seconds, {"ours": times(5e-6)}))
    assert row.kind == "host" and ratios([row])["peft"][0][0] == 0.75
    assert [line["over"] for line in flat(row)] == [0.75, 1.0]
    lines = str(row).splitlines()
    assert lines[0] == "host layer float32 70×32×32 r=8 step, over peft"
    assert lines[1].split() == ["ratio", "µs", "p50", "GPU's", "µs"]
    assert lines[2].split() == ["ours", "0.750", "30", "1000000", "45"]
    assert lines[3].split() == ["peft", "1.000", "40", "41"]
