"""Native CPU kernels, one call a direction.

Forward: P = D(x)·Aᵀ; then either one pass that makes y = c⊙(x·Wᵀ + S·Bᵀ) + bias tile by tile in
registers ("single pass"), or the library's x·Wᵀ and one in-place pass for the rest; for few rows of
x one pass that dots W's rows with all of them ("streamed", of codes "decoded in registers").
Backward: one read of dY gives dS and dB; D(x) and dS give dA; dx is made in a single pass as y is,
with W in the other layout, or where that is none (and beside a streamed y of one row, which the
library is faster for) by the library.

Rounding points: P, S, dS and dXA are float32 and never rounded to 16 bits. In a single pass y and
dx round once, when they are stored; behind a library product, which rounds to the compute dtype,
once more. A 4-bit weight is decoded in float32, code × scale; where the product takes bfloat16, or
is the library's, it rounds once to that dtype, beside float32 and for few rows not at all: but for
bfloat16 on avx512bf16, where two rows at most keep 17 bits of a code, and more round once. Each
parameter's gradient is rounded once, from float32 to its own dtype. On avx512bf16 a bfloat16
subnormal counts as zero, as in the library's own bfloat16 products there. On amxbf16 a single pass
of 128 rows or more takes each float32 as the sum of three bfloat16, and so loses bits of what is
smaller than 1e-31 and makes NaN of what is infinite.
Deterministic for a given M, instruction set and thread count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core import reference
from ..core.call import (
    Grads,
    Guard,
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ..core.packed4bit import Packed4bit
from ..core.problem import Strategy
from . import decode4bit, native
from .rows import like_rows_of, rows_of

SINGLE_PASS = Strategy.FUSED
LIBRARY = Strategy.LIBRARY
STREAMED = Strategy.GEMV  # of x, beside a dense weight
FEW_ROWS = Strategy.GEMV_4BIT  # beside a 4-bit weight, in registers or the L1 cache
OF_FEW_ROWS = (STREAMED, FEW_ROWS)
SINGLE_PASS_ISAS = ("avx512", "avx512bf16", "amxbf16")

PANEL = 1 << 20  # bytes of a 4-bit weight decoded at once for the library's product

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What a prepared call wants of x beside its dtype where DLPack's functions do not tell: that it is
# what lies in its memory.
_OF_X = (
    ("__class__", Tensor),  # first: of None, which has no more than that
    ("is_cpu", True),
    (Tensor.is_contiguous, True),
    (Tensor.is_neg, False),
    (Tensor._is_zerotensor, False),
)


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, whatever their distance."""
    if t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t
    return t.contiguous()


def _rows_of_any(t: Tensor, columns: int) -> tuple[Tensor, int]:
    """Rows that are contiguous, whatever the dimensions before them, and their distance; a view of
    them would take as long as a kernel of a small layer."""
    if t.is_contiguous():
        return t, columns
    t = _rows(t.reshape(-1, columns))
    return t, t.stride(0)


def _vector(t: Tensor | None) -> Tensor | None:
    """A per-column or per-rank factor as contiguous float32."""
    return None if t is None else _cast(t, torch.float32).contiguous()


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _mask(dropout_p: float, rng: Tensor | None) -> tuple[int, int, float]:
    """What kernels take of dropout: rng pointer (0: none), threshold, 1/(1−p)."""
    if rng is None:
        return 0, 0, 1.0
    threshold = reference.dropout_threshold(dropout_p)
    return rng.data_ptr(), threshold, reference.dropout_scale(dropout_p)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _matrix(t: Tensor) -> Tensor:
    """A matrix that is contiguous along its rows or along its columns."""
    return t if t.stride(1) == 1 or t.stride(0) == 1 else t.contiguous()


