"""The equation in library GEMMs; runs on any torch device and in any floating dtype.

The other backends are measured against this one. A call that they do not support comes here, with
the reason (see `choice`).

Memory traffic. The base GEMM accumulates onto the low-rank update, `y.addmm_(x, Wᵀ)`: y is read in
the epilogue of the large GEMM and not in a pass of its own. dx likewise. `products` has the GEMMs
and the dtypes of their operands.

Rounding. y and dx are rounded to the compute dtype after the update and again after the base
GEMM. P = D(x)·Aᵀ is stored in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...core.call import (
    Grads,
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ...core.codes import Codes
from ...core.dropout import dropout_mask, dropout_scale
from ...core.dtypes import stat_dtype, to_dtype
from .. import decoder
from ..rows import rows_of
from . import products


class _DroppedInput(NamedTuple):
    """D(x) = factor · x. mask: the bool mask if PyTorch's kernel drew one."""

    x: Tensor
    factor: float = 1.0
    mask: Tensor | None = None


def drop(
    x: Tensor, dropout_p: float, rng: Tensor | None = None, mask: Tensor | None = None
) -> _DroppedInput:
    """Drop elements of x [M, K].

    rng: the state of a Philox mask. mask: bool [M, K]. Without both, PyTorch's kernel draws a mask.
    """
    if not dropout_p:
        return _DroppedInput(x)
    scale = dropout_scale(dropout_p)
    if mask is not None:
        return _DroppedInput(torch.ops.aten.native_dropout_backward(x, mask, scale))
    if rng is not None:
        return _DroppedInput(x * dropout_mask(rng, x.shape[0], x.shape[1], dropout_p), scale)
    dropped, mask = torch.native_dropout(x, dropout_p, True)
    return _DroppedInput(dropped, mask=mask)


