"""`bench` as a command: what it prints and writes of each suite, and that it sees wrong results."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report
from lora_kernels import cli
from lora_kernels.backends.cpu import native
from lora_kernels.bench import baselines, command, dense, models, results, table, timing, variants
from lora_kernels.bench.command import wrap
from lora_kernels.bench.results import Result, Row, flat, ratios, read, summary
from lora_kernels.bench.table import Accuracy, Call, Entry, Tolerance
from lora_kernels.bench.timing import Times
from lora_kernels.ops import direct, linear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("quick")

F32 = ["--seconds", "0", "--dtypes", "float32"]
SMALL = ["--shapes", "24x48x32", "--ranks", "3", *F32]
MODES = ("eval", "train")
NAMES = {"frozen", "ours", "addmm", "eager", "peft"}
SIXTEEN_BITS = NAMES | {"ours, fp32 adapters", "peft, 16-bit adapters"}
OVERHEAD = {f"{n}, {mode}" for n in NAMES - {"peft"} for mode in ("forward", "step")}
BACKEND = "cpu" if native.module else "eager"
# A wrong result -> the op, and the place of the result in what it returns.
RESULTS = {
    "y": ("lora_linear", 0),
    **{
        output: ("lora_linear_backward", i)
        for i, output in enumerate(("dx", "dA", "dB", "dg", "dc", "dbias"))
    },
}


def half_adapter(**args: Any) -> Tensor:
    return cases.plain_pytorch(**{**args, "scaling": args["scaling"] / 2})


def break_backend(monkeypatch: pytest.MonkeyPatch, output: str, by: float = 1.01) -> None:
    """The backend's result is off by a hundredth: less than what a test of losses would see."""
    name, place = RESULTS[output]
    op: Callable[..., Any] = getattr(linear.BACKENDS[BACKEND], name)

    def wrong(*args: Any) -> Any:
        found = op(*args)
        if found is None or found[place] is None:
            return found
        changed = (*found[:place], found[place] * by, *found[place + 1 :])
        return found._make(changed) if hasattr(found, "_make") else changed

    monkeypatch.setattr(linear.BACKENDS[BACKEND], name, wrong)
    monkeypatch.setattr(direct, "call", lambda *args, **kwargs: None)  # calls no backend


