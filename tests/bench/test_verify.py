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
from lora_kernels.backends.cpu import heuristics
from lora_kernels.bench import baselines
from lora_kernels.bench.functions import Function
from lora_kernels.core import device
from lora_kernels.oracle import case as cases
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

    @contextmanager
    def engine(name: str) -> Iterator[None]:
        forced.append(name)
        yield

    def judged(case: Case, *outputs: str) -> dict[str, Comparison]:
        few = forced[-1] != "avx2"
        wrong = [output for output in outputs if (case.M, few, output) == fault]
        return {output: verdict(3.0 if output in wrong else 1.0, 1.0) for output in outputs}

    monkeypatch.setattr(verify, "FEW_ROWS", (1, 66, 96, 40))
    monkeypatch.setattr(cases, "engine", engine)
    monkeypatch.setattr(cases, "judge", lambda case: judged(case, "y", "dx", "dB"))
    monkeypatch.setattr(cases, "judge_norm", lambda case: judged(case, "norm"))
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
        verify, "judge_option", lambda *args: ({"ok": next(number) != wrong}, "a line")
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
    monkeypatch.setattr(cases, "fits_cuda", lambda case, strategy: True)
    assert verify.judge_option(THREE, (torch.bfloat16, None), option, engine) is not None
    assert tuple(seen) == shapes


@pytest.mark.parametrize(("quant", "strategy"), [("", "gemv"), ("nf4-64", "gemv_4bit")])
def test_calls_of_few_rows_are_judged_by_the_gemv_kernel_too(quant: str, strategy: str) -> None:
    few = heuristics.few_rows(torch.bfloat16, bool(quant), 66 * 96, isa="avx2")
    for M, kernels in ((0, 1), (1, 2), (few, 2), (few + 1, 1)):
        case = Case(M, 66, 96, 40, torch.bfloat16, quant=quant)
        assert verify._forced_engines("avx2", case) == ["avx2", f"avx2 {strategy}"][:kernels]


def test_the_worst_output_is_shown() -> None:
    """The one that uses most of its allowance, of either kind; NaN, and any error of none."""
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
        row, line = verify._line("avx2", dtypes, "plain", verdicts | more)
        assert (row["worst"], row["ok"]) == (worst, ok) and f"{'✓' if ok else '✗'} d" in line
        assert (row["dtype"], row["adapter_dtype"]) == ("bfloat16", "bfloat16")
    row, _ = verify._line("avx2", (torch.bfloat16, torch.float32), "plain", verdicts)
    assert row["adapter_dtype"] == "float32"


def test_peers_take_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    for unused in (["--engines", "eager"], ["--thorough"]):
        assert cli.main(["verify", "--peer", "peft", *unused]) == 2
        assert f"want no {unused[0]}" in capsys.readouterr().err


def test_stock_layers_are_in_training_mode_with_a_frozen_base() -> None:
    args = cases.inputs(Case(7, 64, 64, 40, bias=True))
    args |= {name: nn.Parameter(args[name].detach()) for name in ("lora_A", "lora_B")}
    layer: nn.Module = baselines.build_layer(args)
    assert layer.training
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