def _operand_dtype(x: Tensor, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the adapter's activation operand: x's, or the base GEMM's `dtype` if the
    adapter has that too, so that both share one copy of x."""
    return dtype if lora_A.dtype is lora_B.dtype is dtype else x.dtype


def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B = operands[:4]
    scaling, dropout_p, dtype, y_dtype = spec[:4]
    bias, column_scale = operands.bias, operands.column_scale
    early_bias = bias if column_scale is None else None
    base = None
    if weight is not None and not dropout_p:
        x = to_dtype(x, _operand_dtype(x, lora_A, lora_B, dtype))  # one copy for both GEMMs
    if isinstance(weight, Codes):  # before anything else is held beside the dense copy
        base = decoder.gemm(weight, to_dtype(x, dtype), lora_B.shape[0], early_bias)
    dropped, factor, mask = drop(x, dropout_p, operands.rng, operands.mask)
    operand = to_dtype(dropped, _operand_dtype(x, lora_A, lora_B, dtype))
    del dropped
    p = products.shrink(operand, lora_A, 0)
    if factor != 1.0:
        p *= factor
    s = p if operands.rank_gate is None else p * operands.rank_gate
    if base is not None and y_dtype is dtype:
        z = products.expand(s, lora_B, operand, scaling, accumulator=base)
    else:
        z = products.expand(s, lora_B, operand, scaling, None if base is not None else early_bias)
        del operand
        if base is not None:
            z = products.add_in_dtype(base, z, y_dtype)
        elif weight is not None:
            z = products.add_base(
                z, x, products.dense_weight(weight, lora_A, lora_B, dtype).t(), dtype, y_dtype
            )
        z = to_dtype(z, y_dtype)
    if column_scale is None:
        # An op's outputs share no memory.
        return z, Saved(p, z.clone() if spec.save_z else None, mask)
    y = torch.mul(z, column_scale, out=torch.empty_like(z) if spec.save_z else z)
    if bias is not None:
        y += bias
    return y, Saved(p, z if spec.save_z else None, mask)


def lora_linear_backward(
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    strategy: str,
    late_x: Callable[[Tensor], Tensor] | None = None,
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K].

    late_x: takes dx, whose memory it may overwrite, and returns x for dA. Of `operands.x` only the
        shape and the dtype are then used, and there is no dropout and no column scale.
    """
    if operands.column_scale is not None:
        return _dora_backward(dy, operands, saved, spec, needs)
    if needs.x and isinstance(operands.weight, Codes):
        if products.widest_dtype(dy, operands.lora_A, operands.lora_B) is dy.dtype:
            base_first = dy.shape[0] <= products.UPCAST_ROWS and not spec.dropout_p
        else:  # the base GEMM accumulates onto an update in parts alone
            base_first = not products.is_in_parts(dy, operands.lora_B)
        if base_first:
            return _base_first_backward(dy, operands, saved, spec, needs, late_x)
    return _dense_backward(dy, operands, saved, spec, needs, late_x)


def _dense_backward(
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    late_x: Callable[[Tensor], Tensor] | None = None,
    base_dy: Tensor | None = None,
) -> Grads:
    """Compute the gradients without a column scale; the base GEMM accumulates onto dx's update.

    A 4-bit weight is decoded for the base GEMM.

    base_dy: dy of the base GEMM, if that is another.
    """
    grads, dxa, parts = _adapter_backward(dy, operands, saved.p, spec, needs, late_x is None)
    if not needs.x:
        return grads
    x, weight, lora_A, lora_B = operands[:4]
    x_dtype = _operand_dtype(x, lora_A, lora_B, spec.dtype)
    dx = products.input_update(cast(Tensor, dxa), parts, lora_A, x_dtype)
    if late_x is None:
        del dxa, parts  # before the base GEMM
    dx = drop(dx, spec.dropout_p, operands.rng, operands.mask).x
    if weight is not None:
        dz = dy if base_dy is None else base_dy
        dx = products.add_base(
            dx, dz, products.dense_weight(weight, lora_A, lora_B, spec.dtype), spec.dtype, x.dtype
        )
    dx = to_dtype(dx, x.dtype)
    if late_x is None:
        return grads._replace(x=dx)
    operand = late_x(dx).to(x_dtype)
    dA = products.gradient_A(cast(Tensor, dxa), parts, operand, lora_A) if needs.lora_A else None
    return grads._replace(x=dx, lora_A=dA)


def _base_first_backward(
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    late_x: Callable[[Tensor], Tensor] | None,
) -> Grads:
    """Compute the gradients over a 4-bit weight without a column scale; dx is needed.

    A base GEMM that does not accumulate runs first, while no other temporary is alive beside the
    dense copy of the weight.
    """
    x, weight, lora_A, lora_B = operands[:4]
    dense = products.dense_weight(cast(Codes, weight), lora_A, lora_B, spec.dtype)
    base = torch.mm(to_dtype(dy, spec.dtype), dense)
    del dense
    grads, dxa, parts = _adapter_backward(dy, operands, saved.p, spec, needs, late_x is None)
    assert dxa is not None
    x_dtype = _operand_dtype(x, lora_A, lora_B, spec.dtype)
    is_narrow = products.widest_dtype(dy, lora_A, lora_B) is dy.dtype
    if is_narrow and base.dtype is x.dtype is x_dtype:
        dx = base.addmm_(to_dtype(dxa, x_dtype), to_dtype(lora_A, x_dtype))
    else:
        update = products.input_update(dxa, parts, lora_A, x_dtype)
        if late_x is None:
            del dxa, parts
        update = drop(update, spec.dropout_p, operands.rng, operands.mask).x
        dx = products.add_in_dtype(base, update, x.dtype)
        del update
    if late_x is None:
        return grads._replace(x=dx)
    operand = late_x(dx).to(x_dtype)
    dA = products.gradient_A(dxa, parts, operand, lora_A) if needs.lora_A else None
    return grads._replace(x=dx, lora_A=dA)


def _dora_backward(dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs) -> Grads:
    """Compute the gradients with a column scale c: those without one for dZ = c ⊙ dY.

    In parts, B and dB take the column scale: dZ is rounded for the base GEMM alone.
    """
    scale, lora_B, p = cast(Tensor, operands.column_scale), operands.lora_B, saved.p
    dbias = dy.sum(0, dtype=p.dtype) if needs.bias else None
    dc = None
    if needs.column_scale:
        assert saved.z is not None
        dc = products.column_dot(dy, saved.z, p.dtype)
    operands = operands._replace(column_scale=None)
    needs = needs._replace(column_scale=False, bias=False)
    in_parts, dz = products.is_in_parts(dy, lora_B), None
    if needs.x or not in_parts:
        dtype = dy.dtype if in_parts else products.widest_dtype(dy, lora_B)
        dz = torch.mul(dy, scale, out=torch.empty_like(dy, dtype=dtype))
    if in_parts:
        operands = operands._replace(lora_B=lora_B * scale[:, None])
        grads = _dense_backward(dy, operands, saved, spec, needs, base_dy=dz)
        if grads.lora_B is not None:
            grads.lora_B.mul_(scale[:, None])
    else:
        grads = lora_linear_backward(cast(Tensor, dz), operands, saved, spec, needs, "")
    return grads._replace(column_scale=dc, bias=dbias)


def _adapter_backward(
    dy: Tensor, operands: Operands, p: Tensor, spec: Spec, needs: Needs, has_x: bool
) -> tuple[Grads, Tensor | None, Tensor | None]:
    """Compute all gradients but dx's, and dXA [M, R] with its parts for dx.

    dXA is None if no gradient needs it, and its parts if they are not taken.
    has_x: whether dA is computed, from `operands.x`.
    """
    x, _, lora_A, lora_B = operands[:4]
    gate, rng = operands.rank_gate, operands.rng
    dA = dB = dg = None
    dbias = dy.sum(0, dtype=p.dtype) if needs.bias else None
    a = products.widen(dy, lora_B)
    if needs.lora_B:
        dB = products.adapter_gradient(a, p if gate is None else p * gate, spec.scaling, lora_B)
    if not (needs.x or needs.lora_A or needs.rank_gate):
        return Grads(lora_B=dB, bias=dbias), None, None
    factor = 1.0 if rng is None else dropout_scale(spec.dropout_p)
    if gate is None and not needs.rank_gate:
        dxa = products.shrink_rounded(a, lora_B, spec.scaling * factor)
    else:
        ds = products.shrink(a, lora_B, 1, spec.scaling)
        if needs.rank_gate:
            dg = (ds * p).sum(0)
        dxa = ds if gate is None else ds * gate
        dxa = dxa if factor == 1.0 else dxa * factor
        del ds
    del a
    x_dtype = _operand_dtype(x, lora_A, lora_B, spec.dtype)
    in_parts = products.is_in_parts(x, lora_A, x_dtype)
    parts = products.split_in_three(dxa, x_dtype, 1, lo_first=False) if in_parts else None
    if needs.lora_A and has_x:
        dropped = drop(x, spec.dropout_p, rng, operands.mask).x
        dA = products.gradient_A(dxa, parts, to_dtype(dropped, x_dtype), lora_A)
    return Grads(None, dA, dB, dg, None, dbias), dxa, parts


def multi_lora_linear(
    operands: MultiOperands, spec: MultiSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K], whose rows each have an adapter or none."""
    x, weight, lora_A, lora_B = operands[:4]
    scaling, dropout_p, dtype, y_dtype = spec
    stat, R = stat_dtype(dtype), max(A.shape[0] for A in lora_A)
    dropped, factor, mask = drop(x, dropout_p, operands.rng, operands.mask)
    p = x.new_zeros(x.shape[0], R, dtype=stat)
    if weight is None:
        y = x.new_zeros(x.shape[0], lora_B[0].shape[0], dtype=y_dtype)
    else:
        w = products.dense_weight(weight, lora_A[0], lora_B[0], dtype).to(dtype)
        y = torch.mm(to_dtype(x, dtype), w.t()).to(y_dtype)
    for e, rows in rows_of(operands.adapter_index, len(lora_A)).each():
        s = products.shrink(dropped[rows], lora_A[e], 0)
        if factor != 1.0:
            s *= factor
        p[rows, : s.shape[1]] = s
        rows_y = y[rows]  # a view where the rows lie together
        products.expand(s, lora_B[e], dropped[rows], scaling[e], accumulator=rows_y)
        if isinstance(rows, Tensor):
            y[rows] = rows_y
    if operands.bias is not None:
        y = (y + operands.bias).to(y_dtype)
    return y, Saved(p, None, mask)


def multi_lora_linear_backward(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    strategy: str,
) -> MultiGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, weight, lora_A, lora_B = operands[:4]
    p, mask, (scaling, dropout_p, dtype, _) = saved.p, operands.mask, spec
    need_x, need_A, need_B, need_bias = needs
    dx = None
    dA = [torch.zeros_like(A) if need else None for A, need in zip(lora_A, need_A, strict=True)]
    dB = [torch.zeros_like(B) if need else None for B, need in zip(lora_B, need_B, strict=True)]
    dbias = dy.sum(0, dtype=p.dtype) if need_bias else None
    if need_x:
        if weight is None:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        else:
            dense = products.dense_weight(weight, lora_A[0], lora_B[0], dtype).to(dtype)
            dx = torch.mm(to_dtype(dy, dtype), dense).to(x.dtype)
    if operands.rng is not None:
        mask = dropout_mask(operands.rng, x.shape[0], x.shape[1], dropout_p)
    for e, rows in rows_of(operands.adapter_index, len(lora_A)).each():
        rows_mask = None if mask is None else mask[rows]
        grads = lora_linear_backward(
            dy[rows],
            Operands(x[rows], None, lora_A[e], lora_B[e], mask=rows_mask),
            Saved(p[rows, : lora_A[e].shape[0]]),
            Spec(scaling[e], dropout_p, dtype, dy.dtype),
            Needs(need_x, need_A[e], need_B[e]),
            strategy,
        )
        if dx is not None:
            dx[rows] += cast(Tensor, grads.x)
        if need_A[e]:
            dA[e] = grads.lora_A
        if need_B[e]:
            dB[e] = grads.lora_B
    return MultiGrads(dx, dA, dB, dbias)
