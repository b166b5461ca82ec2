"""Constraints of the kernels on a call's dtype, sizes and layout.

Tensor core kernels load 16 bytes at a time, so rows must be aligned multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.codes import Codes
from ...core.problem import Layout
from . import DECODE_ROWS, TWO_PASS

NO_BASE = "there is no base GEMM"
_FLOAT32 = "float32 products need every bit, which tensor cores drop"
_WIDE = 16  # bytes of a load
_ALIGNED = 8  # 16-bit elements of a load
_RUN = 32  # 4-bit codes of a load
_BLOCK = 64  # codes that the GEMV decodes with one scale


def layout(weight: Tensor | Codes | None, dtype: torch.dtype) -> Layout:
    """Return the weight's layout for a GEMM in `dtype`, to which a dense weight is cast first."""
    if weight is None:
        return Layout(unsupported_reason=NO_BASE)
    if isinstance(weight, Codes):
        aligned = weight.packed.data_ptr() % _WIDE == 0
        reason = None if aligned else "the packed bytes are not aligned to 16"
        return Layout(weight.blocksize, unsupported_reason=reason)
    row, col = weight.stride()
    columns = col != 1 and row == 1
    if weight.dtype is dtype:
        step = (col if columns else row) * weight.element_size()
        if (not columns and col != 1) or step % _WIDE or weight.data_ptr() % _WIDE:
            return Layout(0, columns, "the weight's rows are not whole and aligned 16 bytes")
    return Layout(0, columns)


def unsupported_reason(
    strategy: str, dtype: torch.dtype, weight: Layout, M: int, N: int, K: int
) -> str | None:
    """Return why the strategy cannot compute y = x·Wᵀ [M, N], or the backward dx; None if both can.

    The backward is decided with the forward, so that it never fails where the forward ran.
    """
    if weight.unsupported_reason == NO_BASE:
        return NO_BASE
    if dtype is torch.float32:
        return _FLOAT32
    if K % _ALIGNED:
        return f"K = {K} is no multiple of {_ALIGNED}, so that rows of x are not whole loads"
    if N % _ALIGNED:
        return f"N = {N} is no multiple of {_ALIGNED}, so that rows of dy are not whole loads"
    if weight.unsupported_reason is not None:
        return weight.unsupported_reason
    run = _RUN if strategy == TWO_PASS else _BLOCK
    if strategy != TWO_PASS:
        if M > DECODE_ROWS:
            return f"{M} rows are more than {DECODE_ROWS}"
        if weight.columns:
            return "the weight is stored as [K, N]"
        if 0 < weight.blocksize < _BLOCK:
            return f"blocks of {weight.blocksize} codes are less than {_BLOCK}"
    if weight.blocksize and K % run:
        return f"K = {K} is no multiple of {run}, so that rows are not whole runs of codes"
    return None
