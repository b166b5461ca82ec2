"""Somebody else's function: `verify --function` and `bench --baseline`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import cli
from lora_kernels.bench import dense, functions
from lora_kernels.oracle.case import Case

SOURCE = """
import time
import torch

def right(x, weight, lora_A, lora_B, scaling, bias=None):
    y = x @ weight.T + scaling * (x @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias.to(y.dtype)

def by_position(x, w, a, b, s):
    return right(x, w, a, b, s)

def any_number(*arguments):
    return right(*arguments)

def gated(x, weight, lora_A, lora_B, scaling, bias=None, *, rank_gate=None, column_scale=None):
    p = x @ lora_A.T if rank_gate is None else x @ lora_A.T * rank_gate.to(x.dtype)
    y = x @ weight.T + scaling * p @ lora_B.T
    y = y if column_scale is None else y * column_scale.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)

def off_by_a_percent(x, weight, lora_A, lora_B, scaling, bias=None):
    return right(x, weight, lora_A, lora_B, 1.01 * scaling, bias)

class WrongDA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return right(x, W, A, B, s)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        ds = ctx.s * dy @ B
        return dy @ W + ds @ A, None, 2 * ds.T @ x, ctx.s * dy.T @ (x @ A.T), None

def wrong_dA(x, weight, lora_A, lora_B, scaling):
    return WrongDA.apply(x, weight, lora_A, lora_B, scaling)

def slow(x, weight, lora_A, lora_B, scaling):
    time.sleep(0.005)
    return right(x, weight, lora_A, lora_B, scaling)

def raises(x, weight, lora_A, lora_B, scaling):
    raise RuntimeError("no kernel\\nfor it")

def four(x, weight, lora_A, lora_B): ...

