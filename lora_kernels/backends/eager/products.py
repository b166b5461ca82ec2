"""Matrix products of the eager backend: of an activation with A or B, and with the base weight.

An activation is x or D(x) [M, K], dY or y [M, N], in 16 bits or wider. The adapter has a dtype of
its own. Above max(`UPCAST_ROWS`, `UPCAST_ROWS_PER_RANK`·R) rows no float32 copy of a 16-bit x, dY,
y or dx is made where the device multiplies 16-bit matrices into float32 (`library.has_out_dtype`).
The adapter's GEMMs run in one of three ways:

- its dtype is the activation's: in that dtype. P is in float32, and dS too if there is a rank gate;
  else dS has that dtype;
- float32 beside 16 bits, many rows: each small operand as two 16-bit parts, hi + lo. A GEMM with
  a float32 result takes both parts side by side and adds the halves; one with a 16-bit result
  takes hi·hi + hi·lo + lo·hi as one GEMM of 3·R terms;
- otherwise in the wider dtype, by copies of the narrower operands.

Rounding. Two parts hold a float32 to 2⁻¹⁷ (bfloat16) or 2⁻²² (float16; 2⁻¹⁶ where it is as small as
1e-5), so dA and dB beside them are exact to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...core.codes import Codes
from ...core.dtypes import to_dtype
from .. import decoder
from ..library import has_out_dtype, mm_fp32

# The most rows, and rows per rank, for which 16-bit activations are copied to float32 beside a
# float32 adapter. For few rows the copies move fewer bytes than two parts of the adapter. At 8 rows
# per rank two parts save 36 MB in the backward of 512×4096×4096, r = 64 (counted; an estimated
# 12 µs of an H100), and take 8 more kernels.
UPCAST_ROWS, UPCAST_ROWS_PER_RANK = 64, 8
MANY_ROWS = 64  # above it a copy of the adapters pays: A of a group stacked, adapters rounded
PANEL = 16 << 20  # bytes of each of two float32 temporaries of `column_dot`; fewer, more kernels
PART_ROUNDOFF = {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-22}  # of hi + lo
HALVES = (torch.bfloat16, torch.float16)
# float16 parts of an adapter are those of 256 times it: without that, elements below 1e-4 lose
# most of lo to subnormals. Elements of 256 and more overflow.
_PRESCALE = {torch.bfloat16: 1.0, torch.float16: 256.0}


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


def is_in_parts(activation: Tensor, adapter: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return True if GEMMs of the activation [M, n], in `dtype`, take the adapter split into
    16-bit parts (`_split_in_two`, `split_in_three`)."""
    dtype = dtype or activation.dtype
    return (
        dtype is not adapter.dtype
        and dtype in HALVES
        and activation.shape[0] > max(UPCAST_ROWS, UPCAST_ROWS_PER_RANK * min(adapter.shape))
        and has_out_dtype(activation)
        and torch.promote_types(dtype, adapter.dtype) is torch.float32
    )


def widen(activation: Tensor, adapter: Tensor) -> Tensor:
    """Return the activation [M, n] as GEMMs with the adapter take it: unchanged if the adapter is
    in parts, else in the wider dtype."""
    if is_in_parts(activation, adapter):
        return activation
    return to_dtype(activation, widest_dtype(activation, adapter))


