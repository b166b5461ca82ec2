"""The equation in plain PyTorch calls: library products and an in-place rank update.

Runs on any torch device and in any floating dtype, float64 included. The other backends are
measured against it, and what they cannot take comes here with a reason (see `select`).

Rounding points: the base product rounds to the compute dtype, the rank update is added to it in
the compute dtype (one `addmm_`); P = D(x)·Aᵀ is rounded to float32 (float64 for float64) when it
is stored. The thin products run in the wider of the two dtypes of their operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def _wider(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    dtype = _wider(a, b)
    return torch.mm(a.to(dtype), b.to(dtype))


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dropped(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """x with the dropped elements zeroed; the scale 1/(1−p) goes to the rank side."""
    if rng is None:
        return x
    return x * reference.dropout_mask(rng, x.shape[0], x.shape[1], dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> y [M, N] in `dtype`, P [M, R] in float32 (or float64), z [M, N] or [0]."""
    p = _mm(_dropped(x, dropout_p, rng), lora_A.t()).to(_stat_dtype(dtype))
    if rng is not None:
        p = p * reference.dropout_scale(dropout_p)
    s = p if rank_gate is None else p * rank_gate
    if weight is None:
        z = torch.mm(s.to(dtype), lora_B.to(dtype).t()).mul_(scaling)
    else:
        z = torch.mm(x.to(dtype), weight.to(dtype).t())
        z.addmm_(s.to(dtype), lora_B.to(dtype).t(), alpha=scaling)
    y = z
    if column_scale is not None:
        y = z * column_scale.to(dtype)
    if bias is not None:
        y = y.add_(bias) if y is not z or not save_z else y + bias
    if not save_z:
        z = z.new_empty(0)
    elif y is z:  # an op's outputs share no memory
        z = z.clone()
    return y, p, z


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    p: Tensor,
    z: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gate: bool,
    need_column_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy [M, N] -> dx, dA, dB, dg, dc, dbias; each of size 0 where it is not asked for.

    dg is in p's dtype and is the gradient of `rank_gate`; dc and dbias likewise come back in p's
    dtype for the caller to round once.
    """
    stat, none = p.dtype, dy.new_empty(0)
    dx, dA, dB, dg, dc, dbias = (none.clone() for _ in range(6))
    if need_bias:
        dbias = dy.sum(0, dtype=stat)
    if need_column_scale:
        dc = (dy.to(stat) * z.to(stat)).sum(0)
    dz = dy if column_scale is None else dy * column_scale.to(dy.dtype)
    if need_B:
        s = p if rank_gate is None else p * rank_gate
        dB = _mm(dz.t(), s.mul(scaling)).to(lora_B.dtype)
    if need_x or need_A or need_gate:
        ds = _mm(dz, lora_B).to(stat)
        if need_gate:
            dg = (ds * p).sum(0).mul_(scaling)
        dxa = ds * (scaling * (reference.dropout_scale(dropout_p) if rng is not None else 1.0))
        if rank_gate is not None:
            dxa = dxa * rank_gate
        if need_A:
            dA = _mm(dxa.t(), _dropped(x, dropout_p, rng)).to(lora_A.dtype)
        if need_x:
            a, d = lora_A.to(x.dtype), dxa.to(x.dtype)
            if weight is not None:
                dx = torch.mm(dz, weight.to(dz.dtype)).to(x.dtype)
            if weight is not None and rng is None:
                dx.addmm_(d, a)
            else:
                dx_lora = _dropped(torch.mm(d, a), dropout_p, rng)
                dx = dx_lora if weight is None else dx.add_(dx_lora)
    return dx, dA, dB, dg, dc, dbias
