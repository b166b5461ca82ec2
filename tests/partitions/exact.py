"""Calls whose results are integers, so that one wrong element of any index is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import lora_kernels
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case
from lora_kernels.measure.tolerance import assert_exact
from lora_kernels.quantization import Weight4bit, quantize_4bit
from tests.quantization.values import special

# With dropout one half, 1/(1 - p) is 2 and everything stays an integer.
OPTIONS: dict[str, Any] = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.5}

# How a weight's last block of 64 ends. A short one is divided by its scale, which is never 0, and a
# whole one multiplied by the reciprocal: of "apart" the codes differ, of "zeros" the scale.
LAST_BLOCKS = ("zeros", "apart", "short")


def weight_of_blocks(blocks: int, last: str) -> torch.Tensor:
    """[1, 64 · blocks] in float32, or 5 elements less."""
    values = special("nf4")
    values, apart = values.repeat(-(-blocks * 64 // values.numel()))[: blocks * 64], values[:64]
    if last == "short":
        return values[None, :-5]
    values[-64:] = apart if last == "apart" else 0
    return values[None]


def inputs(case: Case, blocksize: int = 0) -> dict[str, Any]:
    """The arguments of a case of integers, its weight dense or in 4-bit blocks of 1, 2, 4, 8, …

    Neighbouring blocks have other scales, and codes stand for -1, 0 and 1: so their products are
    exact.
    """
    assert case.values == "integers"
    args = cases.inputs(case)
    if blocksize:
        flat = args["weight"].flatten()
        flat[::blocksize] = 1  # a block of zeros would have no scale
        flat *= 2.0 ** (torch.arange(flat.numel(), device=flat.device) // blocksize % 4)
        args["weight"] = quantize_4bit(flat.view(case.N, case.K), "nf4", blocksize, False)
    return args


def check(case: Case, blocksize: int = 0) -> None:
    """y and every gradient, each rounded once; dc of 16 bits is summed from a rounded z."""
    args = inputs(case, blocksize)
    ref = cases.oracle(args)
    got = cases.run(lora_kernels.lora_linear, cases.give_mask(args))
    for name in got.keys() - ({"dc"} if case.dtype is not torch.float32 else set()):
        assert_exact(got[name], ref[name].to(got[name].dtype), f"{case}, {blocksize}: {name}")


def off(t: Tensor) -> Tensor:
    """The same elements, the first of which lies one element behind an aligned address."""
    if t.dim() == 0:
        return t
    shifted = torch.cat([t.detach().new_zeros(1), t.detach().flatten()])[1:].view(t.shape)
    assert shifted.data_ptr() % 16
    return shifted.requires_grad_(t.requires_grad)


def check_alignment(case: Case, blocksize: int = 0) -> None:
    """Each argument alone is a view that breaks the alignment of 16 bytes."""
    args = cases.give_mask(inputs(case, blocksize))
    ref = cases.run(lora_kernels.lora_linear, args)
    given = {name: off(t) for name, t in args.items() if isinstance(t, Tensor)}
    if isinstance(weight := args["weight"], Weight4bit):
        for field in ("packed", "absmax", "code"):
            moved = dataclasses.replace(weight, **{field: off(getattr(weight, field))})
            given[f"weight {field}"] = moved  # type: ignore[assignment]
    for name, value in given.items():
        got = cases.run(lora_kernels.lora_linear, args | {name.partition(" ")[0]: value})
        for output in got.keys() - ({"dc"} if case.dtype is not torch.float32 else set()):
            assert_exact(got[output], ref[output], f"{case}, {name} off: {output}")