def widest_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to which PyTorch promotes those of the tensors.

    >>> widest_dtype(torch.ones(1).bfloat16(), torch.ones(1))
    torch.float32
    """
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def split_in_three(t: Tensor, dtype: torch.dtype, dim: int, lo_first: bool) -> Tensor:
    """Return a float32 matrix t as hi, hi, lo in `dtype`, side by side along `dim`: [.., 3·n, ..].

    lo_first: whether the order is lo, hi, hi. The GEMM of a `lo_first` with one that is not gives
        hi·lo + hi·hi + lo·hi.
    """
    rows, columns = t.shape
    shape = (3, rows, columns) if dim == 0 else (rows, 3, columns)
    parts = t.new_empty(shape, dtype=dtype)
    hi_index, lo_index = (1, 0) if lo_first else (0, 2)
    both = parts.narrow(dim, hi_index, 2)
    both.copy_(t.unsqueeze(dim).expand_as(both))
    torch.sub(t, parts.select(dim, hi_index), out=parts.select(dim, lo_index))
    return parts.view(-1, columns) if dim == 0 else parts.view(rows, -1)


def _split_in_two(t: Tensor, scale: float, dtype: torch.dtype, dim: int) -> Tensor:
    """Return scale·t as hi and −lo in `dtype`, side by side along `dim`: [.., 2·n, ..].

    −lo, because one kernel computes hi − scale·t.
    """
    rows, columns = t.shape
    shape = (2, rows, columns) if dim == 0 else (rows, 2, columns)
    parts = t.new_empty(shape, dtype=dtype)
    hi, minus_lo = parts.unbind(dim)
    torch.mul(t, scale, out=hi)
    torch.sub(hi, t, alpha=scale, out=minus_lo)
    return parts.view(-1, columns) if dim == 0 else parts.view(rows, -1)


def scaled_mm(a: Tensor, b: Tensor, alpha: float, bias: Tensor | None = None) -> Tensor:
    """Return alpha·a·b + bias in the dtype of a and b, rounded once."""
    if bias is not None:
        return torch.addmm(to_dtype(bias, a.dtype), a, b, alpha=alpha)
    if alpha == 1.0:
        return torch.mm(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def shrink(a: Tensor, small: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Return P or dS, scale·a·small in float32 (float64 for float64).

    a: [M, n]. small: [n, R] for dim 1; [R, n] for dim 0, transposed.
    """
    if is_in_parts(a, small):
        prescale = _PRESCALE[a.dtype]
        parts = _split_in_two(small, scale if prescale == 1.0 else prescale, a.dtype, dim)
        hi, minus_lo = mm_fp32(a, parts if dim else parts.t()).chunk(2, dim=1)
        product = hi - minus_lo
        return product if prescale == 1.0 else product.mul_(scale / prescale)
    dtype = widest_dtype(a, small)
    a, small = to_dtype(a, dtype), to_dtype(small, dtype) if dim else to_dtype(small, dtype).t()
    if dtype in HALVES:
        product = mm_fp32(a, small)
        return product if scale == 1.0 else product.mul_(scale)
    return scaled_mm(a, small, scale)


def shrink_rounded(a: Tensor, small: Tensor, scale: float) -> Tensor:
    """Return P or dS as `shrink` does for a small [n, R], but in 16 bits if both have one 16-bit
    dtype."""
    if a.dtype is small.dtype and a.dtype in HALVES:
        return scaled_mm(a, small, scale)
    return shrink(a, small, 1, scale)


def expand(
    s: Tensor,
    small: Tensor,
    activation: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    accumulator: Tensor | None = None,
) -> Tensor:
    """Return the low-rank update scale·s·smallᵀ + bias [M, N]; s [M, R], small [N, R].

    The update has the dtype of `activation`, or a wider dtype of the adapter if that is not taken
    in parts. It is added to `accumulator` in place, if that is given.
    """
    dtype = widest_dtype(activation, small)
    if is_in_parts(activation, small):
        dtype = activation.dtype
        prescale = _PRESCALE[dtype]
        s = split_in_three(s, dtype, 1, lo_first=False)
        wide = small if prescale == 1.0 else small * prescale
        small, scale = split_in_three(wide, dtype, 1, lo_first=True), scale / prescale
    s, small = to_dtype(s, dtype), to_dtype(small, dtype)
    if accumulator is None:
        return scaled_mm(s, small.t(), scale, bias)
    if accumulator.dtype is dtype:
        if _is_added_first(accumulator):
            return accumulator.add_(torch.mm(s, small.t()), alpha=scale)
        return accumulator.addmm_(s, small.t(), alpha=scale)
    return accumulator.add_(scaled_mm(s, small.t(), scale))


def input_update(
    dxa: Tensor,
    parts: Tensor | None,
    lora_A: Tensor,
    x_dtype: torch.dtype,
    accumulator: Tensor | None = None,
) -> Tensor:
    """Return dXA·A [M, K]: of parts in their dtype, else in the wider of lora_A's and x's.

    If `accumulator` has that dtype, the update is added to it in place.
    """
    if parts is None:
        dtype, scale = torch.promote_types(x_dtype, lora_A.dtype), 1.0
        a, small = to_dtype(dxa, dtype), to_dtype(lora_A, dtype)
    else:
        prescale = _PRESCALE[x_dtype]
        wide = lora_A if prescale == 1.0 else lora_A * prescale
        a, scale = parts, 1.0 / prescale
        small = split_in_three(wide, x_dtype, 0, lo_first=True)
    if accumulator is None:
        return scaled_mm(a, small, scale)
    if accumulator.dtype is a.dtype and not _is_added_first(accumulator):
        return accumulator.addmm_(a, small, alpha=scale)
    return add_in_dtype(scaled_mm(a, small, scale), accumulator, x_dtype)


