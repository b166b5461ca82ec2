"""P = x·Aᵀ and dS = dZ·B: a skinny GEMM with split-K."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, load_tile, scale_columns, to_dtype


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x_ptr, stride_xm, stride_xk,
    a_ptr, stride_ar, stride_ak,
    in_scale_ptr, partials_ptr,
    M, K, R, k_per_split,
    WIDER: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write partials[split] = (x ⊙ in_scale)[:, k]·a[:, k]ᵀ, k the range of `split`.

    x [M, K], a [R, K], in_scale [K] or None, partials float32 [num_splits, M, R]. Program
    (m, r, split) computes BLOCK_M × BLOCK_R of partials[split], a sum over k_per_split elements, a
    multiple of BLOCK_K. Without split-K, few rows would not occupy a GPU. The caller adds the
    partial sums in order.
    Rounding points: x ⊙ in_scale and a to WIDER; sums in float32.
    Bytes: x once for each BLOCK_R ranks, a once for each BLOCK_M rows, the partials; flops 2·M·K·R.
    Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, r0, k_start = pid_m * BLOCK_M, pid_r * BLOCK_R, split * k_per_split
    offs_m, offs_r = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    k_end = min(K, k_start + k_per_split)
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(k_start, k_end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k_end
        x = load_tile(x_ptr, offs_m, stride_xm, offs_k, stride_xk, mask_m, mask_k, WIDE)
        x = scale_columns(x, in_scale_ptr, offs_k, mask_k)
        a = load_tile(a_ptr, offs_k, stride_ak, offs_r, stride_ar, mask_k, mask_r, WIDE)
        p = dot(to_dtype(x, WIDER), to_dtype(a, WIDER), p, PRECISION)
    store_partial(partials_ptr, split, m0, r0, p, M, R, BLOCK_M, BLOCK_R)


@triton.jit
def store_partial(
    partials_ptr, split, m0, r0, p, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Write p [BLOCK_M, BLOCK_R] to partials[split] at [m0, r0].

    Offsets are 64-bit, because num_splits·M·R may exceed 2³¹.
    """
    offs_m, offs_r = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    at = (split.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(partials_ptr + at, p, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
