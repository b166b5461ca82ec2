"""Calls whose results are exact: integers, unit matrices, masks; one wrong element is seen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.core import coding
from lora_kernels.core.dropout import dropout_mask
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import QuantizedWeight, quantize_4bit
from tests.support.assertions import assert_exact
from tests.support.problems import UNDROPPED

# With dropout one half, 1/(1 - p) is 2 and everything stays an integer.
OPTIONS: dict[str, Any] = UNDROPPED | {"dropout_p": 0.5}
SOME_OPTIONS: list[dict[str, Any]] = [{}, UNDROPPED, {"dropout_p": 0.5}]
# Of a 4-bit weight: N and K, type and blocks; rows of whole blocks and others.
FORMATS = [((65, 128), "nf4-64-nested"), ((33, 96), "fp4-32-nested"), ((33, 63), "nf4-64-nested")]
FORMATS += [((33, 96), "mxfp4-32-nested"), ((65, 112), "nvfp4-16-nested")]
FINITE = ("x", "weight", "lora_A", "lora_B", "bias", "column_scale", "dy")


def integers(*sizes: int, **fields: Any) -> Case:
    """-1, 0 and 1 everywhere, so that all sums are integers."""
    return Case(*sizes, values="integers", **fields)


def inputs(case: Case, blocksize: int = 0) -> dict[str, Any]:
    """The arguments of a case of integers, its weight dense or in 4-bit blocks of 1, 2, 4, 8, …

    Neighbouring blocks have other scales, and codes stand for -1, 0 and 1: so their products are
    exact.
    """
    assert case.values == "integers"
    args = cases.inputs(case)
    if blocksize:
        args["weight"] = quantize_integers(args["weight"], blocksize)
    return args


def quantize_integers(weight: Tensor, blocksize: int) -> QuantizedWeight:
    """Return a weight of -1, 0 and 1 in 4-bit blocks; neighbouring blocks have other scales."""
    flat = weight.flatten()
    flat[::blocksize] = 1  # a block of zeros would have no scale
    flat *= 2.0 ** (torch.arange(flat.numel(), device=flat.device) // blocksize % 4)
    return quantize_4bit(flat.view(weight.shape), "nf4", blocksize, False)


@functools.lru_cache(maxsize=1)  # enough for a loop over engines
def _problem(case: Case, blocksize: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    args = inputs(case, blocksize)
    return args, cases.oracle(args)


def check(case: Case, blocksize: int = 0, narrow: bool = False) -> None:
    """y and every gradient are the reference, rounded once.

    narrow: the dtype holds every sum of the case. Otherwise dc of 16 bits is left out: it is summed
    from a rounded z.
    """
    args, ref = _problem(case, blocksize)
    got = cases.run(lora_kernels.lora_linear, cases.give_mask(args))
    for name in got.keys() - ({"dc"} if case.dtype is not torch.float32 and not narrow else set()):
        want, where = ref[name].to(got[name].dtype), f"{case}, {blocksize}: {name}"
        if narrow:
            assert_exact(want, ref[name], f"{where} is no exact {case.dtype}; choose a seed")
        assert_exact(got[name], want, where)


def off(t: Tensor) -> Tensor:
    """Copy t so that it starts one element behind an aligned address."""
    if t.dim() == 0:
        return t
    shifted = torch.cat([t.detach().new_zeros(1), t.detach().flatten()])[1:].view(t.shape)
    assert shifted.data_ptr() % 16
    return shifted.requires_grad_(t.requires_grad)


def check_alignment(case: Case, blocksize: int = 0, refused: tuple[str, ...] = ()) -> None:
    """Each argument alone is a view that breaks the alignment of 16 bytes; no result changes.

    refused: the arguments that a forced backend then refuses.
    """
    args = cases.give_mask(inputs(case, blocksize))
    ref = cases.run(lora_kernels.lora_linear, args)
    given = {name: off(t) for name, t in args.items() if isinstance(t, Tensor)}
    if isinstance(weight := args["weight"], QuantizedWeight):
        for field in ("packed", "absmax", "code"):
            moved = dataclasses.replace(weight, **{field: off(getattr(weight, field))})
            given[f"weight {field}"] = moved  # type: ignore[assignment]
    for name, value in given.items():
        moved_args = args | {name.partition(" ")[0]: value}
        if name in refused:
            with pytest.raises(RuntimeError, match=r"cannot run here: .* aligned"):
                cases.run(lora_kernels.lora_linear, moved_args)
            continue
        got = cases.run(lora_kernels.lora_linear, moved_args)
        for output in got.keys() - ({"dc"} if case.dtype is not torch.float32 else set()):
            assert_exact(got[output], ref[output], f"{case}, {name} off: {output}")


def check_same_bits(case: Case, runs: int = 2) -> None:
    """The same call gives the same bits again."""
    args = cases.give_mask(cases.inputs(case))
    first, *others = (cases.run(lora_kernels.lora_linear, args) for _ in range(runs))
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]), name


# NaN whose bits are all set, of either sign: adding a half ulp to round them overflows.
NAN_OF_ALL_BITS = {"positive": 2**31 - 1, "negative": -1}


def check_spread(case: Case, where: str, value: float | Tensor) -> None:
    """An element that is not finite reaches those results that it reaches in plain PyTorch.

    value: a tensor of 32 bits keeps them in a float32 argument.
    """
    args = cases.inputs(case)
    with torch.no_grad():
        args[where].view(-1)[7 % args[where].numel()] = value
    got = cases.run(lora_kernels.lora_linear, args)
    for name, want in cases.run(cases.plain_pytorch, args).items():
        assert_exact(got[name].isfinite(), want.isfinite(), name)


def check_mask(
    sizes: tuple[int, int, int], p: float, dtype: torch.dtype, device: str = "cpu", rtol: float = 0
) -> None:
    """y, dx and dA see the mask of the reference, which is also the public one.

    sizes: M, K, R. A and B pick R columns of x at a time, so that y and dx show where it was
    dropped; dA sums the mask.
    """
    M, K, R = sizes
    rng = torch.tensor([-(2**50) + 3, 2**45 + 17], device=device)
    kept = dropout_mask(rng, M, K, p)
    given = cases.give_mask({"rng": rng, "x": kept, "dropout_p": p})
    dropout = {name: given[name] for name in given.keys() - {"x"}}
    if given["rng"] is rng:
        assert torch.equal(lora_kernels.dropout_mask(rng, M, K, p), kept)
    else:
        with pytest.raises(RuntimeError, match="PyTorch's dropout kernel"):
            lora_kernels.dropout_mask(rng, M, K, p)
    scale = torch.tensor(0.0 if p == 1.0 else 1 / (1 - p), dtype=torch.float32, device=device)
    scale = scale.to(dtype)
    for first in sorted({0, K - R}):
        pick = torch.eye(K, dtype=dtype, device=device)[first : first + R]
        x = torch.ones(M, K, dtype=dtype, device=device, requires_grad=True)
        W, A, B = torch.zeros_like(pick), pick.clone().requires_grad_(), pick[:, first : first + R]
        y = lora_kernels.lora_linear(x, W, A, B, **dropout)
        y.backward(torch.ones_like(y))
        want = kept[:, first : first + R] * scale
        for got in (y, x.grad @ pick.t()):
            torch.testing.assert_close(got, want, rtol=rtol, atol=0)
            assert_exact(got != 0, want != 0)
        # Multiples of one number up to M times it: exact up to the last rounding.
        assert_exact(A.grad != 0, (kept.sum(0) > 0).expand(R, K) & (scale > 0), "dA")


def check_reads_out_the_weight(
    sizes: tuple[int, int], quant: str, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Unit matrices read a 4-bit weight row by row in the forward, column by column in dx; few rows
    of x and many."""
    N, K = sizes
    kind, blocksize, *nested = quant.split("-")
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    weight = quantize_4bit(values, kind, int(blocksize), bool(nested)).to(device)
    A = torch.ones(3, K, dtype=dtype, device=device)
    B = torch.zeros(N, 3, dtype=dtype, device=device)
    is_double = weight.nested_absmax is not None
    for each in (weight, with_scales_at_a_tie(weight, dtype)) if is_double else (weight,):
        want = coding.dequantize(
            each.packed, each.scales(), each.code, int(blocksize), each.shape, dtype
        )
        for m in (slice(0, 4), slice(0, K)):
            x = torch.eye(K, dtype=dtype, device=device)[m]
            assert_exact(lora_kernels.lora_linear(x, each, A, B), want.t()[m], "y")
        x = torch.zeros(N, K, dtype=dtype, device=device, requires_grad=True)
        lora_kernels.lora_linear(x, each, A, B).backward(torch.eye(N, dtype=dtype, device=device))
        assert_exact(x.grad, want, "dx")


def with_scales_at_a_tie(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """Return a nested weight whose scales show in 16 bits whether their product was rounded.

    Each scale is halfway between 1 and the next number of 16 bits, and rounds to 1. An FMA, which
    does not round nested_code · nested_absmax, gives more than half, and that rounds up. One code
    stands for 1, so that some elements are such a scale. float32 shows its bits themselves.
    """
    tie = 1 + torch.finfo(torch.float16 if dtype is torch.float32 else dtype).eps / 2
    factor = 1 + torch.arange(1, 257, dtype=torch.float32) / 311
    absmax = torch.tensor(3.7, dtype=torch.float32)
    product = factor * absmax  # in [4, 8) from some factor on, so that `offset` is exact
    lost = factor.double() * absmax.double() - product.double()
    chosen = int(torch.where(product >= 4, lost, -1).argmax())
    offset = (tie - product[chosen].double()).float()
    assert lost[chosen] > 2.0**-23 and product[chosen] + offset == tie
    fields = {"nested_absmax": absmax, "nested_code": factor[chosen], "offset": offset}
    shapes = {name: torch.empty_like(getattr(weight, name)) for name in fields}
    return dataclasses.replace(
        weight, **{name: shape.fill_(fields[name]) for name, shape in shapes.items()}
    )