def adapter_gradient(a: Tensor, s: Tensor, scale: float, adapter: Tensor) -> Tensor:
    """Return scale·aᵀ·s [n, R] in the adapter's dtype: dB of a dY, or dAᵀ of a D(x).

    a: [M, n]. s: [M, R], S or dXA.
    """
    if is_in_parts(a, adapter):
        s, factor = _normalize(s, a.dtype)
        first = 1.0 if factor is not None else scale  # float16 takes the scale at the end
        hi, minus_lo = mm_fp32(a.t(), _split_in_two(s, first, a.dtype, 1)).chunk(2, dim=1)
        grad = hi - minus_lo
        return grad if factor is None else grad.mul_(scale / factor)
    dtype = widest_dtype(a, adapter)
    grad = scaled_mm(to_dtype(a, dtype).t(), to_dtype(s, dtype), scale)
    return to_dtype(grad, adapter.dtype)


def _normalize(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return t times a factor that brings its largest element to 256, and the factor, for parts in
    float16, whose range is small. In bfloat16 return t and None."""
    if dtype is not torch.float16:
        return t, None
    factor = 256.0 / t.abs().amax().clamp_(min=2.0**-100)
    return t * factor, factor


def gradient_A(dxa: Tensor, parts: Tensor | None, operand: Tensor, lora_A: Tensor) -> Tensor:
    """Return dA = dXAᵀ·D(x) [R, K] in lora_A's dtype.

    operand: D(x) [M, K]. parts: hi, hi, lo of dXA [M, 3·R], or None if dA takes no parts.
    """
    if parts is None:
        dtype = widest_dtype(operand, lora_A)
        grad = torch.mm(to_dtype(dxa, dtype).t(), to_dtype(operand, dtype))
        return to_dtype(grad, lora_A.dtype)
    if parts.dtype is torch.float16:  # lo of a small dXA would be subnormal
        return adapter_gradient(operand, dxa, 1.0, lora_A).t().contiguous()
    hi, lo = mm_fp32(parts[:, lora_A.shape[0] :].t(), operand).chunk(2)
    return hi + lo


def column_dot(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ_m dy·z of each column, [N] in `dtype`, for dy and z [M, N].

    bfloat16 products are rounded before the sum. float16 products would overflow: they are made in
    float32, a panel of rows at a time.
    """
    if dy.dtype is z.dtype and dy.dtype in (torch.bfloat16, dtype):
        return torch.mul(dy, z).sum(0, dtype=dtype)
    rows = max(UPCAST_ROWS, PANEL // max(1, dy.shape[1] * dtype.itemsize))
    total = torch.zeros(dy.shape[1], dtype=dtype, device=dy.device)
    for a, b in zip(dy.split(rows), z.split(rows), strict=True):
        total += torch.mul(to_dtype(a, dtype), b).sum(0)
    return total


def add_base(
    update: Tensor, a: Tensor, w: Tensor, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """Return update + a·w in `out_dtype`, with the base GEMM in `dtype`; may overwrite update."""
    a, w = to_dtype(a, dtype), to_dtype(w, dtype)
    if update.dtype is dtype and dtype is out_dtype and not _is_added_first(update):
        return update.addmm_(a, w)
    return add_in_dtype(torch.mm(a, w), update, out_dtype)


def add_in_dtype(base: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """Return base + update in `dtype`, in place in one of them if it has that dtype."""
    out = next((t for t in (base, update) if t.dtype is dtype), None)
    return torch.add(base, update, out=torch.empty_like(base, dtype=dtype) if out is None else out)


def _is_added_first(t: Tensor) -> bool:
    """Return True if `t.addmm_` starts its float32 sums from t, as CPU GEMMs do for few rows.

    That rounds more than a sum of two results. A GPU adds t in the epilogue.
    """
    return t.is_cpu and t.dtype is torch.float32


def dense_weight(
    weight: Tensor | Codes, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return W [N, K]; a 4-bit weight is decoded to `dtype`."""
    if isinstance(weight, Codes):
        return decoder.dense(weight, (lora_B.shape[0], lora_A.shape[1]), dtype)
    return weight
