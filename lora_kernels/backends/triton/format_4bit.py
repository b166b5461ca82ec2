"""Kernels that quantize and decode 4-bit weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .profiling import profiled
from .tiles import load_codes, to_dtype


@triton.jit(**profiled("dequantize_kernel"))
def dequantize_kernel(
    codes,
    w_ptr,
    N,
    K,
    FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Decode w [N, K] = code × scale, including nested scales. Program (n, k) computes a tile.

    Rounding points: a nested scale twice, code × scale, w. Bytes: the codes, the scales, w.
    Tested by tests/triton/test_exact.py, bit for bit.
    """
    n0, k0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    w = load_codes(codes, n0, k0, N, K, BLOCK_N, BLOCK_K, FORMAT, WIDE)
    offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    if WIDE:
        offs_n = offs_n.to(tl.int64)
    at = offs_n[:, None] * K + offs_k[None, :]
    tl.store(w_ptr + at, to_dtype(w, w_ptr.dtype.element_ty), mask=mask)


@triton.jit(**profiled("quantize_kernel"))
def quantize_kernel(
    w_ptr,
    thresholds_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    smallest,
    WIDE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Quantize n contiguous elements as `reference.quantize_4bit`: packed [⌈n/2⌉], absmax [blocks].

    A program quantizes BLOCKS blocks. A short last block is divided by its scale, and full blocks
    are multiplied by the reciprocal. The scale of a block with NaN is NaN. Rounding points: the
    reciprocal, the product or quotient. Bytes: w once, codes, scales; 15 comparisons per element.
    Tested by tests/triton/test_codec.py, bit for bit.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if WIDE:
        block = block.to(tl.int64)
    first = block * BLOCKSIZE
    at = first[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    w = to_dtype(tl.load(w_ptr + at, mask=at < n, other=0.0), tl.float32)
    absmax = tl.max(tl.abs(w), 1)  # ignores NaN
    absmax = tl.where(tl.sum((w != w).to(tl.int32), 1) > 0, float("nan"), absmax)
    divisor = tl.maximum(absmax, smallest)
    short = first + BLOCKSIZE > n
    times = w * tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)[:, None]
    over = tl.div_rn(w, tl.broadcast_to(divisor[:, None], BLOCKS, BLOCKSIZE))
    scaled = tl.where(short[:, None], over, times)
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    below = tl.zeros([BLOCKS, BLOCKSIZE], dtype=tl.int32)
    for i in tl.static_range(15):
        below += (scaled > tl.load(thresholds_ptr + i)).to(tl.int32)
    code = tl.load(order_ptr + below).to(tl.int32)
    even, odd = tl.split(code.reshape(BLOCKS, BLOCKSIZE // 2, 2))
    bytes_at = first[:, None] // 2 + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + bytes_at, ((even << 4) | odd).to(tl.uint8), mask=2 * bytes_at < n)
    tl.store(absmax_ptr + block, tl.where(short, divisor, absmax), mask=first < n)
