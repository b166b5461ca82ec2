"""`bench` and `verify` as commands: what they print and write, and that they see a wrong result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import cli, functional
from lora_kernels.measure import bench, timing
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case

SMALL = ["bench", "--shapes", "8x48x32", "--ranks", "3", "24", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure and are not looked at here."""
    monkeypatch.setattr(timing, "copy_bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(timing, "product_peak", lambda dtype, **_: 1e9)


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "cpu.json"
    assert cli.main([*SMALL, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert len(data["rows"]) == 2 * 2 * 2  # ranks, dtypes, modes
    for row in data["rows"]:
        names = {"frozen", "ours", "addmm", "eager", "peft"}
        if row["dtype"] == "bfloat16":
            names |= {"ours, fp32 adapters", "peft, 16-bit adapters"}
        assert set(row["tax"]) == set(row["seconds"]) == names
        assert row["tax"]["frozen"] == 1 < row["floor"]
        assert (row["target"] is None) == (row["R"] == 24)
        assert row["correct"] and not row["misses"]
    assert set(data["overhead_us"]) == {
        f"{name}, {mode}" for name in ("frozen", "ours", "addmm", "eager") for mode in bench.MODES
    }
    assert "float32 8×48×32 r=3 step: frozen" in capsys.readouterr().out


def test_bench_with_dropout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--dropout", "0.1", "--dtypes", "float32"]) == 0
    rows = capsys.readouterr().out.partition("float32 8×48×32")[2]
    assert "peft" in rows and "addmm" not in rows  # which has none


def test_bench_times_no_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functional, "lora_linear", half_adapter)
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
        assert set(row["seconds"]) == set(row["errors"])
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


def test_floor_and_target() -> None:
    case = Case(M=256, N=4096, K=1024, R=8)
    assert bench.floor(case, "forward") == 1 + 8 / 1024 + 8 / 4096
    assert bench.target(case, "step") == pytest.approx(1 + 3 * 8 * (1 / 1024 + 1 / 4096) + 0.01)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_addmm_and_peft_compute_the_same(dropout_p: float) -> None:
    """The peers are right without dropout; with it, PEFT draws a new mask each call."""
    args = cases.inputs(Case(9, 33, 47, 5, dropout_p=dropout_p))
    if dropout_p:
        first, second = (cases.run(bench.peft(args), args)["y"] for _ in range(2))
        assert not torch.equal(first, second)
        return
    for make in (bench.addmm, bench.peft, bench.eager):
        for name, verdict in cases.judge(
            Case(9, 33, 47, 5), lambda make=make, **kwargs: make(kwargs)(**kwargs)
        ).items():
            assert verdict.ok, (make.__name__, name, str(verdict))
