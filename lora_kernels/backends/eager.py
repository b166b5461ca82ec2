"""The equation in plain PyTorch calls: library products and an in-place rank update.

Runs on any torch device and in any floating dtype, float64 included. The other backends are
measured against it, and what they cannot take comes here with a reason (see `select`).

Rounding points: the base product rounds to the compute dtype. An adapter's product runs in the
wider of its operands' dtypes (float32 adapters beside a 16-bit x: in float32, as in PEFT) and is
added in the wider of its own and the compute dtype, by one in-place `addmm_` where they are the
same; y and dx round once more. P = D(x)·Aᵀ is stored in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..quantization.codes import Codes
from .rows import rows_of

LIBRARY = "library products, in-place addmm"  # its only strategy
PANELS = "library product, panel by panel"  # of `dora_norm`
PANEL = 4 << 20  # bytes of a weight that are looked at together


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a·b in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _add_product(z: Tensor, s: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """z + alpha·s·b in the wider of z's and b's dtypes, in place where that is z's; in z's dtype.

    s is float32, but goes no wider than the adapter beside it.
    """
    dtype = torch.promote_types(z.dtype, b.dtype)
    if z.device.type == "cpu" and dtype is torch.float32:
        # The library's addmm starts its chain of sums from z, and loses more for it.
        return z.to(dtype).add_(torch.mm(s, b.to(dtype)), alpha=alpha).to(z.dtype)
    if dtype is z.dtype:
        return z.addmm_(s.to(dtype), b.to(dtype), alpha=alpha)
    return torch.addmm(z.to(dtype), s.to(dtype), b.to(dtype), alpha=alpha).to(z.dtype)


def _dense(weight: Tensor | Codes, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Codes):
        return weight.dense((lora_B.shape[0], lora_A.shape[1]), dtype)
    return weight.to(dtype)


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which P, dg, dc and dbias are kept: float32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dropped(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """x with the dropped elements zeroed; the scale 1/(1−p) goes to the rank side."""
    if rng is None:
        return x
    return x * reference.dropout_mask(rng, x.shape[0], x.shape[1], dropout_p)


def lora_linear(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
    save_z: bool,
    strategy: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] -> y [M, N] in `y_dtype`, P [M, R] in float32 (or float64), z [M, N] or None."""
    p = _mm(_dropped(x, dropout_p, rng), lora_A.t()).to(stat_dtype(dtype))
    if rng is not None:
        p = p * reference.dropout_scale(dropout_p)
    s = p if rank_gate is None else p * rank_gate
    if weight is None:
        z = x.new_zeros(x.shape[0], lora_B.shape[0], dtype=y_dtype)
    else:
        z = torch.mm(x.to(dtype), _dense(weight, lora_A, lora_B, dtype).t()).to(y_dtype)
    z = _add_product(z, s, lora_B.t(), scaling)
    y = z
    if column_scale is not None:
        y = y * column_scale
    if bias is not None:
        y = y + bias
    y = y.to(y_dtype)
    # An op's outputs share no memory.
    return y, p, (z.clone() if y is z else z) if save_z else None


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    p: Tensor,
    z: Tensor | None,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gate: bool,
    need_column_scale: bool,
    need_bias: bool,
    strategy: str,
) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> dx, dA, dB, dg, dc, dbias; None where it is not asked for.

    dg is in p's dtype and is the gradient of `rank_gate`; dc and dbias likewise come back in p's
    dtype for the caller to round once.
    """
    stat = p.dtype
    dx = dA = dB = dg = dc = dbias = None
    if need_bias:
        dbias = dy.sum(0, dtype=stat)
    if need_column_scale:
        assert z is not None
        dc = (dy.to(stat) * z.to(stat)).sum(0)
    dz = dy if column_scale is None else dy * column_scale
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
            if weight is None:
                dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
            else:
                dx = torch.mm(dz.to(dtype), _dense(weight, lora_A, lora_B, dtype)).to(x.dtype)
            if rng is None:
                dx = _add_product(dx, dxa, lora_A)
            else:
                dx_lora = _mm(dxa.to(torch.promote_types(x.dtype, lora_A.dtype)), lora_A)
                dx = (dx + _dropped(dx_lora, dropout_p, rng)).to(x.dtype)
    return dx, dA, dB, dg, dc, dbias


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    scaling: Sequence[float],
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    y_dtype: torch.dtype,
    strategy: str,
) -> tuple[Tensor, Tensor]:
    """x [M, K], index [M] -> y [M, N] in `y_dtype`, P [M, R] in float32 (or float64)."""
    stat, R = stat_dtype(dtype), max(A.shape[0] for A in lora_A)
    dropped, p = _dropped(x, dropout_p, rng), x.new_zeros(x.shape[0], R, dtype=stat)
    if weight is None:
        y = x.new_zeros(x.shape[0], lora_B[0].shape[0], dtype=y_dtype)
    else:
        y = torch.mm(x.to(dtype), _dense(weight, lora_A[0], lora_B[0], dtype).t()).to(y_dtype)
    for e, rows in rows_of(index, len(lora_A)).each():
        s = _mm(dropped[rows], lora_A[e].t()).to(stat)
        if rng is not None:
            s = s * reference.dropout_scale(dropout_p)
        p[rows, : s.shape[1]] = s
        y[rows] = _add_product(y[rows], s, lora_B[e].t(), scaling[e])
    return y if bias is None else (y + bias).to(y_dtype), p


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Tensor,
    p: Tensor,
    scaling: Sequence[float],
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_bias: bool,
    strategy: str,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dy [M, N] -> dx, dA and dB of each adapter, dbias in p's dtype; None where not asked for.

    Zero for an adapter that no row has.
    """
    stat = p.dtype
    dx = None
    dA = [torch.zeros_like(A) if need else None for A, need in zip(lora_A, need_A, strict=True)]
    dB = [torch.zeros_like(B) if need else None for B, need in zip(lora_B, need_B, strict=True)]
    dbias = dy.sum(0, dtype=stat) if need_bias else None
    if need_x:
        if weight is None:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        else:
            dense = _dense(weight, lora_A[0], lora_B[0], dtype)
            dx = torch.mm(dy.to(dtype), dense).to(x.dtype)
    dropped = _dropped(x, dropout_p, rng) if any(need_A) else x
    mask = None
    if need_x and rng is not None:
        mask = reference.dropout_mask(rng, x.shape[0], x.shape[1], dropout_p)
    for e, rows in rows_of(index, len(lora_A)).each():
        A, B, dz = lora_A[e], lora_B[e], dy[rows]
        if need_B[e]:
            dB[e] = _mm(dz.t(), p[rows, : A.shape[0]].mul(scaling[e])).to(B.dtype)
        keep_scale = reference.dropout_scale(dropout_p) if rng is not None else 1.0
        dxa = _mm(dz, B).to(stat) * (scaling[e] * keep_scale)
        if need_A[e]:
            dA[e] = _mm(dxa.t(), dropped[rows]).to(A.dtype)
        if dx is None:
            continue
        if mask is None:
            dx[rows] = _add_product(dx[rows], dxa, A)
        else:
            update = _mm(dxa.to(torch.promote_types(x.dtype, A.dtype)), A)
            dx[rows] = (dx[rows] + update * mask[rows]).to(x.dtype)
    return dx, dA, dB, dbias


def dora_norm(
    weight: Tensor | Codes,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """‖W + scaling · (B ⊙ gate)·A‖ of each row: [N] in float32 (float64 for float64).

    A panel of rows at a time, in that dtype, so that no second weight is held.
    """
    K, N = lora_A.shape[1], lora_B.shape[0]
    dtype = stat_dtype(lora_A.dtype)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    if rank_gate is not None:
        B = B * rank_gate.to(dtype)
    out = torch.empty(N, dtype=dtype, device=lora_A.device)
    step = max(64, PANEL // (K * dtype.itemsize))
    for start in range(0, N, step):
        n = slice(start, min(N, start + step))
        if isinstance(weight, Codes):
            w = weight.dense((N, K), dtype, rows=n)
        else:
            w = weight[n].to(dtype)
        update = torch.mm(B[n], A)
        torch.linalg.vector_norm(torch.add(w, update, alpha=scaling), dim=1, out=out[n])
    return out
