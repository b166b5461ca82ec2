"""Native CPU kernels, one call a direction.

Forward: P = D(x)·Aᵀ; then y = c⊙(x·Wᵀ + S·Bᵀ) + bias.

- "fused": one kernel computes y tile by tile in registers.
- "library": oneDNN or MKL computes x·Wᵀ; one in-place pass over y adds the rest.
- "gemv", and "gemv_quantized" for a quantized weight: for few rows of x, one pass over W.

Backward: one read of dY gives dS and dB; D(x) and dS give dA. The fused kernel computes dx with W
in the other layout. oneDNN or MKL computes dx if there is no fused kernel, and for "gemv" of one
row.

Rounding points: P, S, dS and dXA stay in float32. The fused kernel rounds y and dx once, in the
epilogue. "library" rounds the base GEMM to the compute dtype, and y again. A 4-bit weight is
decoded in float32, code × scale, and rounded once if the base GEMM is in bfloat16 or in the
library. For few rows it is not rounded, except for bfloat16 on avx512bf16: up to two rows keep 17
bits of a code, more rows round it once. Each parameter's gradient is rounded once, from float32 to
its own dtype.

Subnormals and infinities: on avx512bf16 bfloat16 subnormals are flushed to zero, as oneDNN does. On
amxbf16, float32 GEMMs with M ≥ 128 (MIN_SPLIT_ROWS) use a 3×bf16 split: values below 1e-31 lose
bits, and infinite inputs produce NaN.
Deterministic for a given M, instruction set and thread count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

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
from ...core.dropout import dropout_scale, dropout_threshold
from ...core.dtypes import DTYPE_NUMBERS, to_dtype
from ...core.problem import Strategy
from .. import decoder
from ..rows import rows_of, set_leading_dims_
from . import native

FUSED = Strategy.FUSED
LIBRARY = Strategy.LIBRARY
GEMV = Strategy.GEMV  # of x, beside a dense weight
GEMV_QUANTIZED = Strategy.GEMV_QUANTIZED  # decodes in registers or the L1 cache
GEMVS = (GEMV, GEMV_QUANTIZED)
STRATEGIES = (FUSED, LIBRARY, GEMV, GEMV_QUANTIZED)  # in the order of their numbers in C++
FUSED_ISAS = ("avx512", "avx512bf16", "amxbf16")

PANEL = 1 << 20  # bytes of a 4-bit weight decoded at once for the library GEMM


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, whatever their distance."""
    if t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t
    return t.contiguous()


def rows_of_any(t: Tensor, columns: int) -> tuple[Tensor, int]:
    """Rows that are contiguous, whatever the dimensions before them, and their distance; a view of
    them would take as long as a kernel of a small layer."""
    if t.is_contiguous():
        return t, columns
    t = _rows(t.reshape(-1, columns))
    return t, t.stride(0)


def vector(t: Tensor | None) -> Tensor | None:
    """A per-column or per-rank factor as contiguous float32."""
    return None if t is None else to_dtype(t, torch.float32).contiguous()


# Arguments of the native kernels, in the order in which csrc/bindings.cpp reads them. They hold
# addresses, so the tensors must live until the call returns.


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def pack_rows(t: Tensor, row: int) -> tuple[int, int, int, int]:
    """Pack contiguous rows, `row` elements apart, of any leading dimensions."""
    return t.data_ptr(), DTYPE_NUMBERS[t.dtype], row, 1


def _pack_matrix(t: Tensor | None, columns: int) -> tuple[int, int, int, int] | None:
    """Pack a matrix: address, dtype, strides."""
    if t is None:
        return None
    if t.is_contiguous():
        return t.data_ptr(), DTYPE_NUMBERS[t.dtype], columns, 1
    row, column = t.stride()
    return t.data_ptr(), DTYPE_NUMBERS[t.dtype], row, column


def pack_dropout(
    dropout_p: float, rng: Tensor | None, rows: Tensor | None = None
) -> tuple[tuple[int, int, int], float]:
    """Pack the mask (state, threshold, each row's index in it); return 1/(1−p) beside it."""
    if rng is None:
        return (0, 0, 0), 1.0
    mask = rng.data_ptr(), dropout_threshold(dropout_p), pointer(rows)
    return mask, dropout_scale(dropout_p)


