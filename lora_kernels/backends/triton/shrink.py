"""P = D(x)·Aᵀ and dS = dZ·B: skinny GEMMs with split-K."""

from __future__ import annotations

import triton
import triton.language as tl

from .profiling import profiled
from .tiles import dot, keep_mask, load_tile, to_named


@triton.jit(do_not_specialize=["M"], **profiled("shrink_kernel", "MKR"))
def shrink_kernel(
    x,
    a,
    in_scale_ptr,
    mask_in,
    partials_ptr,
    M,
    K,
    R,
    k_per_split,
    p_scale,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write partials[split] = p_scale · mask(x ⊙ in_scale)[:, k]·a[:, k]ᵀ, k the range of `split`.

    x [M, K] and a [R, K] are `Matrix`, in_scale [K] or None, mask_in a `Mask` or None, partials
    float32 [num_splits, M, R]. Program (m, r, split) computes BLOCK_M × BLOCK_R of partials[split],
    a sum over k_per_split elements, a multiple of BLOCK_K. Without split-K, few rows would not
    occupy a GPU. The caller adds the partial sums in order.
    Rounding points: x ⊙ in_scale and a to WIDER; sums in float32.
    Bytes: x once for each BLOCK_R ranks, a once for each BLOCK_M rows, the partials; flops 2·M·K·R.
    Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, r0, k_start = pid_m * BLOCK_M, pid_r * BLOCK_R, split * k_per_split
    k_range = k_start, min(K, k_start + k_per_split)
    p = compute_p(
        x, a, in_scale_ptr, mask_in, m0, r0, k_range, M, R, TYPES, BLOCK_M, BLOCK_K, BLOCK_R
    )
    store_partial(partials_ptr, split, m0, r0, p * p_scale, M, R, BLOCK_M, BLOCK_R)


@triton.jit
def compute_p(
    x,
    a,
    in_scale_ptr,
    mask_in,
    m0,
    r0,
    k_range,
    M,
    R,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return mask(x ⊙ in_scale)·aᵀ [BLOCK_M, BLOCK_R] at [m0, r0], summed over k_range."""
    k_start, k_end = k_range
    offs_m, offs_r = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(k_start, k_end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k_end
        v = load_tile(x.ptr, offs_m, x.row, offs_k, x.col, mask_m, mask_k, TYPES.WIDE)
        if in_scale_ptr is not None:
            in_scale = tl.load(in_scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            v = v.to(tl.float32) * in_scale[None, :]
        if mask_in is not None:
            v = tl.where(keep_mask(mask_in, m0, k0, BLOCK_M, BLOCK_K), v, 0.0)
        a_tile = load_tile(a.ptr, offs_k, a.col, offs_r, a.row, mask_k, mask_r, TYPES.WIDE)
        p = dot(to_named(v, TYPES.WIDER), to_named(a_tile, TYPES.WIDER), p, TYPES.PRECISION)
    return p


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
