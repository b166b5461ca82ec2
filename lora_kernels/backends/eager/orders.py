"""The order of a plain layer's GEMMs on a GPU, and kernels in place of its skinny GEMMs.

`lora_kernels.qualify` measures both on a card, and `choice.verdicts` sets `winners`. Without a
verdict, or where nothing else was faster, the base GEMM adds itself to the update, and PyTorch's
GEMMs run. `winners` is then empty, and only that is asked in a call.

The kernels sum in float32 and round once, as PyTorch's GEMMs do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, addmm, mm
from torch.nn.functional import linear

from ..library import mm_fp32
from . import products

# Whether a call was measured faster, by the index of its GPU, its dtype, and two shapes (`sizes`).
Wins = Callable[[int, torch.dtype, Sequence[int], Sequence[int]], bool]
# Name of an order or a skinny GEMM -> its calls that the other order, or the kernel, takes. Only
# names that won somewhere.
winners: dict[str, Wins] = {}

BASE_FIRST, P, DS, DA, DB = "base_first", "P", "dS", "dA", "dB"
SKINNY = (P, DS, DA, DB)


def is_faster(name: str, a: Tensor, b: Tensor) -> bool:
    """Return True if the other order, or the kernel, was measured faster for a and b.

    name: of `winners`: BASE_FIRST for x [M, K] and B [N, R], or one of SKINNY for its two factors,
        the wider first.
    """
    return winners[name](a.get_device(), a.dtype, a.shape, b.shape)


def sizes(name: str, a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int]:
    """Return M, N and K of BASE_FIRST; M, the wide dimension and the rank of a skinny GEMM.

    a, b: the shapes of the tensors that `is_faster` takes.

    >>> sizes(BASE_FIRST, (8192, 4096), (1024, 16)), sizes(P, (8192, 4096), (16, 4096))
    ((8192, 1024, 4096), (8192, 4096, 16))
    """
    rows, columns = a
    if name == BASE_FIRST:
        return rows, b[0], columns
    return rows, columns, b[0] if name == P else b[1]


def down_projection(x: Tensor, lora_A: Tensor) -> Tensor:
    """Return P = x·Aᵀ [M, R] in the dtype of x [M, K] and A [R, K]."""
    if P in winners and is_faster(P, x, lora_A):
        return shrink(x, lora_A, 1.0, x.new_empty(x.shape[0], lora_A.shape[0]))
    return linear(x, lora_A)


def gradient_S(dy: Tensor, lora_B: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """Return dS = scaling·dy·B [M, R], in `out` if given, for dy [M, N] and B [N, R]."""
    if DS in winners and is_faster(DS, dy, lora_B):
        if out is None:
            out = dy.new_empty(dy.shape[0], lora_B.shape[1])
        return shrink(dy, lora_B.t(), scaling, out)
    if out is None:
        return products.scaled_mm(dy, lora_B, scaling)
    return addmm(out, dy, lora_B, beta=0, alpha=scaling, out=out)


def gradient_A(ds: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dA = dSᵀ·x [R, K] in `dtype` for dS [M, R] and x [M, K].

    dtype: x's, or float32 for 16 bits if `has_out_dtype`.
    """
    if DA in winners and is_faster(DA, x, ds):
        return outer(ds, x, 1.0, x.new_empty(ds.shape[1], x.shape[1], dtype=dtype))
    return mm(ds.t(), x) if dtype is x.dtype else mm_fp32(ds.t(), x)


def gradient_B(dy: Tensor, p: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return dB = scaling·dyᵀ·P [N, R] in `dtype` for dy [M, N] and P [M, R].

    dtype: as in `gradient_A`.
    """
    if DB in winners and is_faster(DB, dy, p):
        dB = dy.new_empty(dy.shape[1], p.shape[1], dtype=dtype)
        outer(p, dy, scaling, dB.t())
        return dB
    if dtype is dy.dtype:
        return products.scaled_mm(dy.t(), p, scaling)
    dB = mm_fp32(dy.t(), p)  # an `addmm` that writes float32 takes another addend in torch 2.8
    return dB if scaling == 1.0 else dB.mul_(scaling)


def shrink(a: Tensor, small: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write scale·a·smallᵀ to out [M, R] by Triton's kernel, for a [M, n] and small [R, n]."""
    from ..triton import linear as kernels

    kernels.shrink_to(a, small, scale, out)
    return out


def outer(s: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write scale·sᵀ·v to out [R, n] by Triton's kernels, for s [M, R] and v [M, n]."""
    from ..triton import linear as kernels

    kernels.outer_to(v, s, scale, out)
    return out
