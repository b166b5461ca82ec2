"""The equation in library GEMMs; runs on any torch device and in any floating dtype.

The other backends are measured against this one. A call that they do not support comes here, with
the reason (see `choice`).

Memory traffic. The base GEMM accumulates onto the low-rank update, `y.addmm_(x, Wᵀ)`: y is read in
the epilogue of the large GEMM and not in a pass of its own. dx likewise. Above max(`UPCAST_ROWS`,
`UPCAST_ROWS_PER_RANK`·R) rows no float32 copy of a 16-bit x, dY, y or dx is made where the device
multiplies 16-bit matrices into float32 (`library.has_out_dtype`). The adapter's GEMMs run in one of
three ways:

- its dtype is the activation's: in that dtype. P is in float32, and dS too if there is a rank gate;
  else dS has that dtype;
- float32 beside 16 bits, many rows: each small operand as two 16-bit parts, hi + lo. A GEMM with
  a float32 result takes both parts side by side and adds the halves; one with a 16-bit result
  takes hi·hi + hi·lo + lo·hi as one GEMM of 3·R terms;
- otherwise in the wider dtype, by copies of the narrower operands.

Rounding. y and dx are rounded to the compute dtype after the update and again after the base
GEMM. Two parts hold a float32 to 2⁻¹⁷ (bfloat16) or 2⁻²² (float16; 2⁻¹⁶ where it is as small as
1e-5), so dA and dB beside them are exact to that. P = D(x)·Aᵀ is stored in float32 (float64 for
float64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ...core.dropout import dropout_mask, dropout_scale
from ...core.dtypes import stat_dtype, to_dtype
from ...core.packed4bit import Packed4bit
from .. import decode4bit
from ..library import has_out_dtype, is_on_gpu_path, mm_fp32
from ..rows import rows_of

PANEL = 4 << 20  # bytes of an operand that `dora_norm` takes at a time; `_column_dot` takes 4·PANEL
# The most rows, and rows per rank, for which 16-bit activations are copied to float32 beside a
# float32 adapter. For few rows the copies move fewer bytes than two parts of the adapter. At 8 rows
# per rank two parts save 36 MB in the backward of 512×4096×4096, r = 64 (counted; an estimated
# 12 µs of an H100), and take 8 more kernels.
UPCAST_ROWS, UPCAST_ROWS_PER_RANK = 64, 8
MANY_ROWS = 64  # above it a copy of the adapters pays: A of a group stacked, adapters rounded
EXPANDED_NORM = 256  # columns from which `dora_norm` is made of products on a GPU
_HALVES = (torch.bfloat16, torch.float16)
PART_ROUNDOFF = {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-22}  # of hi + lo
# float16 parts of an adapter are those of 256 times it: without that, elements below 1e-4 lose
# most of lo to subnormals. Elements of 256 and more overflow.
_PRESCALE = {torch.bfloat16: 1.0, torch.float16: 256.0}


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


@contextmanager
def upcast_rows(rows: int, rows_per_rank: int = 0) -> Iterator[None]:
    """Set `UPCAST_ROWS` and `UPCAST_ROWS_PER_RANK`, in all threads. For tests and the oracle."""
    global UPCAST_ROWS, UPCAST_ROWS_PER_RANK
    previous = UPCAST_ROWS, UPCAST_ROWS_PER_RANK
    UPCAST_ROWS, UPCAST_ROWS_PER_RANK = rows, rows_per_rank
    try:
        yield
    finally:
        UPCAST_ROWS, UPCAST_ROWS_PER_RANK = previous


def _is_in_parts(activation: Tensor, adapter: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return True if GEMMs of the activation [M, n], in `dtype`, take the adapter split into
    16-bit parts (`_two_parts`, `_three_parts`)."""
    dtype = dtype or activation.dtype
    return (
        dtype is not adapter.dtype
        and dtype in _HALVES
        and activation.shape[0] > max(UPCAST_ROWS, UPCAST_ROWS_PER_RANK * min(adapter.shape))
        and has_out_dtype(activation)
        and torch.promote_types(dtype, adapter.dtype) is torch.float32
    )


