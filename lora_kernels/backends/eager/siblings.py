"""Adapted layers that share their x, in library GEMMs on a GPU.

    P_i = x·A_iᵀ        y_i = x·W_iᵀ + scaling·(P_i ⊙ g_i)·B_iᵀ + bias_i

The siblings' A are stacked: one GEMM reads x for all P, and one for all dA. dx accumulates in one
tensor, `dx.addmm_(dy_i, W_i)`, which the first layer of the backward allocates. So x is read n + 1
times for n layers in the forward and once in the backward. By n single layers it is read 2·n times
and n times, and autograd adds n tensors dx. Dtypes and two-part operands are those of `eager`.

P is rounded to 16 bits where `eager` would round it before both of its GEMMs, else float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import Saved
from ...core.dtypes import stat_dtype
from ...core.packed4bit import Packed4bit
from .. import decode4bit
from .linear import (
    _HALVES,
    _add_base,
    _expand,
    _gradient,
    _gradient_A,
    _input_update,
    _is_in_parts,
    _shrink,
    _shrink_rounded,
    _three_parts,
    _widest,
    drop,
)


class Sibling(NamedTuple):
    """The operands of one sibling beside x and its bias.

    Args:
        p: x·Aᵀ [M, R]. In the backward None if neither dB nor dg is needed.
        weight: W [N, K], dense or packed in 4 bits. In the backward None if dx is not needed.
        lora_B: [N, R].
        scaling: alpha / r.
        rank_gate: [R] or None.
    """

    p: Tensor | None
    weight: Tensor | Packed4bit | None
    lora_B: Tensor
    scaling: float
    rank_gate: Tensor | None


class SiblingGrads(NamedTuple):
    """The gradients of one sibling; None for a gradient that is not needed.

    x is the sum over this layer and the siblings after it, without the parts dP·A. p is dP.
    """

    x: Tensor | None = None
    p: Tensor | None = None
    lora_B: Tensor | None = None
    rank_gate: Tensor | None = None
    bias: Tensor | None = None


def is_p_rounded(dtype: torch.dtype, adapters: Sequence[torch.dtype], has_gate: bool) -> bool:
    """Return True if all GEMMs that read P would round it to x's 16-bit `dtype`.

    adapters: the dtypes of the A and the B.
    """
    return dtype in _HALVES and not has_gate and all(each is dtype for each in adapters)


def down_projections(x: Tensor, lora_A: Sequence[Tensor], is_rounded: bool) -> list[Tensor]:
    """Return P_i [M, R_i], columns of one tensor, for x [M, K] and each A_i [R_i, K]."""
    stacked = torch.cat(list(lora_A)) if len(lora_A) > 1 else lora_A[0]
    p = torch.mm(x, stacked.t()) if is_rounded else _shrink(x, stacked, 0)
    return list(p.split([A.shape[0] for A in lora_A], dim=1))


def down_projections_backward(
    dx: Tensor | None,
    dp: Sequence[Tensor | None],
    x: Tensor | None,
    lora_A: Sequence[Tensor],
    needs_A: bool,
    x_dtype: torch.dtype | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dx + Σ dP_i·A_i, in place of dx, and each dA_i; None for a sibling without a dP.

    Args:
        dx: [M, K], the base layers' part, which is overwritten; None if no y has a gradient.
        x: [M, K]; None if no dA is needed.
        needs_A: whether a dA is needed.
        x_dtype: the dtype of dx; None if dx is not needed.
    """
    dA: list[Tensor | None] = [None] * len(lora_A)
    given = [(i, t) for i, t in enumerate(dp) if t is not None]
    if not given:
        return dx, dA
    if _is_batched(given[0][1]):
        return _batched_projections_backward(dx, dp, x, lora_A, x_dtype)
    ds = torch.cat([t for _, t in given], dim=1) if len(given) > 1 else given[0][1]
    stacked = torch.cat([lora_A[i] for i, _ in given]) if len(given) > 1 else lora_A[given[0][0]]
    dtype = x_dtype if x is None else x.dtype
    assert dtype is not None
    in_parts = _is_in_parts(ds, stacked, dtype)
    parts = _three_parts(ds, dtype, 1, lo_first=False) if in_parts else None
    if needs_A:
        assert x is not None
        found = _gradient_A(ds, parts, x, stacked).split([t.shape[1] for _, t in given])
        for (i, _), gradient in zip(given, found, strict=True):
            dA[i] = gradient
    if x_dtype is not None:
        dx = _input_update(ds, parts, stacked, x_dtype, onto=dx).to(x_dtype)
    return dx, dA


def add_update_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    dropout_p: float,
) -> Saved:
    """Add scaling·((D(x)·Aᵀ) ⊙ g)·Bᵀ to y [M, N] in place, for x [M, K] of y's dtype.

    Returns P and the dropout mask, which `eager.lora_linear_backward` takes.
    """
    dropped, _, mask = drop(x, dropout_p)
    dtypes = lora_A.dtype, lora_B.dtype
    is_rounded = is_p_rounded(y.dtype, dtypes, rank_gate is not None)
    (p,) = down_projections(dropped, [lora_A], is_rounded)
    _expand(p if rank_gate is None else p * rank_gate, lora_B, y, scaling, onto=y)
    return Saved(p, None, mask)


