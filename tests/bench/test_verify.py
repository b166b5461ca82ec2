"""`verify`: its lines and its bar, and whole layers beside a peer's."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import cli, verify
from lora_kernels.backends.cpu import heuristics, native
from lora_kernels.bench import baselines
from lora_kernels.bench.functions import Function
from lora_kernels.core import device
from lora_kernels.oracle import case as cases
from lora_kernels.oracle import diagnosis
from lora_kernels.oracle.case import Case
from lora_kernels.oracle.tolerance import Comparison

pytest.importorskip("peft")


def test_verify_prints_a_line_for_each_check_that_its_head_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"plain": {}, "nf4": {"quant": "nf4-64-nested"}, "adapters": {}}
    monkeypatch.setattr(verify, "OPTIONS", options)
    monkeypatch.setattr(verify, "DTYPES", ((torch.float32, None),))
    assert cli.main(["verify", "--engines", "eager"]) == 0
    lines = capsys.readouterr().out.splitlines()
    legend = len(verify.LEGEND.splitlines())
    # eager and eager-gpu; a legend, a head, a count of the checks and one of the results
    assert lines[0] == "6 checks" and len(lines) - legend - 3 == 2 * 3


@pytest.mark.parametrize("peer", list(verify.PEERS))
def test_peers(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(peer)
    assert cli.main(["verify", "--peer", peer, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["dtype"], row["bias"]) for row in rows} == {
        (dtype, bias) for dtype in ("float32", "bfloat16") for bias in (False, True)
    }
    for row in rows:
        assert row["ok"] and row["not_fused"] is None
        assert list(row["ours"]) == list(row["theirs"]) == ["y", "dx", "dA", "dB"]
        # Two programs, which add in different orders.
        assert all(row["ours"][name]["rms"] != row["theirs"][name]["rms"] for name in ("dA", "dB"))
        # A layer of the peer's with other numbers in it would be wrong everywhere.
        for name, theirs in row["theirs"].items():
            assert 0 < theirs["rms"] < 4 * row["ours"][name]["rms_limit"]


def test_peers_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--peer", "peft"]) == 0
    out = capsys.readouterr().out
    assert "peft          bfloat16  70×128×192 r=13, bias   ✓ y " in out
    assert re.search(r"\n8 of 8 within the tolerance, \d+ s\n$", out)


def test_a_wrong_layer_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_kernels import peft

    plain = peft.fuse

    def doubled(model: Any) -> Any:
        plain(model)[0].scaling["default"] *= 2
        return model

    monkeypatch.setattr(peft, "fuse", doubled)
    assert cli.main(["verify", "--peer", "peft"]) == 1
    out = capsys.readouterr().out
    assert "MISS" in out and re.search(r"\n0 of 8 within the tolerance, \d+ s\n$", out)


def test_a_layer_that_is_not_fused_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """However right: it is the peer's own."""
    from lora_kernels import peft

    monkeypatch.setattr(peft, "fuse", lambda model: model)
    row, line = verify.compare_with_peer("peft", Case(7, 64, 64, 40, bias=True, frozen=("bias",)))
    assert row["not_fused"] and not row["ok"] and "not fused: " in line