def _widest(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _two_parts(t: Tensor, scale: float, dtype: torch.dtype, dim: int) -> Tensor:
    """scale·t as hi and −lo in `dtype`, side by side along `dim` of the result [.., 2·n, ..].

    −lo, because one kernel computes hi − scale·t.
    """
    rows, columns = t.shape
    shape = (2, rows, columns) if dim == 0 else (rows, 2, columns)
    parts = t.new_empty(shape, dtype=dtype)
    hi, minus_lo = parts.unbind(dim)
    torch.mul(t, scale, out=hi)
    torch.sub(hi, t, alpha=scale, out=minus_lo)
    return parts.view(-1, columns) if dim == 0 else parts.view(rows, -1)


def _three_parts(t: Tensor, dtype: torch.dtype, dim: int, lo_first: bool) -> Tensor:
    """t as hi, hi, lo (or lo, hi, hi) in `dtype`, side by side along `dim`.

    The GEMM of a `lo_first` with one that is not gives hi·lo + hi·hi + lo·hi.
    """
    rows, columns = t.shape
    shape = (3, rows, columns) if dim == 0 else (rows, 3, columns)
    parts = t.new_empty(shape, dtype=dtype)
    hi_index, lo_index = (1, 0) if lo_first else (0, 2)
    both = parts.narrow(dim, hi_index, 2)
    both.copy_(t.unsqueeze(dim).expand_as(both))
    torch.sub(t, parts.select(dim, hi_index), out=parts.select(dim, lo_index))
    return parts.view(-1, columns) if dim == 0 else parts.view(rows, -1)


def _is_added_first(t: Tensor) -> bool:
    """Return True if `t.addmm_` starts its float32 sums from t, as CPU GEMMs do for few rows.

    That rounds more than a sum of two results. A GPU adds t in the epilogue.
    """
    return t.is_cpu and t.dtype is torch.float32


def _scaled_mm(a: Tensor, b: Tensor, alpha: float, bias: Tensor | None = None) -> Tensor:
    """alpha·a·b + bias in a's dtype, rounded once."""
    if bias is not None:
        return torch.addmm(to_dtype(bias, a.dtype), a, b, alpha=alpha)
    if alpha == 1.0:
        return torch.mm(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _shrink(a: Tensor, small: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Return P or dS, scale·a·small in float32 (float64 for float64).

    a: [M, n]. small: [n, R] for dim 1; [R, n] for dim 0, transposed.
    """
    if _is_in_parts(a, small):
        prescale = _PRESCALE[a.dtype]
        parts = _two_parts(small, scale if prescale == 1.0 else prescale, a.dtype, dim)
        hi, minus_lo = mm_fp32(a, parts if dim else parts.t()).chunk(2, dim=1)
        product = hi - minus_lo
        return product if prescale == 1.0 else product.mul_(scale / prescale)
    dtype = _widest(a, small)
    a, small = to_dtype(a, dtype), to_dtype(small, dtype) if dim else to_dtype(small, dtype).t()
    if dtype in _HALVES:
        product = mm_fp32(a, small)
        return product if scale == 1.0 else product.mul_(scale)
    return _scaled_mm(a, small, scale)


def _shrink_rounded(a: Tensor, small: Tensor, scale: float) -> Tensor:
    """scale·a·small, a [M, n], small [n, R], in 16 bits if both have the same 16-bit dtype."""
    if a.dtype is small.dtype and a.dtype in _HALVES:
        return _scaled_mm(a, small, scale)
    return _shrink(a, small, 1, scale)


def _gradient(a: Tensor, s: Tensor, scale: float, adapter: Tensor) -> Tensor:
    """scale·aᵀ·s [n, R] over the rows of a [M, n] and s [M, R], in the adapter's dtype."""
    if _is_in_parts(a, adapter):
        s, factor = _normalized(s, a.dtype)
        first = 1.0 if factor is not None else scale  # float16 takes the scale at the end
        hi, minus_lo = mm_fp32(a.t(), _two_parts(s, first, a.dtype, 1)).chunk(2, dim=1)
        grad = hi - minus_lo
        return grad if factor is None else grad.mul_(scale / factor)
    dtype = _widest(a, adapter)
    grad = _scaled_mm(to_dtype(a, dtype).t(), to_dtype(s, dtype), scale)
    return to_dtype(grad, adapter.dtype)


def _normalized(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """t times a factor that brings its largest element to 256, and the factor, for parts in
    float16, whose range is small; t and None in bfloat16."""
    if dtype is not torch.float16:
        return t, None
    factor = 256.0 / t.abs().amax().clamp_(min=2.0**-100)
    return t * factor, factor


def _expand(
    s: Tensor,
    small: Tensor,
    activation: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    accumulator: Tensor | None = None,
) -> Tensor:
    """Return the low-rank update scale·s·smallᵀ + bias [M, N]; s [M, R], small [N, R].

    It has the dtype of `activation`, or a wider dtype of the adapter if that is not
    taken in parts. It is added to `accumulator` in place, if that is given.
    """
    dtype = _widest(activation, small)
    if _is_in_parts(activation, small):
        dtype = activation.dtype
        prescale = _PRESCALE[dtype]
        s = _three_parts(s, dtype, 1, lo_first=False)
        wide = small if prescale == 1.0 else small * prescale
        small, scale = _three_parts(wide, dtype, 1, lo_first=True), scale / prescale
    s, small = to_dtype(s, dtype), to_dtype(small, dtype)
    if accumulator is None:
        return _scaled_mm(s, small.t(), scale, bias)
    if accumulator.dtype is dtype:
        if _is_added_first(accumulator):
            return accumulator.add_(torch.mm(s, small.t()), alpha=scale)
        return accumulator.addmm_(s, small.t(), alpha=scale)
    return accumulator.add_(_scaled_mm(s, small.t(), scale))


def _add_base(
    update: Tensor, a: Tensor, w: Tensor, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """Return update + a·w in `out_dtype`, with the base GEMM in `dtype`; may overwrite update."""
    a, w = to_dtype(a, dtype), to_dtype(w, dtype)
    if update.dtype is dtype and dtype is out_dtype and not _is_added_first(update):
        return update.addmm_(a, w)
    return _sum(torch.mm(a, w), update, out_dtype)


def _sum(base: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + update in `dtype`, in place in one of them if it has that dtype."""
    out = next((t for t in (base, update) if t.dtype is dtype), None)
    return torch.add(base, update, out=torch.empty_like(base, dtype=dtype) if out is None else out)


def _dense(
    weight: Tensor | Packed4bit, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> Tensor:
    if isinstance(weight, Packed4bit):
        return decode4bit.dense(weight, (lora_B.shape[0], lora_A.shape[1]), dtype)
    return weight


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
    if isinstance(weight, Packed4bit):  # before anything else is held beside the dense copy
        base = decode4bit.gemm(weight, to_dtype(x, dtype), lora_B.shape[0], early_bias)
    dropped, factor, mask = drop(x, dropout_p, operands.rng, operands.mask)
    operand = to_dtype(dropped, _operand_dtype(x, lora_A, lora_B, dtype))
    del dropped
    p = _shrink(operand, lora_A, 0)
    if factor != 1.0:
        p *= factor
    s = p if operands.rank_gate is None else p * operands.rank_gate
    if base is not None and y_dtype is dtype:
        z = _expand(s, lora_B, operand, scaling, accumulator=base)
    else:
        z = _expand(s, lora_B, operand, scaling, None if base is not None else early_bias)
        del operand
        if base is not None:
            z = _sum(base, z, y_dtype)
        elif weight is not None:
            z = _add_base(z, x, _dense(weight, lora_A, lora_B, dtype).t(), dtype, y_dtype)
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
    if needs.x and isinstance(operands.weight, Packed4bit):
        if _widest(dy, operands.lora_A, operands.lora_B) is dy.dtype:
            base_first = dy.shape[0] <= UPCAST_ROWS and not spec.dropout_p
        else:  # the base GEMM accumulates onto an update in parts alone
            base_first = not _is_in_parts(dy, operands.lora_B)
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
    dx = _input_update(cast(Tensor, dxa), parts, lora_A, x_dtype)
    if late_x is None:
        del dxa, parts  # before the base GEMM
    dx = drop(dx, spec.dropout_p, operands.rng, operands.mask).x
    if weight is not None:
        dz = dy if base_dy is None else base_dy
        dx = _add_base(dx, dz, _dense(weight, lora_A, lora_B, spec.dtype), spec.dtype, x.dtype)
    dx = to_dtype(dx, x.dtype)
    if late_x is None:
        return grads._replace(x=dx)
    operand = late_x(dx).to(x_dtype)
    dA = _gradient_A(cast(Tensor, dxa), parts, operand, lora_A) if needs.lora_A else None
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
    dense = _dense(cast(Packed4bit, weight), lora_A, lora_B, spec.dtype)
    base = torch.mm(to_dtype(dy, spec.dtype), dense)
    del dense
    grads, dxa, parts = _adapter_backward(dy, operands, saved.p, spec, needs, late_x is None)
    assert dxa is not None
    x_dtype = _operand_dtype(x, lora_A, lora_B, spec.dtype)
    is_narrow = _widest(dy, lora_A, lora_B) is dy.dtype
    if is_narrow and base.dtype is x.dtype is x_dtype:
        dx = base.addmm_(to_dtype(dxa, x_dtype), to_dtype(lora_A, x_dtype))
    else:
        update = _input_update(dxa, parts, lora_A, x_dtype)
        if late_x is None:
            del dxa, parts
        update = drop(update, spec.dropout_p, operands.rng, operands.mask).x
        dx = _sum(base, update, x.dtype)
        del update
    if late_x is None:
        return grads._replace(x=dx)
    operand = late_x(dx).to(x_dtype)
    dA = _gradient_A(dxa, parts, operand, lora_A) if needs.lora_A else None
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
        dc = _column_dot(dy, saved.z, p.dtype)
    operands = operands._replace(column_scale=None)
    needs = needs._replace(column_scale=False, bias=False)
    in_parts, dz = _is_in_parts(dy, lora_B), None
    if needs.x or not in_parts:
        dtype = dy.dtype if in_parts else _widest(dy, lora_B)
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
    a = dy if _is_in_parts(dy, lora_B) else to_dtype(dy, _widest(dy, lora_B))
    if needs.lora_B:
        dB = _gradient(a, p if gate is None else p * gate, spec.scaling, lora_B)
    if not (needs.x or needs.lora_A or needs.rank_gate):
        return Grads(lora_B=dB, bias=dbias), None, None
    factor = 1.0 if rng is None else dropout_scale(spec.dropout_p)
    if gate is None and not needs.rank_gate:
        dxa = _shrink_rounded(a, lora_B, spec.scaling * factor)
    else:
        ds = _shrink(a, lora_B, 1, spec.scaling)
        if needs.rank_gate:
            dg = (ds * p).sum(0)
        dxa = ds if gate is None else ds * gate
        dxa = dxa if factor == 1.0 else dxa * factor
        del ds
    del a
    x_dtype = _operand_dtype(x, lora_A, lora_B, spec.dtype)
    in_parts = _is_in_parts(x, lora_A, x_dtype)
    parts = _three_parts(dxa, x_dtype, 1, lo_first=False) if in_parts else None
    if needs.lora_A and has_x:
        dropped = drop(x, spec.dropout_p, rng, operands.mask).x
        dA = _gradient_A(dxa, parts, to_dtype(dropped, x_dtype), lora_A)
    return Grads(None, dA, dB, dg, None, dbias), dxa, parts


def _gradient_A(dxa: Tensor, parts: Tensor | None, operand: Tensor, lora_A: Tensor) -> Tensor:
    """dXAᵀ·D(x) [R, K] in lora_A's dtype. parts: hi, hi, lo of dXA [M, 3·R], or None."""
    if parts is None:
        dtype = _widest(operand, lora_A)
        grad = torch.mm(to_dtype(dxa, dtype).t(), to_dtype(operand, dtype))
        return to_dtype(grad, lora_A.dtype)
    if parts.dtype is torch.float16:  # lo of a small dXA would be subnormal
        return _gradient(operand, dxa, 1.0, lora_A).t().contiguous()
    hi, lo = mm_fp32(parts[:, lora_A.shape[0] :].t(), operand).chunk(2)
    return hi + lo


def _input_update(
    dxa: Tensor,
    parts: Tensor | None,
    lora_A: Tensor,
    x_dtype: torch.dtype,
    accumulator: Tensor | None = None,
) -> Tensor:
    """dXA·A [M, K]: of parts in their dtype, else in the wider of lora_A's and x's.

    If `accumulator` has that dtype, the update is added to it in place.
    """
    if parts is None:
        dtype, scale = torch.promote_types(x_dtype, lora_A.dtype), 1.0
        a, small = to_dtype(dxa, dtype), to_dtype(lora_A, dtype)
    else:
        prescale = _PRESCALE[x_dtype]
        wide = lora_A if prescale == 1.0 else lora_A * prescale
        a, scale = parts, 1.0 / prescale
        small = _three_parts(wide, x_dtype, 0, lo_first=True)
    if accumulator is None:
        return _scaled_mm(a, small, scale)
    if accumulator.dtype is a.dtype and not _is_added_first(accumulator):
        return accumulator.addmm_(a, small, alpha=scale)
    return _sum(_scaled_mm(a, small, scale), accumulator, x_dtype)


def _column_dot(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_m dy·z of each column, [N] in `dtype`; bfloat16 products are rounded before the sum.

    float16 products would overflow: they are made in float32, a panel of rows at a time.
    """
    if dy.dtype is z.dtype and dy.dtype in (torch.bfloat16, dtype):
        return torch.mul(dy, z).sum(0, dtype=dtype)
    # Each panel has two float32 temporaries of up to 4 times PANEL: fewer panels, fewer kernels.
    rows = max(UPCAST_ROWS, 4 * PANEL // max(1, dy.shape[1] * dtype.itemsize))
    total = torch.zeros(dy.shape[1], dtype=dtype, device=dy.device)
    for a, b in zip(dy.split(rows), z.split(rows), strict=True):
        total += torch.mul(to_dtype(a, dtype), b).sum(0)
    return total


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
        w = _dense(weight, lora_A[0], lora_B[0], dtype).to(dtype)
        y = torch.mm(to_dtype(x, dtype), w.t()).to(y_dtype)
    for e, rows in rows_of(operands.adapter_index, len(lora_A)).each():
        s = _shrink(dropped[rows], lora_A[e], 0)
        if factor != 1.0:
            s *= factor
        p[rows, : s.shape[1]] = s
        rows_y = y[rows]  # a view where the rows lie together
        _expand(s, lora_B[e], dropped[rows], scaling[e], accumulator=rows_y)
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
            dense = _dense(weight, lora_A[0], lora_B[0], dtype).to(dtype)
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


def dora_norm(
    weight: Tensor | Packed4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """‖W + s·B·A‖ of each row, B's columns gated: [N] in float32 (float64 for float64).

    On a GPU, for K ≥ `EXPANDED_NORM`: ‖W‖² + s·rowsum(B ⊙ (2·W·Aᵀ + s·B·A·Aᵀ)), which reads W once
    and writes nothing of its size. Its relative error is at most κ·√K·2⁻²⁴,
    κ = (‖W‖ + ‖s·B·A‖)²/norm²; beside a 16-bit W, κ·2⁻¹⁷/√K (rms) is added. κ grows if the update
    nearly cancels a row of W, which is likely by chance only for few columns. Otherwise W + s·B·A
    is summed, a panel of rows at a time.
    """
    dtype = stat_dtype(lora_A.dtype)
    if is_on_gpu_path(lora_A.device.type) and lora_A.shape[1] >= EXPANDED_NORM:
        w = _dense(weight, lora_A, lora_B, dtype)
        return _norm_from_products(w, lora_A, lora_B, scaling, rank_gate)
    A, B = to_dtype(lora_A, dtype), to_dtype(lora_B, dtype)
    if rank_gate is not None:
        B = B * to_dtype(rank_gate, dtype)
    return _norm_by_panels(weight, A, B, scaling)


def _norm_from_products(
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """`dora_norm` of a dense w [N, K]."""
    dtype = stat_dtype(lora_A.dtype)
    squares = torch.linalg.vector_norm(w, dim=1, dtype=dtype).square_()
    wa, gram = _shrink(w, lora_A, 0), _shrink(lora_A, lora_A, 0)
    B = to_dtype(lora_B, dtype)
    if rank_gate is not None:
        B = B * to_dtype(rank_gate, dtype)
    update = torch.addmm(wa, B, gram, beta=2, alpha=scaling)
    rowsum = torch.bmm(update.unsqueeze(1), B.unsqueeze(2)).view(-1)
    return torch.add(squares, rowsum, alpha=scaling).sqrt_()


def _norm_by_panels(weight: Tensor | Packed4bit, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    N, K, dtype = B.shape[0], A.shape[1], A.dtype
    out = torch.empty(N, dtype=dtype, device=A.device)
    step = max(64, PANEL // (K * dtype.itemsize))
    for start in range(0, N, step):
        n = slice(start, min(N, start + step))
        if isinstance(weight, Packed4bit):
            w = decode4bit.dense(weight, (N, K), dtype, rows=n)
        else:
            w = weight[n].to(dtype)
        update = torch.mm(B[n], A)
        torch.linalg.vector_norm(torch.add(w, update, alpha=scaling), dim=1, out=out[n])
    return out