compiled = torch.compile(right, backend="aot_eager")
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, which is not on the path."""
    (tmp_path / "foreign_kernel.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "foreign_kernel"
    sys.modules.pop("foreign_kernel", None)


def verify(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[dict[str, Any]]]:
    status = cli.main(["verify", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


F32 = ("--dtypes", "float32")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("right", ["plain", "bias"]),
        ("any_number", ["plain", "bias"]),
        ("by_position", ["plain"]),
        ("gated", ["plain", "bias", "gate", "column scale"]),
        ("compiled", ["plain", "bias"]),
    ],
)
def test_right_function_passes_with_the_operands_that_it_takes(name, options, module, capsys):
    status, rows = verify(capsys, "--function", f"{module}:{name}", "--device", "cpu", *F32)
    assert status == 0 and all(row["ok"] for row in rows)
    assert [row["option"] for row in rows] == options


@pytest.mark.parametrize(("name", "outputs"), [("off_by_a_percent", "y"), ("wrong_dA", "dA")])
def test_wrong_function_is_caught(name, outputs, module, capsys) -> None:
    status, rows = verify(capsys, "--function", f"{module}:{name}", "--device", "cpu")
    assert status == 1 and not any(row["ok"] for row in rows)
    assert [row["dtype"] for row in rows if row["option"] == "plain"] == [
        "float32",
        "bfloat16",
        "float16",
    ]
    if outputs == "dA":
        assert all(row["worst"].endswith("/dA") for row in rows)


def test_function_that_raises_is_a_row_with_its_error(module, capsys) -> None:
    status, (row,) = verify(capsys, "--function", f"{module}:raises", "--device", "cpu", *F32)
    assert status == 1 and row["verdict"] == "RuntimeError: no kernel"


def test_adapters_of_another_dtype_are_asked_for(module, capsys) -> None:
    options = "--function", f"{module}:by_position", "--adapter-dtype", "float32"
    status, rows = verify(capsys, *options, "--dtypes", "float32", "bfloat16", "--device", "cpu")
    assert [row["adapter_dtype"] for row in rows] == ["float32"] * 2
    assert [row["ok"] for row in rows] == [True, False] and status == 1


BAD = {
    "foreign_kernel": "got 'foreign_kernel', want module:name",
    "foreign_kernel:none": "got 'foreign_kernel:none', want a name in foreign_kernel, which has no",
    "foreign_kernel:number": "got int foreign_kernel:number, want a function",
    "foreign_kernel:four": "got four(x, weight, lora_A, lora_B), want a function of x, weight,",
    "missing_module:f": "ModuleNotFoundError: No module named 'missing_module'",
}


@pytest.mark.parametrize("path", BAD)
def test_bad_path_ends_in_one_line(path: str, module: str, capsys) -> None:
    assert cli.main(["verify", "--function", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-kernels verify: --function: {BAD[path]}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--baseline", path])
    assert ended.value.code == 2 and BAD[path] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("verify", "--dtypes", "float32"),
        ("verify", "--device", "cpu"),
        ("verify", "--function", "foreign_kernel:right", "--engines", "cpu"),
        ("verify", "--function", "foreign_kernel:right", "--peer", "peft"),
        ("bench", "--baseline", "foreign_kernel:right", "--dropout", "0.1"),
        ("bench", "--baseline", "foreign_kernel:right", "--count"),
    ],
)
def test_options_without_effect_are_refused(options, module, capsys) -> None:
    assert cli.main([*options]) == 2
    assert "want" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "status"), [("slow", 0), ("off_by_a_percent", 1), ("wrong_dA", 1), ("raises", 1)]
)
def test_baseline_is_checked_and_timed_beside_ours(
    name, status, module, quick, no_overhead, capsys
) -> None:
    path = f"{module}:{name}"
    options = ["--shapes", "32x64x64", "--ranks", "4", "--dtypes", "float32", "--seconds", "0.05"]
    assert cli.main(["bench", *options, "--baseline", path]) == status
    said = " ".join(capsys.readouterr().out.split())
    assert f"{path} " in said
    assert (f"✗ {path}: y MISS" in said or f"✗ {path}: dA MISS" in said) is (
        status == 1 and name != "raises"
    )
    assert (f"✗ {path}: RuntimeError: no kernel" in said) is (name == "raises")


def test_function_is_timed_from_python(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = functions.load(f"{module}:slow")
    rows = dense.measure(Case(M=32, N=64, K=64, R=4), 0.05, functions={"slow": slow})
    step = next(row for row in rows if row.mode == "step")
    assert not step.misses and step.seconds["slow"].p50 >= 0.005
    assert torch.is_grad_enabled()


def test_shapes_of_a_function_are_those_alone_that_are_named(module, capsys) -> None:
    options = "--function", f"{module}:off_by_a_percent", "--device", "cpu", *F32
    status, rows = verify(capsys, *options, "--shapes", "33x35x64", "--ranks", "3", "5")
    assert status == 1 and [row["option"] for row in rows] == ["plain", "bias"]
    for row in rows:
        names = [*(miss["case"] for miss in row["misses"]), *row["other_misses"]]
        assert sorted(name[:17] for name in names) == ["M33-N64-K35-R3-fl", "M33-N64-K35-R5-fl"]


def test_miss_is_told_with_its_case_errors_and_cause(module, capsys) -> None:
    path = f"{module}:wrong_dA"
    options = "--device", "cpu", *F32, "--shapes", "33x35x64", "--ranks", "3"
    status, (row,) = verify(capsys, "--function", path, *options)
    assert status == 1 and row["other_misses"] == [] and row["note"] is None
    (miss,) = row["misses"]
    assert [miss[name] for name in "MKNR"] == [33, 35, 64, 3] and miss["operands"] == []
    assert miss["options"] == "--shapes 33x35x64 --ranks 3"
    ok = {name: output["ok"] for name, output in miss["outputs"].items()}
    assert ok == {"y": True, "dx": True, "dA": False, "dB": True}
    wrong, right = miss["outputs"]["dA"], miss["outputs"]["dB"]
    assert wrong["cause"] == "dA is 2.00 times what it should be" and right["cause"] is None
    assert abs(wrong["rms"] - 1) < 1e-3 and 0 < wrong["eager_rms"] < wrong["rms_limit"] < 1e-5
    assert cli.main(["verify", "--function", path, *options]) == 1
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(
        "M = 33, K = 35, N = 64, R = 3; x float32, adapters float32 (--shapes 33x35x64 --ranks 3)"
    )
    assert [line[:4] for line in lines[at + 1 :]][:5] == ["✓ y ", "✓ dx", "✗ dA", "dA i", "✓ dB"]
    assert "100 %  eager " in lines[at + 3]
    assert lines[at + 4] == "dA is 2.00 times what it should be"