@pytest.mark.parametrize(
    ("peer", "line"),
    [
        ("peft", "needs peft: INSTALL"),
        ("bitsandbytes", "needs peft and bitsandbytes: INSTALL bitsandbytes"),
    ],
)
def test_a_missing_peer_is_one_line(
    peer: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    assert cli.main(["verify", "--peer", peer]) == 2
    line = line.replace("INSTALL", device.install_command("peft"))
    assert capsys.readouterr().err == f"lora-kernels verify: --peer {peer} {line}\n"


def verdict(rms: float, largest: float, limit: float = 2.0) -> Comparison:
    return Comparison(rms, 0.0, limit, largest, 0.0, limit, 1.0)


# Where an engine is wrong: M, whether by its GEMV kernel, and the output.
FAULTS = [
    None,
    *itertools.product((70, 1), (False,), ("y", "dB", "norm")),
    *((1, True, output) for output in ("y", "dB", "norm")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("option", ["plain", "nf4"])
def test_an_engine_that_is_wrong_in_one_place_alone_is_seen(
    option: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are judged twice, also by the GEMV kernel: neither verdict hides the other."""
    forced: list[str] = []
    entered: list[str] = []

    @contextmanager
    def engine(name: str) -> Iterator[None]:
        forced.append(name)
        entered.append(name)
        yield
        entered.pop()

    def diagnose(*args: Any, **kwargs: Any) -> dict[str, Any]:
        assert entered, "the engine that missed is diagnosed, and no other"
        return {}

    def judged(case: Case, *outputs: str) -> dict[str, Comparison]:
        few = forced[-1] != "avx2"
        wrong = [output for output in outputs if (case.M, few, output) == fault]
        return {output: verdict(3.0 if output in wrong else 1.0, 1.0) for output in outputs}

    monkeypatch.setattr(verify, "FEW_ROWS", (1, 66, 96, 40))
    monkeypatch.setattr(cases, "engine", engine)
    monkeypatch.setattr(cases, "judge", lambda case: judged(case, "y", "dx", "dB"))
    monkeypatch.setattr(cases, "judge_norm", lambda case: judged(case, "norm"))
    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    found = verify.judge_option(verify.SHAPES, (torch.float32, None), option, "avx2")
    assert found is not None and found[0]["ok"] is (fault is None)
    assert len(set(forced)) == 2
    if fault is not None:
        M, few, output = fault
        worst = found[0]["worst"]
        assert worst.startswith(f"M{M}-") and worst.endswith(f"/{output}")
        assert (", few rows/" in worst) is few and " MISS: " in found[1]


@pytest.mark.parametrize("place", [0, -1, None], ids=["first", "last", "none"])
@pytest.mark.parametrize("option", ["adapters", "experts nf4", "head", "plain"])
def test_an_op_that_is_wrong_in_one_case_alone_is_seen(
    option: str, place: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op of ours, or a function of the user's ("plain")."""
    shapes = *verify.SHAPES, *verify.LONG
    errors = [1.0 for _ in verify.OTHERS.get(option.partition(" ")[0], shapes)]
    if place is not None:
        errors[place] = 3.0
    each = iter(errors)
    monkeypatch.setattr(
        cases, "judge", lambda case, *call: {"y": verdict(next(each), 1.0), "dA": verdict(1.0, 1.0)}
    )
    monkeypatch.setattr(diagnosis, "diagnose", lambda *case, **call: {})
    how = verify.SHAPES, (torch.float32, None), option
    if option == "plain":
        found = verify.judge_function(Function("mine", print, ()), "cpu", *how)
    else:
        found = verify.judge_option(*how, "eager")
    assert found is not None and found[0]["ok"] is (place is None)


class BlockSums(torch.autograd.Function):
    """`lora_linear` whose GEMMs add blocks of a sum in float32, and round some sums after each."""

    @staticmethod
    def forward(
        ctx: Any, sums: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        p = (x.float() @ A.float().t()).to(x.dtype)
        ctx.save_for_backward(x, W, A, B, p)
        ctx.sums, ctx.s = sums, s
        return (sums("y", x, W.t()) + s * p.float() @ B.float().t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B, p = ctx.saved_tensors
        ds = (ctx.s * dy.float() @ B.float()).to(x.dtype)
        dx = ctx.sums("dx", dy, W) + ds.float() @ A.float()
        dA, dB = ctx.sums("dA", ds.t(), x), ctx.s * ctx.sums("dB", dy.t(), p)
        return None, dx.to(x.dtype), None, dA.to(x.dtype), dB.to(x.dtype), None


def judge_block_sums(dtype: torch.dtype, block: int, wrong: str = "") -> dict[str, Any]:
    """verify's row of a function that sums in blocks. wrong: the output whose sums it rounds."""
    narrow = torch.bfloat16 if dtype is torch.float32 else dtype

    def sums(output: str, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(a.shape[0], b.shape[1])
        for start in range(0, a.shape[1], block):
            part = slice(start, start + block)
            total += a[:, part].float() @ b[part].float()
            if output == wrong:
                total = total.to(narrow).float()
        return total

    def call(*operands: Any) -> Tensor:
        return BlockSums.apply(sums, *operands)  # type: ignore[no-any-return]

    function = Function("mine", call, frozenset())
    row, _ = verify.judge_function(function, "cpu", verify.SHAPES, (dtype, None), "plain")
    return row


DTYPES = [dtype for dtype, adapter in verify.DTYPES if adapter is None]


@pytest.mark.parametrize(
    ("wrong", "block"), [("y", 16), ("y", 32), *itertools.product(("y", "dx", "dA", "dB"), (64,))]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_name)
def test_function_that_rounds_its_sums_to_16_bits_is_a_miss(
    dtype: torch.dtype, wrong: str, block: int
) -> None:
    row = judge_block_sums(dtype, block, wrong)
    assert not row["ok"] and row["worst"].endswith(f"/{wrong}")
    assert "4099" in row["worst"] or dtype is torch.float32


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_name)
def test_function_that_adds_float32_sums_of_blocks_is_within_the_tolerance(
    dtype: torch.dtype, block: int
) -> None:
    assert judge_block_sums(dtype, block)["ok"]


@pytest.mark.parametrize("wrong", [None, 0, 1], ids=["none", "first", "last"])
def test_one_row_beyond_the_tolerance_is_the_exit_status(
    wrong: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = itertools.count()
    monkeypatch.setattr(verify, "OPTIONS", {"plain": {}, "bias": {}})
    monkeypatch.setattr(verify, "DTYPES", ((torch.float32, None),))
    monkeypatch.setattr(
        verify, "judge_option", lambda *args, **_: ({"ok": next(number) != wrong}, "a line")
    )
    assert cli.main(["verify", "--engines", "eager-"]) == (0 if wrong is None else 1)
    assert f"\n{1 if wrong is not None else 2} of 2 within" in capsys.readouterr().out


CUDA = "cuda two_pass"
THREE = (*verify.SHAPES, (33, 259, 257, 64))


@pytest.mark.parametrize(
    ("engine", "option", "shapes"),
    [
        ("avx2", "plain", THREE),
        ("avx2", "nf4", (THREE[0], verify.FEW_ROWS, THREE[2])),
        ("eager cuda", "fp4, all", (THREE[0], verify.FEW_ROWS, THREE[2])),
        (CUDA, "nf4", (*verify.CUDA_SHAPES, THREE[2])),
        ("triton fused", "plain", THREE),
    ],
)
def test_every_shape_of_an_option_is_judged(
    engine: str, option: str, shapes: verify.Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[int, ...], None] = {}

    def judge(case: Case) -> dict[str, Comparison]:
        seen[case.M, case.N, case.K, case.R] = None
        return {"y": verdict(1.0, 1.0)}

    monkeypatch.setattr(cases, "engine", lambda name: nullcontext())
    monkeypatch.setattr(cases, "judge", judge)
    monkeypatch.setattr(cases, "judge_norm", lambda case: {})
    monkeypatch.setattr(cases, "unsupported_reason", lambda name, case: None)
    assert verify.judge_option(THREE, (torch.bfloat16, None), option, engine) is not None
    assert tuple(seen) == shapes


@pytest.mark.skipif(native.module is None, reason="the native kernels were not built")
@pytest.mark.parametrize(("quant", "strategy"), [("", "gemv"), ("nf4-64", "gemv_quantized")])
def test_calls_of_few_rows_are_judged_by_the_gemv_kernel_too(quant: str, strategy: str) -> None:
    few = heuristics.few_rows(torch.bfloat16, bool(quant), 66 * 96, isa="avx2")
    for M, kernels in ((0, 1), (1, 2), (few, 2), (few + 1, 1)):
        case = Case(M, 66, 96, 40, torch.bfloat16, quant=quant)
        assert verify._forced_engines("avx2", case) == ["avx2", f"avx2 {strategy}"][:kernels]


def judged(verdicts: dict[str, Comparison]) -> list[verify.Judged]:
    """One case, whose name stands before the slash, for each verdict."""
    return [
        verify.Judged(Named(name.partition("/")[0]), {name.partition("/")[2]: v}, lambda names: {})  # type: ignore[arg-type]
        for name, v in verdicts.items()
    ]


class Named(str):
    """A case that is only a name."""


def test_the_worst_output_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that uses most of its allowance, of either kind; NaN, and any error of none."""
    monkeypatch.setattr(cases, "in_words", str)
    verdicts = {"a/y": verdict(1.0, 1.5), "a/dx": verdict(1.8, 0.0), "a/dA": verdict(0.5, 1.7)}
    for more, worst, ok in (
        ({}, "a/dx", True),
        ({"b/dB": verdict(2.5, 0.0)}, "b/dB", False),
        ({"b/dB": verdict(0.0, math.nan)}, "b/dB", False),
        ({"b/dB": verdict(0.0, 0.0, 0.0)}, "a/dx", True),
        ({"b/dB": verdict(1e-9, 0.0, 0.0)}, "b/dB", False),
        ({"b/dB": verdict(1e-9, 0.0, math.inf)}, "b/dB", False),
        ({"b/dB": verdict(0.0, 2.0 + 1e-9)}, "b/dB", False),
        ({"b/dB": verdict(2.0, 2.0)}, "b/dB", True),
    ):
        dtypes = torch.bfloat16, None
        row, line = verify._line("avx2", dtypes, "plain", judged(verdicts | more))
        assert (row["worst"], row["ok"]) == (
            worst,
            ok,
        ) and f"{'✓' if ok else '✗'} d" in line.splitlines()[0]
        assert (row["dtype"], row["adapter_dtype"]) == ("bfloat16", "bfloat16")
    row, _ = verify._line("avx2", (torch.bfloat16, torch.float32), "plain", judged(verdicts))
    assert row["adapter_dtype"] == "float32"


def test_peers_take_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--shapes", "8x64x64"]
    for unused in (["--engines", "eager"], ["--thorough"], shapes, ["--ranks", "8"]):
        assert cli.main(["verify", "--peer", "peft", *unused]) == 2
        assert f"want no {unused[0]}" in capsys.readouterr().err


def test_stock_layers_are_in_training_mode_with_a_frozen_base() -> None:
    args = cases.inputs(Case(7, 64, 64, 40, bias=True))
    args |= {name: nn.Parameter(args[name].detach()) for name in ("lora_A", "lora_B")}
    layer: nn.Module = baselines.build_layer(args)
    assert layer.training
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}


def shaped(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[Any], str]:
    """Run `verify --json`; return the status, the rows and stderr."""
    status = cli.main(["verify", "--json", *options])
    out, err = capsys.readouterr()
    return status, json.loads(out or "[]"), err


def test_named_shapes_replace_the_default_ones_of_an_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[tuple[int, ...], None] = {}
    judge = cases.judge

    def note(case: Any) -> dict[str, Comparison]:
        seen[case.M, case.K, case.N, case.R] = None
        return judge(case)

    monkeypatch.setattr(cases, "judge", note)
    monkeypatch.setattr(verify, "DTYPES", ((torch.float32, None),))
    some = ("plain", "nf4", "adapters", "experts", "head")
    monkeypatch.setattr(verify, "OPTIONS", {name: verify.OPTIONS[name] for name in some})
    options = "--engines", "eager", "--shapes", "6x64x33", "3x32x9", "--ranks", "2", "5"
    status, rows, _ = shaped(capsys, *options)
    assert status == 0 and {row["option"] for row in rows} == {"plain", "nf4"}
    assert [*seen] == [(6, 64, 33, 2), (6, 64, 33, 5), (3, 32, 9, 2), (3, 32, 9, 5)]
    assert shaped(capsys, "--engines", "eager-", "--shapes", "6x64x33")[0] == 0
    assert [*seen][-1] == (6, 64, 33, 16)


def test_named_shape_that_an_engine_cannot_run_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "DTYPES", ((torch.float32, None),))
    monkeypatch.setattr(verify, "OPTIONS", {"mxfp4": verify.OPTIONS["mxfp4"]})
    options = "verify", "--engines", "eager-", "--shapes", "3x40x8"
    reason = "K = 40 is no multiple of mxfp4's blocks of 32"
    assert cli.main([*options, "3x64x8"]) == 0
    out = capsys.readouterr().out
    assert f"left out: 3x40x8 rank 16: {reason}" in out
    assert "1 of 1 within the tolerance, 1 left out" in out
    assert cli.main([*options]) == 2  # nothing was checked
    out, err = capsys.readouterr()
    assert reason in out and "– not checked" in out and "nothing was checked" in err


@pytest.mark.parametrize(
    ("engine", "fields", "reason"),
    [
        ("cuda two_pass", {"K": 63}, "K = 63 is no multiple of 8"),
        ("triton fused", {"R": 65}, "R = 65 is above 64"),
        ("avx2", {"R": 257}, "R = 257 is above the kernels' 256"),
        ("eager", {"R": 257}, None),
    ],
)
def test_unsupported_reason_names_the_size(
    engine: str, fields: dict[str, int], reason: str | None
) -> None:
    found = cases.unsupported_reason(
        engine, Case(**{**dict(M=3, N=64, K=64, R=8), **fields}, dtype=torch.bfloat16)
    )
    assert found == reason or (reason and found and found.startswith(reason))


def test_dtype_that_an_engine_never_takes_is_no_shape_left_out() -> None:
    found = verify.judge_option(
        ((3, 64, 64, 8),), (torch.float32, None), "plain", CUDA, is_named=True
    )
    assert found is None


@pytest.mark.parametrize(
    "options", [("--thorough", "--shapes", "8x64x64"), ("--ranks", "8")], ids=" ".join
)
def test_shapes_options_without_effect_are_refused(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *options]) == 2
    assert re.search("--(shapes|ranks): want ", capsys.readouterr().err)


def test_cases_that_miss_no_other_output_are_counted() -> None:
    def miss(name: str, error: float, *outputs: str) -> verify.Judged:
        verdicts = {o: verdict(error if o in outputs else 1.0, 1.0) for o in ("y", "dx", "dB")}
        return verify.Judged(Case(3, 5, 4, 2, seed=ord(name)), verdicts, lambda names: {})

    each = [miss("a", 3.0, "y"), miss("b", 9.0, "y", "dB"), miss("c", 4.0, "dx"), miss("d", 1.0)]
    row, text = verify._line("mine", (torch.float32, None), "plain", each, note="a note")
    assert [m["case"][-2:] for m in row["misses"]] == ["98", "99"] and len(row["other_misses"]) == 1
    lines = [line.strip() for line in text.splitlines()]
    assert lines[1].startswith("M = 3, K = 4, N = 5, R = 2; x float32, adapters float32")
    assert lines[1].endswith("(--shapes 3x4x5 --ranks 2)")
    assert "1 more of its 4 cases miss, in no other output" in lines and lines[-1] == "a note"
    outputs = row["misses"][0]["outputs"]
    assert [outputs[name]["ok"] for name in ("y", "dx", "dB")] == [False, True, False]


def test_check_that_was_left_out_is_no_miss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that passes; alone, nothing was checked."""
    rows = iter([({"ok": None, "left_out": {"a": "why"}}, "left"), ({"ok": True}, "right")])
    monkeypatch.setattr(verify, "judge_option", lambda *args, **options: next(rows, None))
    assert cli.main(["verify", "--shapes", "8x64x64"]) == 0
    assert "1 of 1 within the tolerance, 1 left out" in capsys.readouterr().out


def test_largest_error_alone_is_said_to_miss() -> None:
    judged = verify.Judged(Case(3, 5, 7, 2), {"y": verdict(1.0, 3.0)}, lambda names: {})
    found = verify._line("engine", (torch.float32, None), "plain", [judged])
    assert "largest error 3, limit 2" in found[1]


def test_note_of_the_interpreter_is_of_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.triton, "is_interpreted", lambda: True)
    assert verify._note((torch.float32, None)) == ""
    assert verify._note((torch.bfloat16, None)) == verify.NOTE_BF16
