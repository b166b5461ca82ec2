"""`lora_experts_linear` by the grouped Triton kernels, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_kernels import lora_experts_linear, lora_linear
from lora_kernels.bench.case import run
from tests.support.experts import (
    ROWS,
    SIZES,
    ExpertsCase,
    check,
    check_exact,
    inputs,
    some_cases,
)
from tests.support.problems import bf16
from tests.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("device")
INTEGERS = ExpertsCase((), 0, 0, 0, values="integers", device=DEVICE)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", some_cases(SIZES[:1]), ids=str)
def test_lora_experts_linear_of_each_case_is_within_tolerance(case: ExpertsCase) -> None:
    check(replace(case, device=DEVICE))


def test_lora_experts_linear_of_integers_in_tiles_of_64_rows_is_exact() -> None:
    check_exact(replace(INTEGERS, rows=(70, 1, 0, 130, 65), N=72, K=136, R=70, dropout_p=0.5))


def test_lora_experts_linear_again_has_the_same_bits() -> None:
    case = ExpertsCase(ROWS, 96, 130, 8, dtype=bf16, dropout_p=0.1, device=DEVICE)
    assert_same(*(run(lora_experts_linear, inputs(case)) for _ in range(2)))


@pytest.mark.parametrize("quant", ["", "nf4-64"])
def test_lora_experts_linear_of_no_rows_has_zero_gradients(quant: str) -> None:
    case = ExpertsCase((0, 0), 32, 64, 8, tail=0, quant=quant, device=DEVICE)
    got = run(lora_experts_linear, inputs(case))
    assert got["y"].shape == (0, 32) and got["dx"].shape == (0, 64)
    for name, shape in (("dA", (2, 8, 64)), ("dB", (2, 32, 8)), ("dbias", (2, 32))):
        assert got[name].shape == shape and not got[name].any()


def test_lora_experts_linear_of_memory_with_nan_writes_all_of_each_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of no expert and gradients of an expert without rows are zeros, not what was there."""

    def spoil(t: Tensor) -> Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() else t

    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    args = inputs(ExpertsCase((0, 3, 0, 2), 33, 47, 3, tail=20, dropout_p=0.25, device=DEVICE))
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda *a, **k: spoil(new_empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))
        got = run(lora_experts_linear, args)
    assert not got["y"][5:].any() and not got["dx"][5:].any()
    for name in ("dA", "dB", "dbias"):
        assert not got[name][[0, 2]].any()
    assert_same(got, run(lora_experts_linear, args))


def test_lora_experts_linear_rows_of_no_expert_are_zeros_whatever_x_is() -> None:
    """NaN in those rows of x and dy reaches no result."""
    case = ExpertsCase((3, 2), 33, 64, 8, tail=3, dropout_p=0.25, device=DEVICE)
    args, spoiled = inputs(case), inputs(case)
    with torch.no_grad():
        spoiled["x"][5:] = torch.nan
        spoiled["dy"][5:] = torch.nan
    want, got = run(lora_experts_linear, args), run(lora_experts_linear, spoiled)
    assert not got["y"][5:].any() and not got["dx"][5:].any()
    assert_same(got, want)


def test_lora_experts_linear_of_an_expert_with_nan_spoils_its_rows_alone() -> None:
    """NaN in one expert's W, A and B, and in its rows, reaches no other expert's results."""
    case = ExpertsCase((3, 2, 4), 33, 64, 8, device=DEVICE)
    args, spoiled = inputs(case), inputs(case)
    with torch.no_grad():
        for name in ("weight", "lora_A", "lora_B"):
            spoiled[name][1] = torch.nan
        spoiled["x"][3:5] = torch.nan
        spoiled["dy"][3:5] = torch.nan
    want, got = run(lora_experts_linear, args), run(lora_experts_linear, spoiled)
    rows = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10])
    for name in want:
        own = rows if name in ("y", "dx") else [0, 2]
        assert torch.equal(got[name][own], want[name][own]), name


def test_lora_experts_linear_without_adapters_is_the_base() -> None:
    case = replace(INTEGERS, rows=ROWS, N=32, K=64, R=1)
    args = inputs(case)
    with torch.no_grad():
        args["lora_A"].zero_()
    want = run(lora_experts_linear, args)
    got = run(lora_experts_linear, args | {"lora_A": None, "lora_B": None})
    for name in ("y", "dx", "dbias"):
        assert torch.equal(got[name], want[name])


def test_lora_experts_linear_of_strided_arguments_has_the_same_bits() -> None:
    """Stacks with gaps or no contiguous dimension, x and dy with gaps, and int32 offsets."""
    args = inputs(ExpertsCase(ROWS, 32, 64, 8, dtype=bf16, dropout_p=0.25, device=DEVICE))
    want = run(lora_experts_linear, args)
    weight, offsets = args["weight"], args["offsets"]
    for name in ("x", "dy"):
        wide = torch.nn.functional.pad(args[name].detach(), (8, 8))[:, 8:-8]
        args[name] = wide.requires_grad_(name == "x")
    args["lora_A"] = args["lora_A"].detach().mT.contiguous().mT.requires_grad_()
    args["offsets"] = offsets.to(torch.int32).repeat_interleave(2)[::2]
    for strided in (
        weight.repeat_interleave(2, 0)[::2],
        weight.repeat_interleave(2, 2)[:, :, ::2],
    ):
        assert_same(run(lora_experts_linear, args | {"weight": strided}), want)


def test_lora_experts_linear_of_one_expert_has_the_bits_of_lora_linear() -> None:
    args = inputs(ExpertsCase((9,), 33, 64, 5, tail=0, dropout_p=0.25, device=DEVICE))
    got = run(lora_experts_linear, args)
    one = {n: t[0] if n in ("weight", "lora_A", "lora_B", "bias") else t for n, t in args.items()}
    dy = one.pop("dy")
    del one["offsets"], one["is_transposed"]
    y = lora_linear(**one)
    wanted = torch.autograd.grad(y, [args[n] for n in ("x", "lora_A", "lora_B", "bias")], dy)
    for a, b in zip(got.values(), [y, *wanted], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)