def _panels(size: int, length: int, dtype: torch.dtype) -> Iterator[slice]:
    """Shares of `size` rows or columns that are `length` long, PANEL bytes each."""
    step = max(64, PANEL // (length * dtype.itemsize) // 64 * 64)
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def _weight(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def _library_base(
    xs: Tensor,
    weight: Tensor | Packed4bit | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> Tensor:
    """x·Wᵀ [..., N] by the library, 0 without a weight; of codes a panel of rows at a time."""
    N, K = shape
    if weight is None:
        return xs.new_zeros(*xs.shape[:-1], N, dtype=y_dtype)
    if not isinstance(weight, Packed4bit):
        return _cast(linear(xs, _cast(weight, dtype)), y_dtype)
    y = xs.new_empty(*xs.shape[:-1], N)
    for n in _panels(N, K, dtype):
        torch.mm(
            xs.view(-1, K),
            decode4bit.dense(weight, shape, dtype, rows=n).t(),
            out=y.view(-1, N)[:, n],
        )
    return _cast(y, y_dtype)


def _single_pass_dx(strategy: str, M: int) -> bool:
    if strategy == LIBRARY or (strategy == STREAMED and M == 1):
        return False
    return native.isa in SINGLE_PASS_ISAS


def _library_dx(
    dz: Tensor,
    weight: Tensor | Packed4bit | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> Tensor:
    """dZ·W [..., K] by the library, 0 without a weight; of codes a panel of columns at a time."""
    N, K = shape
    if weight is None:
        return dz.new_zeros(*dz.shape[:-1], K, dtype=x_dtype)
    if not isinstance(weight, Packed4bit):
        return _cast(torch.matmul(dz, _cast(weight, dtype)), x_dtype)
    dx = dz.new_empty(*dz.shape[:-1], K)
    for k in _panels(K, N, dtype):
        panel = decode4bit.dense(weight, shape, dtype, columns=k)
        torch.mm(dz.view(-1, N), panel, out=dx.view(-1, K)[:, k])
    return _cast(dx, x_dtype)


def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [..., N] for x [..., K] of M rows."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng = operands
    scaling, dropout_p, dtype, y_dtype, save_z = spec
    assert native.module is not None
    (R, K), (N, _), given = lora_A.shape, lora_B.shape, x
    lora_A, a_row = _rows_of_any(lora_A, K)
    b_row, b_column = (R, 1) if lora_B.is_contiguous() else lora_B.stride()
    x, x_row = _rows_of_any(x, K)
    M, xs = x.numel() // K, _cast(x, dtype)
    base = codes = None  # what the kernels are to multiply by
    if weight is None or strategy == LIBRARY:
        y = _library_base(xs, weight, (N, K), dtype, y_dtype)
    else:
        y = x.new_empty(*x.shape[:-1], N, dtype=y_dtype)
        if isinstance(weight, Packed4bit):
            codes = decode4bit.native_view(weight, (N, K))
        else:
            base = _matrix(_cast(weight, dtype))
    p = x.new_empty(M, R, dtype=torch.float32)
    z = y.new_empty(M, N) if save_z else None
    gate, c, b = _vector(rank_gate), _vector(column_scale), _vector(bias)
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)
    native.module.lora_linear(
        x.data_ptr(), _DTYPE[x.dtype], x_row, xs.data_ptr(), _DTYPE[dtype],
        x_row if xs is x else K, M, K, N, R, *_weight(base), codes,
        weight is not None and strategy in OF_FEW_ROWS,
        lora_A.data_ptr(), _DTYPE[lora_A.dtype], a_row,
        lora_B.data_ptr(), _DTYPE[lora_B.dtype], b_row, b_column,
        scaling, keep_scale, _ptr(gate), _ptr(c), _ptr(b), rng_ptr, threshold,
        p.data_ptr(), y.data_ptr(), _DTYPE[y_dtype], _ptr(z),
        torch.get_num_threads(),
    )  # fmt: skip
    return y if x.dim() == given.dim() else like_rows_of(given, y), Saved(p, z)


class PreparedCall:
    """`lora_linear` of one layer without gate, column scale and dropout, its arguments bound.

    y has x's dtype. The call holds while the tensors stay where they are in memory; it reads their
    values each time. It cannot be copied, since a copy would read the same memory.

    Args:
        few: the most rows of x.
        guards: checked before each call.
    """

    def __init__(
        self,
        weight: Tensor | Packed4bit,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        x_dtype: torch.dtype,
        dtype: torch.dtype,
        few: int,
        guards: Sequence[Guard],
    ) -> None:
        assert native.module is not None
        (R, K), (N, _) = lora_A.shape, lora_B.shape
        codes = decode4bit.native_view(weight, (N, K)) if isinstance(weight, Packed4bit) else None
        dense = None if isinstance(weight, Packed4bit) else weight
        cast = None if x_dtype is dtype else lambda x: x.to(dtype)
        self.weight = weight  # which owns the memory
        self.guards = tuple(zip(*guards, strict=True))  # objects, keys, expected values
        self._forward = native.module.prepare(
            few, K, N, R, *_weight(dense), codes,
            lora_A.data_ptr(), _DTYPE[lora_A.dtype], lora_A.stride(0),
            lora_B.data_ptr(), _DTYPE[lora_B.dtype], lora_B.stride(0), lora_B.stride(1),
            scaling, _DTYPE[x_dtype], _DTYPE[dtype],
            *zip(*_OF_X, ("dtype", x_dtype), strict=True),
            "shape", Tensor.data_ptr, Tensor.new_empty, Tensor.is_neg, cast, _vector,
            torch.get_num_threads,
        )  # fmt: skip

    def __reduce__(self) -> NoReturn:
        raise TypeError("a prepared call: got copied or pickled, want one made by prepare")

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return y [..., N] for x [..., K]; None if a guard fails, or x or its rows do not fit."""
        return self._forward(x, bias, *self.guards)  # type: ignore[no-any-return]


def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [..., N] and x [..., K].

    dx is flat if rows had to be brought together.
    """
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng = operands
    (p, z, _), (scaling, dropout_p, dtype, *_) = saved, spec
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias = needs
    assert native.module is not None
    lora_A, (N, R), K = _rows(lora_A), lora_B.shape, x.shape[-1]
    dy, dy_row = _rows_of_any(dy, N)
    x, x_row = _rows_of_any(x, K)
    M = x.numel() // K
    dz = dy if column_scale is None or not need_x else dy * column_scale.to(dy.dtype)
    dz = _cast(dz, dtype) if need_x else dy
    dx = base = codes = None
    if need_x and (weight is None or not _single_pass_dx(strategy, M)):
        dx = _library_dx(dz, weight, (N, K), dtype, x.dtype)
    elif need_x:
        dx = x.new_empty(*x.shape)
        if isinstance(weight, Packed4bit):
            codes = decode4bit.native_view(weight, (N, K))
        else:
            assert weight is not None
            base = _matrix(_cast(weight, dtype))
    dA = lora_A.new_empty(R, K) if need_A else None
    dB = lora_B.new_empty(N, R) if need_B else None
    dg = p.new_empty(R) if need_gate else None
    dc = p.new_empty(N) if need_column_scale else None
    dbias = p.new_empty(N) if need_bias else None
    gate, c = _vector(rank_gate), _vector(column_scale)
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)
    native.module.lora_linear_backward(
        dy.data_ptr(), _DTYPE[dy.dtype], dy_row,
        dz.data_ptr(), _DTYPE[dz.dtype], dy_row if dz is dy else N,
        x.data_ptr(), _DTYPE[x.dtype], x_row, M, K, N, R,
        *_weight(base), codes, lora_A.data_ptr(), _DTYPE[lora_A.dtype], lora_A.stride(0),
        lora_B.data_ptr(), _DTYPE[lora_B.dtype], lora_B.stride(0), lora_B.stride(1),
        scaling, keep_scale, _ptr(gate), _ptr(c), rng_ptr, threshold,
        p.data_ptr(), _ptr(z) if need_column_scale else 0,
        _ptr(dx), _ptr(dA), _ptr(dB), _ptr(dg), _ptr(dc), _ptr(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return Grads(dx, dA, dB, dg, dc, dbias)


def multi_lora_linear(
    operands: MultiOperands, spec: MultiSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K], whose rows each have an adapter or none.

    One base GEMM for all rows, rounded with the bias to y, and an update of each adapter's rows in
    place. If they do not lie together, x's rows are sorted before, and y's put back after.
    """
    x, weight, lora_A, lora_B, index, bias, rng = operands
    scaling, dropout_p, dtype, y_dtype = spec
    assert native.module is not None
    (M, K), N = x.shape, lora_B[0].shape[0]
    lora_A, R = [_rows(A) for A in lora_A], max(A.shape[0] for A in lora_A)
    order, runs = rows_of(index, len(lora_A))
    x = _rows(x) if order is None else x.index_select(0, order)
    xs, base, codes = _cast(x, dtype), None, None
    b = _vector(bias)
    if weight is None or strategy == LIBRARY:
        y = _library_base(xs, weight, (N, K), dtype, y_dtype)
        if b is not None:
            y, b = _cast(y + b, y_dtype), None
    else:
        y = x.new_empty(M, N, dtype=y_dtype)
        if isinstance(weight, Packed4bit):
            codes = decode4bit.native_view(weight, (N, K))
        else:
            base = _matrix(_cast(weight, dtype))
    p = x.new_zeros(M, R, dtype=torch.float32)
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)
    places = order if order is not None or rng is None else torch.arange(M, device=index.device)
    native.module.multi_lora_linear(
        x.data_ptr(), _DTYPE[x.dtype], x.stride(0), xs.data_ptr(), _DTYPE[dtype], xs.stride(0),
        M, K, N, R, *_weight(base), codes, weight is not None and strategy in OF_FEW_ROWS,
        _adapters(runs, lora_A, lora_B, scaling), _DTYPE[lora_A[0].dtype],
        _DTYPE[lora_B[0].dtype], keep_scale, _ptr(b), rng_ptr, threshold, _ptr(places),
        p.data_ptr(), y.data_ptr(), _DTYPE[y_dtype], torch.get_num_threads(),
    )  # fmt: skip
    if order is None:
        return y, Saved(p)
    place = _inverse(order)
    return y.index_select(0, place), Saved(p.index_select(0, place))


def multi_lora_linear_backward(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    strategy: str,
) -> MultiGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, weight, lora_A, lora_B, index, _, rng = operands
    p, (scaling, dropout_p, dtype, _) = saved.p, spec
    need_x, need_A, need_B, need_bias = needs
    assert native.module is not None
    (M, K), N = x.shape, lora_B[0].shape[0]
    lora_A = [_rows(A) for A in lora_A]
    dbias = dy.sum(0, dtype=torch.float32) if need_bias else None
    order, runs = rows_of(index, len(lora_A))
    if order is None:
        dy, x = _rows(dy), _rows(x)
    else:
        dy, x, p = (t.index_select(0, order) for t in (dy, x, p))
    dz = _cast(dy, dtype) if need_x else dy
    dx = base = codes = None
    if need_x and (weight is None or not _single_pass_dx(strategy, M)):
        dx = _library_dx(dz, weight, (N, K), dtype, x.dtype)
    elif need_x:
        dx = x.new_empty(M, K)
        if isinstance(weight, Packed4bit):
            codes = decode4bit.native_view(weight, (N, K))
        else:
            assert weight is not None
            base = _matrix(_cast(weight, dtype))
    named = {run[0] for run in runs}

    def gradients(parameters: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
        return [
            None if not wanted
            else t.new_empty(t.shape) if e in named
            else t.new_zeros(t.shape)
            for e, (t, wanted) in enumerate(zip(parameters, need, strict=True))
        ]  # fmt: skip

    dA, dB = gradients(lora_A, need_A), gradients(lora_B, need_B)
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)
    places = order if order is not None or rng is None else torch.arange(M, device=index.device)
    native.module.multi_lora_linear_backward(
        dy.data_ptr(), _DTYPE[dy.dtype], dy.stride(0),
        dz.data_ptr(), _DTYPE[dz.dtype], dz.stride(0),
        x.data_ptr(), _DTYPE[x.dtype], x.stride(0), M, K, N, p.shape[1], *_weight(base), codes,
        _adapters(runs, lora_A, lora_B, scaling, dA, dB), _DTYPE[lora_A[0].dtype],
        _DTYPE[lora_B[0].dtype], keep_scale, rng_ptr, threshold, _ptr(places), p.data_ptr(),
        _ptr(dx), torch.get_num_threads(),
    )  # fmt: skip
    if dx is not None and order is not None:
        dx = dx.index_select(0, _inverse(order))
    return MultiGrads(dx, dA, dB, dbias)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )


def _adapters(
    runs: Sequence[tuple[int, int, int]],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dA: Sequence[Tensor | None] | None = None,
    dB: Sequence[Tensor | None] | None = None,
) -> list[tuple[object, ...]]:
    """What the kernels take of each adapter that has rows."""
    return [
        (
            start, stop, lora_A[e].shape[0], scaling[e], lora_A[e].data_ptr(), lora_A[e].stride(0),
            lora_B[e].data_ptr(), lora_B[e].stride(0), lora_B[e].stride(1),
            _ptr(dA[e] if dA else None), _ptr(dB[e] if dB else None),
        )
        for e, start, stop in runs
    ]  # fmt: skip


def dora_norm(
    weight: Tensor | Packed4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """‖W + scaling · (B ⊙ gate)·A‖ of each row: float32 [N]."""
    assert native.module is not None
    (R, K), N = lora_A.shape, lora_B.shape[0]
    lora_A, codes, w = _rows(lora_A), None, (0, 0, 0)
    if isinstance(weight, Packed4bit):
        codes = decode4bit.native_view(weight, (N, K))
    else:
        weight = _rows(weight)
        w = (weight.data_ptr(), _DTYPE[weight.dtype], weight.stride(0))
    norm, gate = lora_A.new_empty(N, dtype=torch.float32), _vector(rank_gate)
    native.module.row_norm(
        *w, codes, lora_A.data_ptr(), _DTYPE[lora_A.dtype], lora_A.stride(0),
        lora_B.data_ptr(), _DTYPE[lora_B.dtype], lora_B.stride(0), lora_B.stride(1),
        _ptr(gate), N, K, R, scaling, norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return norm