def _pack_layer(
    weight: tuple[Tensor | None, object],
    adapter: tuple[Tensor | None, Tensor | None],
    sizes: tuple[int, int, int, int],
    scaling: float,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout: tuple[tuple[int, int, int], float],
) -> tuple[object, ...]:
    """Pack what both directions take of a layer.

    Args:
        weight: as `_fused_weight` returns it.
        adapter: lora_A and lora_B.
        sizes: M, K, N, R.
        factors: rank_gate, column_scale and bias, as `vector` returns them.
        dropout: as `pack_dropout` returns it.
    """
    (dense, codes), (lora_A, lora_B), (M, K, N, R) = weight, adapter, sizes
    (gate, c, bias), (mask, keep_scale), threads = factors, dropout, torch.get_num_threads()
    W, A, B = _pack_matrix(dense, K), _pack_matrix(lora_A, K), _pack_matrix(lora_B, R)
    g = 0 if gate is None else gate.data_ptr()  # inline: a small layer takes 7 µs
    s, b = 0 if c is None else c.data_ptr(), 0 if bias is None else bias.data_ptr()
    return W, codes, M, K, N, R, A, B, scaling, g, s, b, mask, keep_scale, threads


def _matrix(t: Tensor) -> Tensor:
    """A matrix that is contiguous along its rows or along its columns."""
    return t if t.stride(1) == 1 or t.stride(0) == 1 else t.contiguous()


