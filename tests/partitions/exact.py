"""Calls whose results are integers, so that one wrong element of any index is seen."""

from __future__ import annotations

from typing import Any

import torch

import lora_kernels
from lora_kernels.measure import case as cases
from lora_kernels.measure.case import Case
from lora_kernels.measure.tolerance import assert_exact
from lora_kernels.quantization import quantize_4bit

# With dropout one half, 1/(1 - p) is 2 and everything stays an integer.
OPTIONS: dict[str, Any] = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.5}


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