def sibling_linear(x: Tensor, sibling: Sibling, bias: Tensor | None) -> Tensor:
    """Return y [M, N] in the dtype of x [M, K]."""
    p, weight, lora_B, scaling, rank_gate = sibling
    assert p is not None and weight is not None
    N, K = lora_B.shape[0], x.shape[1]
    base = None
    if isinstance(weight, Packed4bit):
        base = decode4bit.gemm(weight, x, N, bias)
    s = p if rank_gate is None else p * rank_gate
    if base is not None:
        return _expand(s, lora_B, x, scaling, onto=base)
    z = _expand(s, lora_B, x, scaling, bias)
    return _add_base(z, x, _dense(weight, (N, K), x.dtype).t(), x.dtype, x.dtype)


def sibling_linear_backward(
    dy: Tensor,
    dx: Tensor | None,
    sibling: Sibling,
    columns: int,
    p_dtype: torch.dtype,
    needs: Sequence[bool],
) -> SiblingGrads:
    """Compute the gradients for dy [M, N].

    Args:
        dx: [M, K] of the siblings after this one, which is overwritten; None for the last.
        columns: K.
        p_dtype: the dtype of P and dP.
        needs: of x, p, lora_B, rank_gate and bias.
    """
    p, weight, lora_B, scaling, rank_gate = sibling
    need_x, need_p, need_B, need_gate, need_bias = needs
    dp = dB = dg = dbias = None
    if _is_batched(dy):
        return _batched_backward(dy, dx, sibling, columns, p_dtype)
    if need_x:  # before anything else is held beside the dense copy of a 4-bit weight
        assert weight is not None
        w = _dense(weight, (dy.shape[1], columns), dy.dtype)
        dx = torch.mm(dy, w) if dx is None else _add_base(dx, dy, w, dy.dtype, dy.dtype)
        del w
    if need_bias:
        dbias = dy.sum(0, dtype=stat_dtype(dy.dtype))
    a = dy if _is_in_parts(dy, lora_B) else dy.to(_widest(dy, lora_B))
    if need_B:
        assert p is not None
        dB = _gradient(a, p if rank_gate is None else p * rank_gate, scaling, lora_B)
    if need_p or need_gate:
        if p_dtype in _HALVES:
            dp = _shrink_rounded(a, lora_B, scaling)
        else:
            dp = _shrink(a, lora_B, 1, scaling)
        if need_gate:
            assert p is not None
            dg = (dp * p).sum(0)
        if rank_gate is not None:
            dp = dp * rank_gate
    return SiblingGrads(dx, dp, dB, dg, dbias)


def _dense(weight: Tensor | Packed4bit, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Packed4bit):
        return decode4bit.dense(weight, shape, dtype)
    return weight


def _is_batched(t: Tensor) -> bool:
    """Return True for a tensor of `torch.autograd.grad(..., is_grads_batched=True)`.

    It stands for several gradients. It has no memory, is not changed in place, and is no `out`.
    """
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


def _batched_projections_backward(
    dx: Tensor | None,
    dp: Sequence[Tensor | None],
    x: Tensor | None,
    lora_A: Sequence[Tensor],
    x_dtype: torch.dtype | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`down_projections_backward` in plain expressions, each in the widest dtype, dx too."""
    dA: list[Tensor | None] = [None] * len(lora_A)
    for i, (t, A) in enumerate(zip(dp, lora_A, strict=True)):
        if t is None:
            continue
        wide = stat_dtype(t.dtype)
        t = t.to(wide)
        if x is not None:
            dA[i] = torch.mm(t.t(), x.to(wide)).to(A.dtype)
        if x_dtype is not None:
            update = torch.mm(t, A.to(wide))
            dx = update if dx is None else dx + update
    return dx, dA


def _batched_backward(
    dy: Tensor, dx: Tensor | None, sibling: Sibling, columns: int, p_dtype: torch.dtype
) -> SiblingGrads:
    """`sibling_linear_backward` in plain expressions, each in the widest dtype."""
    p, weight, lora_B, scaling, rank_gate = sibling
    wide = stat_dtype(dy.dtype)
    d, B = dy.to(wide), lora_B.to(wide)
    if weight is not None:
        own = torch.mm(dy, _dense(weight, (lora_B.shape[0], columns), dy.dtype))
        dx = own if dx is None else dx + own
    ds, dB, dg = torch.mm(d, B) * scaling, None, None
    if p is not None:
        s = p.to(wide) if rank_gate is None else p.to(wide) * rank_gate
        dB = (torch.mm(d.t(), s) * scaling).to(lora_B.dtype)
        dg = (ds * p).sum(0)
    dp = ds if rank_gate is None else ds * rank_gate
    return SiblingGrads(dx, dp.to(p_dtype), dB, dg, d.sum(0))
