"""The kernel that decodes quantized weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_codes, to_dtype


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, w_ptr,
    N, K,
    LOG2_BLOCK: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
    TABLES: tl.constexpr, WIDE: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr,
    LOG2_NESTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Decode w [N, K] = code × scale + shift, including nested ones. Program (n, k, 0) computes a
    tile.

    TABLES: whether w is [E, N, K] with a table of scales for each expert, and program (n, k, e)
    computes a tile of expert e. Its rows are whole blocks.

    Rounding points: a nested scale twice, code × scale, + shift, w. Bytes: the codes, the scales
    and shifts, w.
    Tested by tests/triton/test_exact.py, bit for bit.
    """
    if TABLES:
        elements = tl.program_id(2).to(tl.int64) * N * K
        packed_ptr += elements * BITS // 8
        absmax_ptr += elements >> LOG2_BLOCK
        nested_code_ptr += tl.program_id(2) * 256
        w_ptr += elements
    codes = packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr
    FORMAT: tl.constexpr = (LOG2_BLOCK, WHOLE, WORDS, ASM)
    n0, k0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    w = load_codes(codes, n0, k0, N, K, BLOCK_N, BLOCK_K, FORMAT, WIDE, BITS, SHIFT, LOG2_NESTED)
    offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    at = offs_n[:, None] * K + offs_k[None, :]
    tl.store(w_ptr + at, to_dtype(w, w_ptr.dtype.element_ty), mask=mask)
