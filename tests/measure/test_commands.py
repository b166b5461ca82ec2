"""`bench` and `verify` as commands: what they print and write, and that they see a wrong result."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import cli, timing
from lora_kernels.measure import baselines, bench, bench_layers, models
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case

SMALL = ["bench", "--shapes", "8x48x32", "--ranks", "3", "24", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure and are not looked at here."""
    monkeypatch.setattr(timing, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype, **_: 1e9)
    monkeypatch.setattr(baselines, "no_compiler", lambda device: "torch.compile takes long")


NAMES = {"frozen", "ours", "addmm", "eager", "peft"}
SIXTEEN_BITS = NAMES | {"ours, fp32 adapters", "peft, 16-bit adapters"}


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, lines = tmp_path / "new" / "cpu.json", tmp_path / "new" / "cpu.csv"
    assert cli.main([*SMALL, "--json", str(file), "--csv", str(lines)]) == 0
    data = json.loads(file.read_text())
    each = [("decoding", "warm"), ("decoding", "cold")]
    each += [(mode, "warm") for mode in ("forward", "backward", "step")]
    assert [(row["mode"], row["cache"]) for row in data["rows"]] == each * 4  # ranks, dtypes
    for row in data["rows"]:
        names = SIXTEEN_BITS if row["dtype"] == "bfloat16" else NAMES
        assert set(row["tax"]) == set(row["seconds"]) == names
        for times in row["seconds"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert row["tax"]["frozen"] == 1 < row["floor"]
        aimed = row["R"] == 3 and row["mode"] != "backward" and row["cache"] == "warm"
        assert ("target" in row) == aimed
        assert row["correct"] and not row["misses"]
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
            for name, most in row["peak_bytes"].items():
                assert most >= row["bytes"][name] - x
    with lines.open(newline="") as text:
        flat = list(csv.DictReader(text))
    assert len(flat) == sum(len(row["seconds"]) for row in data["rows"])
    first, times = flat[0], data["rows"][0]["seconds"]["frozen"]
    assert (first["call"], first["result"], first["cache"]) == ("frozen", "ok", "warm")
    assert float(first["p50_ms"]) == times["p50"] * 1e3
    facts = data["provenance"]
    assert {"clocks_mhz", "processor", "threads", "commit", "python", "platform"} <= set(facts)
    assert {"torch", "peft", "transformers", "bitsandbytes", "triton", "numpy"} <= set(facts)
    modes = ("forward", "step")
    assert set(data["overhead_us"]) == {
        f"{name}, {mode}" for name in ("frozen", "ours", "addmm", "eager") for mode in modes
    }
    out = capsys.readouterr().out
    assert "float32 8×48×32 r=3 step: frozen" in out and "r=3 decoding, cold: frozen" in out
    assert "ms (p20/p50/p80), " in out and " of what the machine allows" in out
    assert "MiB held for the backward + most in a step: frozen" in out
    assert "torch.compile takes long" in out


def test_bench_of_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers' shapes; quick: fewer rows and one rank, unless others are named."""
    monkeypatch.setitem(models._MODELS, "smollm2-135m", models.Model(32, 16, 32, 48))
    asked: list[Case] = []
    monkeypatch.setattr(bench_layers, "measure", lambda case, *rest: asked.append(case) or [])
    quick = ["bench", "--model", "smollm2-135m", "--dtypes", "float32", "--quick"]
    monkeypatch.setattr(
        bench_layers, "overhead", lambda *rest: {"ours, forward": 0, "eager, forward": 0}
    )
    assert cli.main(quick) == 0
    shapes = [(32, 32), (32, 16), (32, 48), (48, 32)]
    want = [(M, K, N, 16) for M in bench.QUICK_ROWS for K, N in shapes]
    assert [(case.M, case.K, case.N, case.R) for case in asked] == want
    asked.clear()
    assert cli.main([*quick, "--rows", "7", "--ranks", "2", "3"]) == 0
    want = [(7, K, N, R) for K, N in shapes for R in (2, 3)]
    assert [(case.M, case.K, case.N, case.R) for case in asked] == want
    asked.clear()
    assert cli.main([*quick[:-1]]) == 0
    assert len(asked) == len(models.ROWS["cpu"]) * len(shapes) * len(bench.RANKS)
    for name in ("llama3-8b", "qwen3-8b", "smollm2-135m"):
        assert name in models.NAMES


@pytest.mark.slow  # compiles
def test_bench_of_torch_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    if (absence := baselines.no_compiler("cpu")) is not None:
        pytest.skip(absence)
    case = Case(8, 32, 48, 3, dropout_p=0.1)
    for row in bench_layers.measure(case, 0.01):
        assert row["tax"]["torch.compile"] > 0 and not row["misses"]


@pytest.mark.slow  # bitsandbytes' layers
def test_bench_of_4_bit_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    file = tmp_path / "nf4.json"
    command = ["bench", "--quant", "nf4", "--shapes", "1x64x96", "3x64x96", "--dtypes", "float32"]
    assert cli.main([*command, "--seconds", "0.01", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    sizes = [(row["M"], row["mode"], row["cache"]) for row in rows]
    caches = ("cold", "warm")
    want = [(M, "forward", cache) for M in (1, 3) for cache in caches] + [(3, "step", "cold")]
    assert sizes == want
    for row in rows:
        assert not row["misses"] and {"ours", "dense", "bitsandbytes, train"} <= set(row["seconds"])


def test_bench_with_dropout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--dropout", "0.1", "--dtypes", "float32"]) == 0
    rows = capsys.readouterr().out.partition("float32 8×48×32")[2]
    assert "peft" in rows and "addmm" not in rows  # which has none


def test_bench_times_no_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(args: dict[str, Any]) -> Any:
        return half_adapter

    monkeypatch.setattr(bench_layers, "ours", ours)
    assert cli.main([*SMALL, "--dtypes", "float32"]) == 1
    assert "ours ✗ (y MISS" in capsys.readouterr().out


def test_bench_of_variants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_kernels.measure.bench_variants.SIZES", (8, 48, 32))
    monkeypatch.setattr("lora_kernels.measure.bench_variants.SERVED", (48, 32))
    file = tmp_path / "variants.json"
    assert cli.main(["bench", "--variants", "--seconds", "0", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    each = ["row norm", "DoRA step", "q, k, v step", "q, k, v of a token"]
    each += ["16 adapters", "16 adapters", "three levels step"]
    assert [row["what"] for row in rows] == [*each, *each, "switching"]
    for row in rows[:-1]:
        assert set(row["seconds"]) == set(row["errors"]) and not row["misses"]
        assert row["errors"]["ours"] < 2.0 ** (-7 if row["dtype"] == "bfloat16" else -20)
    out = capsys.readouterr().out
    assert "over LoRA" in out and "over one" in out


def test_verify_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed is enough of the many, where everything is wrong."""
    monkeypatch.setattr(cases.judge, "__defaults__", (half_adapter,))
    monkeypatch.setattr("lora_kernels.measure.verify.SHAPES", ((33, 65, 63, 5),))
    monkeypatch.setattr("lora_kernels.measure.verify.OPTIONS", {"plain": {}})
    assert cli.main(["verify"]) == 1


def half_adapter(**args: Any) -> Tensor:
    return cases.plain_pytorch(**{**args, "scaling": args["scaling"] / 2})


@pytest.mark.parametrize(
    "wrong",
    [
        ["--shapes", "8x48"],
        ["--shapes", "8x48x0"],
        ["--ranks", "0"],
        ["--dropout", "nan"],
        ["--dtypes", "int8"],
    ],
    ids=" ".join,
)
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *wrong])
    assert stopped.value.code == 2
    assert wrong[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "unused",
    [
        ["--variants", "--device", "cuda"],
        ["--variants", "--ranks", "4"],
        ["--quant", "nf4", "--dropout", "0.1"],
        ["--memory", "--dtypes", "float16"],
        ["--shapes", "8x48x32", "--model", "smollm2-135m"],
        ["--rows", "4"],
        ["--quant", "nf4", "--rows", "4"],
    ],
    ids=" ".join,
)
def test_nothing_is_measured_but_what_was_asked_for(
    unused: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *unused]) == 2
    out = capsys.readouterr().out
    assert unused[-2] in out and "beside it" in out and out.count("\n") == 1


def test_floor_and_target() -> None:
    case = Case(M=256, N=4096, K=1024, R=8)
    assert bench_layers.floor(case, "forward") == 1 + 8 / 1024 + 8 / 4096
    assert bench_layers.floor(case, "backward") == 1 + 2 * (8 / 1024 + 8 / 4096)
    assert bench_layers.target(case, "step") == pytest.approx(
        1 + 3 * 8 * (1 / 1024 + 1 / 4096) + 0.01
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_addmm_and_peft_compute_the_same(dropout_p: float) -> None:
    """The peers are right without dropout; with it, PEFT draws a new mask each call."""
    args = cases.inputs(Case(9, 33, 47, 5, dropout_p=dropout_p))
    if dropout_p:
        first, second = (cases.run(baselines.peft(args), args)["y"] for _ in range(2))
        assert not torch.equal(first, second)
        return
    for make in (baselines.addmm, baselines.peft, baselines.eager):
        for name, verdict in cases.judge(
            Case(9, 33, 47, 5), lambda make=make, **kwargs: make(kwargs)(**kwargs)
        ).items():
            assert verdict.ok, (make.__name__, name, str(verdict))


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("command", ["bench", "tune"])
def test_seconds_that_are_none(
    command: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is measured."""
    with pytest.raises(SystemExit):
        cli.main([command, "--out", str(tmp_path / "out"), f"--seconds={value}"])
    assert f"got '{value}', want a finite number of seconds" in capsys.readouterr().err