def _panels(size: int, length: int, dtype: torch.dtype) -> Iterator[slice]:
    """Shares of `size` rows or columns that are `length` long, PANEL bytes each."""
    step = max(64, PANEL // (length * dtype.itemsize) // 64 * 64)
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def _fused_weight(
    weight: Tensor | Codes, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor | None, object]:
    """Return the operand of the native base GEMM: a dense weight in `dtype`, or codes."""
    if isinstance(weight, Codes):
        return None, decoder.native_view(weight, shape)
    return _matrix(to_dtype(weight, dtype)), None


def _library_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the oneDNN or MKL GEMM for operands in `dtype`.

    Without AVX-512 a 16-bit GEMM takes several times a float32 one, and longer than widening a
    panel of the weight before each (benchmarks/NOTES.md).
    """
    is_slow = dtype is not torch.float32 and native.isa not in FUSED_ISAS and not native.amx_bf16
    return torch.float32 if is_slow else dtype


def _library_base(
    xs: Tensor,
    weight: Tensor | Codes | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> Tensor:
    """x·Wᵀ [..., N] by the library, 0 without a weight; by panels of rows if W is not as it is."""
    N, K = shape
    if weight is None:
        return xs.new_zeros(*xs.shape[:-1], N, dtype=y_dtype)
    wide = _library_dtype(dtype)
    if isinstance(weight, Tensor) and wide is dtype:
        return to_dtype(linear(xs, to_dtype(weight, dtype)), y_dtype)
    xs = to_dtype(xs, wide)
    y = xs.new_empty(*xs.shape[:-1], N)
    for n in _panels(N, K, wide):
        panel = _panel(weight, shape, wide, rows=n)
        torch.mm(xs.view(-1, K), panel.t(), out=y.view(-1, N)[:, n])
    return to_dtype(y, y_dtype)


def _panel(
    weight: Tensor | Codes,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """Return rows or columns of W in `dtype`, dense."""
    if isinstance(weight, Tensor):
        return to_dtype(weight[rows, columns], dtype)
    return decoder.dense(weight, shape, dtype, rows=rows, columns=columns)


@torch.no_grad()  # a direct call's graph is its own Function's
def library_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·Wᵀ [..., N] for a dense weight [N, K] in x's dtype, by the library."""
    N, K = weight.shape
    return _library_base(x, weight, (N, K), x.dtype, x.dtype)


@torch.no_grad()
def library_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dY·W [..., K] for a dense weight [N, K] in dY's dtype, by the library."""
    N, K = weight.shape
    return _library_dx(dy, weight, (N, K), dy.dtype, dy.dtype)


def _is_dx_fused(strategy: str, M: int) -> bool:
    assert native.module is not None
    return native.module.is_dx_fused(STRATEGIES.index(strategy), M)  # type: ignore[no-any-return]


def _library_dx(
    dz: Tensor,
    weight: Tensor | Codes | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> Tensor:
    """dZ·W [..., K] by the library, 0 without a weight; by panels of columns as `_library_base`."""
    N, K = shape
    if weight is None:
        return dz.new_zeros(*dz.shape[:-1], K, dtype=x_dtype)
    wide = _library_dtype(dtype)
    if isinstance(weight, Tensor) and wide is dtype:
        return to_dtype(torch.matmul(dz, to_dtype(weight, dtype)), x_dtype)
    dz = to_dtype(dz, wide)
    dx = dz.new_empty(*dz.shape[:-1], K)
    for k in _panels(K, N, wide):
        panel = _panel(weight, shape, wide, columns=k)
        torch.mm(dz.view(-1, N), panel, out=dx.view(-1, K)[:, k])
    return to_dtype(dx, x_dtype)


def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [..., N] for x [..., K] of M rows."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng, *_ = operands
    scaling, dropout_p, dtype, y_dtype, save_z = spec
    assert native.module is not None
    (R, K), N, given = lora_A.shape, lora_B.shape[0], x
    lora_A = _rows(lora_A)
    x, x_row = rows_of_any(x, K)
    M, xs = x.numel() // K, to_dtype(x, dtype)
    fused: tuple[Tensor | None, object] = None, None
    if weight is None or strategy == LIBRARY:
        y = _library_base(xs, weight, (N, K), dtype, y_dtype)
    else:
        y = x.new_empty(*x.shape[:-1], N, dtype=y_dtype)
        fused = _fused_weight(weight, (N, K), dtype)
    p = x.new_empty(M, R, dtype=torch.float32)
    z = y.new_empty(M, N) if save_z else None
    factors = vector(rank_gate), vector(column_scale), vector(bias)
    adapter, dropout = (lora_A, lora_B), pack_dropout(dropout_p, rng)
    layer = _pack_layer(fused, adapter, (M, K, N, R), scaling, factors, dropout)
    rows = pack_rows(x, x_row)
    cast_rows = rows if xs is x else pack_rows(xs, K)
    few_rows = weight is not None and strategy in GEMVS
    outputs = p.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[y_dtype], pointer(z)
    native.module.lora_linear(layer, (rows, cast_rows, few_rows, *outputs))
    return y if x.dim() == given.dim() else set_leading_dims_(y, given.shape[:-1]), Saved(p, z)


def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [..., N] and x [..., K].

    dx is flat if rows had to be brought together.
    """
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng, *_ = operands
    (p, z, _), (scaling, dropout_p, dtype, *_) = saved, spec
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias, *_ = needs
    assert native.module is not None
    lora_A, (N, R), K = _rows(lora_A), lora_B.shape, x.shape[-1]
    dy, dy_row = rows_of_any(dy, N)
    x, x_row = rows_of_any(x, K)
    M = x.numel() // K
    dz = dy if column_scale is None or not need_x else dy * column_scale.to(dy.dtype)
    dz = to_dtype(dz, dtype) if need_x else dy
    dx: Tensor | None = None
    fused: tuple[Tensor | None, object] = None, None
    if need_x and (weight is None or not _is_dx_fused(strategy, M)):
        dx = _library_dx(dz, weight, (N, K), dtype, x.dtype)
    elif need_x:
        assert weight is not None
        dx = x.new_empty(*x.shape)
        fused = _fused_weight(weight, (N, K), dtype)
    dA = lora_A.new_empty(R, K) if need_A else None
    dB = lora_B.new_empty(N, R) if need_B else None
    dg = p.new_empty(R) if need_gate else None
    dc = p.new_empty(N) if need_column_scale else None
    dbias = p.new_empty(N) if need_bias else None
    factors = vector(rank_gate), vector(column_scale), None
    adapter, dropout = (lora_A, lora_B), pack_dropout(dropout_p, rng)
    layer = _pack_layer(fused, adapter, (M, K, N, R), scaling, factors, dropout)
    dy_rows = pack_rows(dy, dy_row)
    dz_rows = dy_rows if dz is dy else pack_rows(dz, N)
    saved_pointers = p.data_ptr(), pointer(z) if need_column_scale else 0
    gradients = map(pointer, (dx, dA, dB, dg, dc, dbias))
    rows = dy_rows, dz_rows, pack_rows(x, x_row)
    native.module.lora_linear_backward(layer, (*rows, *saved_pointers, *gradients))
    return Grads(dx, dA, dB, dg, dc, dbias)


def multi_lora_linear(
    operands: MultiOperands, spec: MultiSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K], whose rows each have an adapter or none.

    One base GEMM for all rows, rounded with the bias to y, and an update of each adapter's rows in
    place. If they do not lie together, x's rows are sorted before, and y's put back after.
    """
    x, weight, lora_A, lora_B, index, bias, rng, *_ = operands
    scaling, dropout_p, dtype, y_dtype = spec
    assert native.module is not None
    (M, K), N = x.shape, lora_B[0].shape[0]
    lora_A, R = [_rows(A) for A in lora_A], max(A.shape[0] for A in lora_A)
    order, runs = rows_of(index, len(lora_A))
    x = _rows(x) if order is None else x.index_select(0, order)
    xs, b = to_dtype(x, dtype), vector(bias)
    fused: tuple[Tensor | None, object] = None, None
    if weight is None or strategy == LIBRARY:
        y = _library_base(xs, weight, (N, K), dtype, y_dtype)
        if b is not None:
            y, b = to_dtype(y + b, y_dtype), None
    else:
        y = x.new_empty(M, N, dtype=y_dtype)
        fused = _fused_weight(weight, (N, K), dtype)
    p = x.new_zeros(M, R, dtype=torch.float32)
    places = order if order is not None or rng is None else torch.arange(M, device=x.device)
    dropout = pack_dropout(dropout_p, rng, places)
    layer = _pack_layer(fused, (None, None), (M, K, N, R), 0.0, (None, None, b), dropout)
    adapters = _pack_adapters(runs, lora_A, lora_B, scaling)
    few_rows = weight is not None and strategy in GEMVS
    outputs = p.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[y_dtype], 0
    rows = _pack_matrix(x, K), _pack_matrix(xs, K)
    native.module.multi_lora_linear(layer, adapters, (*rows, few_rows, *outputs))
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
    x, weight, lora_A, lora_B, index, _, rng, *_ = operands
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
    dz = to_dtype(dy, dtype) if need_x else dy
    dx: Tensor | None = None
    fused: tuple[Tensor | None, object] = None, None
    if need_x and (weight is None or not _is_dx_fused(strategy, M)):
        dx = _library_dx(dz, weight, (N, K), dtype, x.dtype)
    elif need_x:
        assert weight is not None
        dx = x.new_empty(M, K)
        fused = _fused_weight(weight, (N, K), dtype)
    named = {run[0] for run in runs}

    def gradients(parameters: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
        new = [t.new_empty if e in named else t.new_zeros for e, t in enumerate(parameters)]
        return [
            make(t.shape) if wanted else None
            for make, t, wanted in zip(new, parameters, need, strict=True)
        ]

    dA, dB = gradients(lora_A, need_A), gradients(lora_B, need_B)
    places = order if order is not None or rng is None else torch.arange(M, device=x.device)
    dropout, sizes = pack_dropout(dropout_p, rng, places), (M, K, N, p.shape[1])
    layer = _pack_layer(fused, (None, None), sizes, 0.0, (None, None, None), dropout)
    adapters = _pack_adapters(runs, lora_A, lora_B, scaling, dA, dB)
    rows = _pack_matrix(dy, N), _pack_matrix(dz, N), _pack_matrix(x, K)
    pointers = p.data_ptr(), 0, pointer(dx), 0, 0, 0, 0, 0  # the others are each adapter's
    native.module.multi_lora_linear_backward(layer, adapters, (*rows, *pointers))
    if dx is not None and order is not None:
        dx = dx.index_select(0, _inverse(order))
    return MultiGrads(dx, dA, dB, dbias)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )


def _pack_adapters(
    runs: Sequence[tuple[int, int, int]],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dA: Sequence[Tensor | None] | None = None,
    dB: Sequence[Tensor | None] | None = None,
) -> tuple[tuple[object, ...], ...]:
    """Pack each adapter that has rows."""

    def packed(e: int, start: int, stop: int) -> tuple[object, ...]:
        R, K = lora_A[e].shape
        A, B = _pack_matrix(lora_A[e], K), _pack_matrix(lora_B[e], R)
        gradients = pointer(dA[e] if dA else None), pointer(dB[e] if dB else None)
        return start, stop, A, B, R, scaling[e], *gradients

    return tuple(packed(*run) for run in runs)


def dora_norm(
    weight: Tensor | Codes,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """‖W + scaling · (B ⊙ gate)·A‖ of each row: float32 [N]."""
    assert native.module is not None
    (R, K), N = lora_A.shape, lora_B.shape[0]
    lora_A, gate = _rows(lora_A), vector(rank_gate)
    norm, codes, dense = lora_A.new_empty(N, dtype=torch.float32), None, None
    if isinstance(weight, Codes):
        codes = decoder.native_view(weight, (N, K))
    else:
        dense = _rows(weight)
    W, A, B = _pack_matrix(dense, K), _pack_matrix(lora_A, K), _pack_matrix(lora_B, R)
    operands, sizes = (W, codes, A, B, pointer(gate)), (N, K, R, scaling)
    native.module.row_norm((*operands, *sizes, norm.data_ptr(), torch.get_num_threads()))
    return norm