def test_bench(run: Any) -> None:
    ran = run("--shapes", "8x48x32", "--ranks", "3", "24", "--seconds", "0.01")
    each = [("decoding", "warm"), ("decoding", "cold")]
    each += [(mode, "warm") for mode in ("forward", "backward", "step")]
    assert ran.status == 0
    assert [(row["mode"], row["cache"]) for row in ran.rows] == each * 4  # ranks, dtypes
    for row in ran.rows:
        names = SIXTEEN_BITS if row["dtype"] == "bfloat16" else NAMES
        assert set(row["tax"]) == set(row["seconds"]) == names
        for times in row["seconds"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert row["tax"]["frozen"] == 1 < row["floor"]
        aimed = row["R"] == 3 and row["mode"] != "backward" and row["cache"] == "warm"
        assert ("target" in row) == aimed
        assert not row["misses"]
        assert row["backend"] in ("cpu", "eager") and row["strategy"]
        # At 1 GB/s and 1 GFLOP/s the operations take the longest.
        M, K, N, R = (row[name] for name in "MKNR")
        forward = 2 * M * (K * N + R * (K + N))
        backward = 2 * M * (K * N + 2 * R * (K + N))
        work = {"backward": backward, "step": forward + backward}.get(row["mode"], forward)
        assert row["floor_ms"] == pytest.approx(work * 1e-6)
        assert ("bytes" in row) == ("peak_bytes" in row) == (row["mode"] == "step")
        if row["mode"] == "step":
            assert set(row["bytes"]) == set(row["peak_bytes"]) == names
            # x, which is there before, and P in float32.
            x = M * K * (2 if row["dtype"] == "bfloat16" else 4)
            assert row["bytes"]["ours"] == x + 4 * M * R
            assert all(row["peak_bytes"][n] >= held - x for n, held in row["bytes"].items())
    assert len(ran.csv) == sum(len(row["seconds"]) for row in ran.rows)
    first, times = ran.csv[0], ran.rows[0]["seconds"]["frozen"]
    assert (first["call"], first["result"], first["cache"]) == ("frozen", "", "warm")
    assert float(first["p50_ms"]) == times["p50"] * 1e3
    facts = set(ran.data["provenance"])
    assert {"clocks_mhz", "processor", "threads", "commit", "python", "platform"} <= facts
    assert {"torch", "peft", "transformers", "bitsandbytes", "triton", "numpy"} <= facts
    assert set(ran.data["overhead_us"]) == OVERHEAD
    for said in ("float32 8×48×32 r=3 step, over frozen\n", "r=3 decoding cold, over frozen\n"):
        assert said in ran.out
    for said in (" of the roofline", "torch.compile takes long", "MiB held MiB peak rms error"):
        assert said in ran.out
    assert max(map(len, wrap(ran.out).splitlines())) <= 100
    assert all(line in wrap(ran.out) for line in ran.out.splitlines() if " of the " not in line)
    table = ran.out[ran.out.index("ours over each peer") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["addmm", "eager", "peft"]


def test_bench_of_a_model(monkeypatch: pytest.MonkeyPatch, no_overhead: None) -> None:
    """Its layers' shapes; quick: fewer rows and one rank, unless others are named."""
    monkeypatch.setitem(models._MODELS, "smollm2-135m", models.Model(32, 16, 32, 48))
    asked: list[tuple[int, ...]] = []

    def asked_for(case: Case, *rest: object) -> Entry:
        asked.append((case.M, case.K, case.N, case.R))
        return Entry(key=Row(), calls={}, modes=[])

    monkeypatch.setattr(dense, "entry", asked_for)
    quick = ["bench", "--model", "smollm2-135m", "--dtypes", "float32", "--quick"]
    shapes = [(32, 32), (32, 16), (32, 48), (48, 32)]
    assert cli.main(quick) == 0
    assert asked == [(M, K, N, 16) for M in command.QUICK_ROWS for K, N in shapes]
    asked.clear()
    assert cli.main([*quick, "--rows", "7", "--ranks", "2", "3"]) == 0
    assert asked == [(7, K, N, R) for K, N in shapes for R in (2, 3)]
    asked.clear()
    assert cli.main(quick[:-1]) == 0
    assert len(asked) == len(models.ROWS["cpu"]) * len(shapes) * len(command.RANKS)
    assert {"llama3-8b", "qwen3-8b", "smollm2-135m"} <= set(models.NAMES)


@pytest.mark.slow  # compiles
def test_bench_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if (reason := baselines.no_compiler("cpu")) is not None:
        pytest.skip(reason)
    for row in dense.measure(Case(8, 32, 48, 3, dropout_p=0.1), 0.01):
        assert row.tax["torch.compile"] > 0 and not row.misses


@pytest.mark.slow  # compiles
def test_compiled_baseline_asks_no_cache_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if (reason := baselines.no_compiler("cpu")) is not None:
        pytest.skip(reason)
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["inductor"].copy()
    baselines.compile_static(lambda x: x * 2 + 1)(torch.ones(24))
    after = torch._dynamo.utils.counters["inductor"]
    for name in ("fxgraph_cache_hit", "fxgraph_cache_miss"):
        assert after[name] == before[name]


@pytest.mark.slow  # bitsandbytes' layers
def test_bench_of_4_bit_layers(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    ran = run("--quant", "nf4", "--shapes", "1x64x96", "3x64x96", *F32)
    want = [(M, "decoding", cache) for M in (1, 3) for cache in ("cold", "warm")]
    want.append((3, "step", "cold"))
    assert ran.status == 0
    assert [(row["M"], row["mode"], row["cache"]) for row in ran.rows] == want
    for row in ran.rows:
        assert not row["misses"] and {"ours", "dense", "bitsandbytes, train"} <= set(row["seconds"])
        modes = MODES if row["mode"] == "decoding" else ("train",)  # eval has no backward
        assert set(row["errors"]) == {"ours", "dense", *(f"bitsandbytes, {m}" for m in modes)}
    break_backend(monkeypatch, "y")
    ran = run("--quant", "nf4", "--shapes", "40x64x96", *F32)
    assert ran.status == 1 and "✗ ours: y MISS: rms" in ran.out


@pytest.mark.parametrize("quant", ["mxfp4", "nvfp4", "int4-16-half-shift", "int8-32"])
def test_bench_of_layers_that_bitsandbytes_lacks(
    quant: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours beside itself over NF4, and PEFT's layer over the decoded weight."""
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    ran = run("--quant", quant, "--shapes", "3x64x96", *F32)
    assert ran.status == 0 and [row["mode"] for row in ran.rows] == ["decoding", "decoding", "step"]
    for row in ran.rows:
        assert not row["misses"] and row["quant_type"] == quant
        assert set(row["errors"]) == {"ours", "ours, NF4", "PEFT, decoded", "dense"}
    assert "ours over ours, NF4 " in ran.out and "ours over PEFT, decoded " in ran.out


def test_bench_with_dropout(run: Any, no_overhead: None) -> None:
    ran = run(*SMALL, "--dropout", "0.1")
    assert ran.status == 0 and all("peft" in row["tax"] for row in ran.rows)
    assert not any("addmm" in row["tax"] for row in ran.rows)  # which has none


def test_results_that_a_bench_writes_make_no_commit_dirty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*words: str) -> None:
        identity = "-c", "user.name=a", "-c", "user.email=a@b"
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    files = tmp_path / "benchmarks/results/a.json", tmp_path / "a.py"
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "a")
    monkeypatch.setattr(results, "PACKAGE", tmp_path)
    commit = results._commit()
    assert commit and "dirty" not in commit
    files[0].write_text("2")
    assert results._commit() == commit
    files[1].write_text("2")
    assert results._commit() == f"{commit}-dirty"


def test_bench_of_variants(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SIZES", (8, 48, 32))
    monkeypatch.setattr(variants, "SERVED", (48, 32))
    ran = run("--variants", "--seconds", "0")
    each = ["row norm call", "DoRA step", "q, k, v step", "q, k, v decoding"]
    each += ["16 adapters decoding", "16 adapters decoding", "three levels step"]
    found = [f"{row['what']} {row['mode']}" for row in ran.rows]
    assert ran.status == 0 and found == [*each, *each, "switching call"]
    for row in ran.rows[:-1]:
        assert set(row["seconds"]) == set(row["errors"])
        # Rounded to 16 bits before the squares are added up, as PEFT has it.
        rounded = (row["what"], row["dtype"]) == ("row norm", "bfloat16")
        assert set(row["misses"]) == ({"PEFT's expression"} if rounded else set())
        assert (row["mode"] == "step") == ("bytes" in row) == ("peak_bytes" in row)
        assert row["errors"]["ours"] < 2.0 ** (-7 if row["dtype"] == "bfloat16" else -20)
    assert "ours over LoRA" in ran.out and "ours over ours, 1" in ran.out


@pytest.mark.parametrize("output", ["y", "dx", "dA", "dB"])
def test_a_wrong_result_has_no_time(
    output: str, run: Any, no_overhead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_backend(monkeypatch, output)
    ran = run("--shapes", "64x48x32", "--ranks", "5", *F32)
    # A wrong y is another y's gradients as well, but no rounding's.
    assert ran.status == 1 and f"✗ ours: {output} MISS" in ran.out and ran.rows
    for row in ran.rows:
        assert "ours" in row["misses"] and "ours" not in row["seconds"] | row["tax"]
        assert output in row["misses"]["ours"] and "addmm" in row["seconds"]
    assert {line["result"][:1] for line in ran.csv if line["call"] == "ours"} == {"✗"}


def test_a_wrong_peer_is_timed_and_marked(
    run: Any, no_overhead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that loses a little more than the limit is still what people would use."""
    monkeypatch.setattr(baselines, "eager", lambda args: half_adapter)
    ran = run(*SMALL)
    assert ran.status == 0
    for row in ran.rows:
        tax = f"{row['tax']['eager']:.3f} ✗"
        assert set(row["misses"]) == {"eager"}
        assert f" {tax} " in ran.out and report.cell(row, "eager") == tax
    assert ran.out.count("✗ eager: y MISS: rms") == 3
    results = [line["result"] for line in ran.csv if line["call"] == "eager"]
    assert len(results) == 3 and all(result.startswith("✗ y MISS") for result in results)


def test_a_wrong_variant_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "SIZES", (8, 48, 32))
    (row,) = table.time_calls(variants.norm_entry(torch.float32), 0.0)
    assert not row.misses and "ours" in row.seconds
    norm = linear.BACKENDS[BACKEND].dora_norm
    monkeypatch.setattr(linear.BACKENDS[BACKEND], "dora_norm", lambda *args: norm(*args) * 1.01)
    (row,) = table.time_calls(variants.norm_entry(torch.float32), 0.0)
    assert set(row.misses) == {"ours", "ours on NF4"}
    assert "ours" not in row.seconds and "panels" in row.seconds
    assert "✗ ours: y MISS: rms" in str(row)


def test_calls_are_checked_before_they_are_timed_and_a_user_s_may_raise() -> None:
    """A call of ours that misses is not timed, a peer's is; both are named."""
    done: list[str] = []

    def call(name: str, miss: str = "", error: str = "") -> Call:
        def check() -> Accuracy:
            if error:
                raise RuntimeError(error)
            return Accuracy(0.5, miss)

        return Call(forwards=[lambda: done.append(name)], check=check)

    calls = {
        "ours": call("ours", "y"),
        "peft": call("peft", "y"),
        "mine": call("mine", "", "no\nx"),
    }
    calls["frozen"] = Call(forwards=[lambda: done.append("frozen")])
    entry = Entry(key=Row(), calls=calls, modes=[("decoding", "warm")], foreign=["mine"])
    (row,) = table.time_calls(entry, 0.0)
    assert row.misses == {"ours": "y", "peft": "y", "mine": "RuntimeError: no"}
    assert set(row.seconds) == set(done) == {"peft", "frozen"}
    assert row.judged == ["ours", "peft", "mine"] and row.errors == {"ours": 0.5, "peft": 0.5}
    with pytest.raises(RuntimeError):
        next(table.time_calls(replace(entry, foreign=[]), 0.0))


def test_a_row_names_the_calls_that_take_part_in_it() -> None:
    """One without gradients is in no step, however wrong it is."""
    x = torch.ones(3, requires_grad=True)
    accuracy = Accuracy(0.5, "y MISS")
    step = {"leaves": [x], "dy": torch.ones(3)}
    calls = {
        name: Call(forwards=[lambda: x * x], check=lambda: accuracy, **options)  # type: ignore[arg-type]
        for name, options in (("peft", step), ("eval", {}))
    }
    entry = Entry(key=Row(), calls=calls, modes=[("decoding", "cold"), ("step", "warm")])
    decoding, row = table.time_calls(entry, 0.0)
    assert list(decoding.misses) == decoding.judged == list(decoding.errors) == ["peft", "eval"]
    assert list(row.misses) == row.judged == list(row.errors) == list(row.seconds) == ["peft"]


def test_rows_of_an_entry_share_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    call = Call(forwards=[lambda: x * x], leaves=[x], dy=torch.ones(3))
    entry = Entry(key=Row(), calls={"ours": call}, modes=[("forward", "warm"), ("step", "warm")])
    forward, step = table.time_calls(entry, 0.0)
    assert step.bytes == {"ours": 12} and not forward.bytes and not entry.key.bytes


def test_a_cold_cache_takes_all_weights_in_turn() -> None:
    done: list[int] = []
    call = Call(forwards=[lambda i=i: done.append(i) for i in range(3)])  # type: ignore[misc]
    cold, warm = call.forward("cold"), call.forward("warm")
    for each in (cold, cold, warm, cold, cold, warm):
        each()
    assert done == [0, 1, 0, 2, 0, 0]


def test_a_case_that_is_judged_anew_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected result is cached from one engine to the next; it is no kernel's."""
    case = Case(70, 33, 31, 5)
    assert all(verdict.ok for verdict in cases.judge(case).values())
    break_backend(monkeypatch, "dA")
    verdicts = cases.judge(case)
    assert [name for name, verdict in verdicts.items() if not verdict.ok] == ["dA"]
    assert all(verdict.ok for verdict in cases.judge(replace(case, frozen=("lora_A",))).values())


@pytest.mark.parametrize("output", [None, *RESULTS])
def test_verify_ends_with_1(
    output: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("OPTIONS", {"everything": {"gate": True, "column_scale": True, "bias": True}}),
        ("SHAPES", ((70, 65, 63, 5),)),
        ("DTYPES", ((torch.float32, None),)),
    ):
        monkeypatch.setattr(f"lora_kernels.verify.{name}", value)
    if output is not None:
        break_backend(monkeypatch, output)
    status = cli.main(["verify", "--engines", "scalar" if BACKEND == "cpu" else "eager"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "✗" in line]
    missed = {line.partition("✗ ")[2].split(" ")[0] for line in lines}
    assert (status, missed) == ((0, set()) if output is None else (1, {output}))


def row(M: int, misses: dict[str, str] | None = None, **p50: float) -> Row:
    seconds = {name: Times(t, t, t, t, 9) for name, t in p50.items()}
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
        "      rows faster slower  ✗ median  worst                 worst row\n"
        "addmm    3      1      1     1.000  2.000  float32 2×48×32 r=3 step\n"
        "peft     2      2      0     0.375  0.500  float32 2×48×32 r=3 step\n"
        "eager    1      1      0  1  0.500  0.500  float32 2×48×32 r=3 step",
        "1 results of ours miss the tolerance (✗) and have no time",
        "1 of 4 rows were timed under load: measure them again",
    ]
    assert list(summary([])) == []


def test_results_are_judged_at_the_limit() -> None:
    """An rms error of 1.25 times eager's and u/4; NaN, and a first call that is off, too."""
    u, want = 2.0**-8, torch.ones(4, dtype=torch.float64)
    limit = Tolerance(0.1, torch.bfloat16, ())
    at = 1.25 * 0.1 + u / 4
    for error, ok in ((at * 0.999, True), (at * 1.001, False), (math.nan, False)):
        verdict = limit.check(lambda error=error: want * (1 + error), want)  # type: ignore[misc]
        assert (verdict.miss == "") is ok
    assert limit.check(lambda: want * (1 + at * 1.001), want).miss.startswith("y MISS: rms 32.3 u")
    # Without gradients it is the second call that counts, and with them the third.
    for factors, ok in (((9.0, 1.0, 1.0), True), ((1.0, 9.0, 1.0), False), ((1, 1, 9.0), False)):
        each = iter(factors)
        verdict = limit.check(lambda each=each: want * next(each), want)  # type: ignore[misc]
        assert (verdict.miss == "") is ok
    sides = [want.view(2, 2)] * 2
    assert limit.check(lambda: sides, torch.cat(sides, dim=1)).error == 0.0


def test_a_miss_of_ours_fails_and_a_peer_s_does_not() -> None:
    each = replace(row(1, {"LoRA": "y MISS"}, frozen=1, ours=1), judged=["ours", "LoRA"])
    lines = {line["call"]: line["result"] for line in flat(each)}
    assert lines == {"frozen": "", "ours": "ok", "LoRA": "✗ y MISS"}
    assert command.has_failed([each])
    assert not command.has_failed([row(1, {"peft": "y"}, frozen=1)])


def test_row_in_words_has_its_goals_and_pairs() -> None:
    each = row(1, {"eager": "y MISS"}, frozen=2, ours=3, peft=8)
    each.floor, each.target, each.floor_ms = 1.1, 1.5, 1500.0
    each.backend, each.strategy = "cpu", "fused"
    assert str(each).splitlines() == [
        "float32 1×48×32 r=3 step, over frozen",
        "floor 1.100; target 1.500; ours: cpu, fused; 50% of the roofline",
        "          ratio     ms    p20    p80",
        "frozen    1.000  2e+03  2e+03  2e+03",
        "ours    1.500 ✓  3e+03  3e+03  3e+03",
        "peft      4.000  8e+03  8e+03  8e+03",
        "eager         ✗",
        "✗ eager: y MISS",
    ]
    each.floor_ms = 3001.0
    assert "100% of the roofline ✗ (the machine's limits were measured wrong)" in str(each)
    each.floor_ms = 1500.0
    each.target = 1.499
    assert "ours    1.500 over target" in str(each)
    dora = replace(row(1, ours=2, LoRA=4), what="DoRA")
    dora.seconds |= row(1, **{"PEFT's DoRA": 9, "PEFT's LoRA": 6}).seconds
    assert str(dora).endswith("\nours over LoRA 0.50, PEFT's DoRA over PEFT's LoRA 1.50")
    del dora.seconds["LoRA"]
    assert str(dora).endswith("\nPEFT's DoRA over PEFT's LoRA 1.50")


def test_a_file_holds_a_run_of_each_suite(tmp_path: Path) -> None:
    """A run replaces the one of its suite and leaves the others; a row is a line."""
    file = tmp_path / "new" / "machine.json"
    first, again, other = Result("layers", {"a": 1}), Result("layers", {"a": 2}), Result("head", {})
    first.rows, other.rows = [row(1, ours=1)], [row(2, ours=1), row(3, ours=1)]
    for each in (first, other, again):
        each.write(file, None)
    found = read(file)
    assert found == {"layers": {"provenance": {"a": 2}, "rows": []}, "head": other.to_json()}
    lines = [line.strip(" ,") for line in file.read_text().splitlines()]
    assert json.loads(lines[-4]) == other.rows[0].to_json()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', "[" * 100_000, '{"a": {"rows": []}}'])
def test_a_file_of_something_else_is_not_written_to(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    assert cli.main(["bench", "--json", str(file)]) == 2
    assert f"--json: {file} is there, and no file of" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_bench_whose_output_cannot_be_written_measures_nothing(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure", None)
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "new.json"
    for file, reason in (
        (tmp_path, f"{tmp_path}: it is a folder, want a file"),
        (below_a_file, f"{below_a_file} cannot be written"),
    ):
        assert cli.main(["bench", option, str(file)]) == 2
        assert f"bench: {option}: {reason}\n" in capsys.readouterr().err


def test_row_from_json_equals_the_row_and_leaves_out_unknown_fields() -> None:
    each = row(1, {"eager": "y MISS"}, frozen=2, ours=3)
    values = json.loads(json.dumps(each.to_json()))
    assert Row.from_json(values) == Row.from_json(values | {"older": 1}) == each


def test_row_as_json_has_its_tax_and_what_is_set() -> None:
    each = row(1, {"eager": "y MISS"}, frozen=2, ours=3)
    told = each.to_json()
    assert told["tax"] == {"frozen": 1.0, "ours": 1.5} and "floor" not in told
    assert told["seconds"]["ours"] == {"minimum": 3, "p20": 3, "p50": 3, "p80": 3, "rounds": 9}
    assert row(1).to_json().keys().isdisjoint({"misses", "tax"})


def test_each_kind_has_its_baseline() -> None:
    few = {"quant_type": "nf4", "M": 1, "mode": "decoding"}
    assert Row(**few).baseline == "stream"
    assert Row(**{**few, "M": 512}).baseline == Row(**{**few, "mode": "step"}).baseline == "dense"
    assert Row(what="DoRA").baseline == "PEFT's LoRA"
    assert Row(what="switching").baseline == "PEFT's"
    assert Row(M=1, mode="step").baseline == "frozen"


@pytest.mark.parametrize(("others", "loaded"), [(0.5, False), (0.51, True)])
def test_load_at_the_margin_is_the_bench_s(
    others: float, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (torch.get_num_threads() + others, 9.0, 9.0))
    each = row(1, frozen=1)
    each.note_load()
    assert each.under_load is loaded


def test_summary_compares_like_with_like() -> None:
    """PEFT's float32 adapters with ours, its several adapters with as many, its LoRA with LoRA."""
    ours = {"ours": 2, "ours, fp32 adapters": 3, "LoRA": 4, "ours, 4": 9}
    peers = {"peft": 6, "peft, 16-bit adapters": 8, "PEFT's LoRA": 5, "PEFT's, 4": 6, "dense": 1}
    each = row(1, frozen=1, stream=1, **ours, **peers)
    found = {name: pairs[0][0] for name, pairs in ratios([each]).items()}
    want = {"peft": 3, "peft, 16-bit adapters": 2, "PEFT's LoRA": 4, "PEFT's, 4": 9, "dense": 2}
    assert found == {name: t / peers[name] for name, t in want.items()}
    # Ours in another dtype does not stand in for one that is wrong.
    del each.seconds["ours, fp32 adapters"]
    assert ratios([each])["peft"][0][0] == 2 / 6
    each.misses = {"ours, fp32 adapters": ""}
    assert "peft" not in ratios([each])


@pytest.mark.parametrize("others", [0.2, 1.7])
def test_rows_timed_under_load_are_marked(
    others: float, run: Any, no_overhead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, loaded = torch.get_num_threads(), others > 1
    monkeypatch.setattr(os, "getloadavg", lambda: (threads + others, 0.0, 0.0))
    ran = run(*SMALL)
    assert {(each["load"], each["own_load"]) for each in ran.rows} == {(threads + others, threads)}
    assert [each["under_load"] for each in ran.rows] == [loaded] * 3
    said = f"under load: {threads + others:.1f}, the bench {threads}\n"
    assert ran.out.count(said) == 3 * loaded
    assert ("3 of 3 rows were timed under load" in ran.out) == loaded
    assert {each["under_load"] for each in ran.csv} == {str(loaded)}


@pytest.mark.parametrize(
    "wrong", ["--shapes 8x48", "--shapes 8x48x0", "--ranks 0", "--dropout nan", "--dtypes int8"]
)
def test_bad_arguments(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *wrong.split()])
    assert stopped.value.code == 2 and wrong.split()[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "unused",
    [
        "--variants --device cuda",
        "--variants --ranks 4",
        "--quant nf4 --dropout 0.1",
        "--count --device cuda",
        "--count --csv f.csv",
        "--count --quick",
        "--host --ranks 4",
        "--shapes 8x48x32 --model smollm2-135m",
        "--rows 4",
        "--quant nf4 --rows 4",
    ],
)
def test_nothing_is_measured_but_what_was_asked_for(
    unused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *unused.split()]) == 2
    out = capsys.readouterr().err
    option = [word for word in unused.split() if word.startswith("--")][-1]
    assert option in out and "beside it" in out and out.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "has_gpu", "device"),
    [
        ("--quick", True, "cuda"),
        ("--quick", False, "cpu"),
        ("--quick --device cpu", True, "cpu"),
        ("--quant nf4", True, "cuda"),
        ("--head", True, "cpu"),  # times nothing on a GPU
    ],
)
def test_bench_runs_on_a_gpu_if_there_is_one(
    options: str, has_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def record(suite: Any, args: Any) -> Any:
        devices.append(args.device)
        return SimpleNamespace(rows=[])

    monkeypatch.setattr(command, "measure", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    cli.main(["bench", *options.split()])
    assert devices == [device]


def test_bench_without_pandas_ends_before_it_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setattr(command, "measure", None)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--quick"])
    assert "lora-kernels bench: needs pandas: pip install" in capsys.readouterr().err


def test_floor_and_target() -> None:
    case, each = Case(M=256, N=4096, K=1024, R=8), 8 / 1024 + 8 / 4096
    assert dense.floor(case, "forward") == 1 + each
    assert dense.floor(case, "backward") == 1 + 2 * each
    assert dense.target(case, "step") == pytest.approx(1 + 3 * each + 0.01)


def test_peft_draws_a_new_mask_each_call() -> None:
    args = cases.inputs(Case(9, 33, 47, 5, dropout_p=0.1))
    first, second = (cases.run(baselines.peft(args), args)["y"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_seconds_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is measured."""
    with pytest.raises(SystemExit):
        cli.main(["bench", f"--seconds={value}"])
    assert f"got '{value}', want a finite number of seconds" in capsys.readouterr().err


def test_rates_are_the_faster_of_those_before_and_after_the_rows(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor whose clock rises within a run would reach more than its peak."""
    names = ("copy_bandwidth", "read_bandwidth", "product_peak", "peak")
    rates = dict(zip(names, ((1e9, 2e9), (4e9, 3e9), (5e9, 6e9), (7e9, 8e9)), strict=True))
    for name, measured in rates.items():
        left = iter(measured)
        monkeypatch.setattr(timing, name, lambda *args, left=left, **kwargs: next(left))
    options = ("--shapes", "8x48x32", "--ranks", "3", "--dtypes", "float32", "--seconds", "0")
    facts = run(*options).data["provenance"]
    assert facts["copy_bandwidth"] == 2e9 and facts["read_bandwidth"] == 4e9
    assert facts["product_peak"] == {"float32": 6e9} and facts["peak"] == {"float32": 8e9}
