"""P = D(x)·Aᵀ, and dS = dZ·B: thin products."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, keep_mask, load_tile, to_dtype


@triton.jit(do_not_specialize=["M"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    in_scale_ptr,
    rng_ptr,
    slots_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    k_share,
    p_scale,
    threshold,
    IN_SCALE: tl.constexpr,
    MASK_IN: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """slots[i] = p_scale · mask(x ⊙ in_scale)[:, share i]·a[:, share i]ᵀ, float32 [slots, M, R].

    x [M, K], a [R, K]. Program (m, r, i) makes BLOCK_M × BLOCK_R of slot i, which is the sum over
    k_share elements: few rows alone would not fill a GPU. The reader adds the slots, in order.
    Rounding points: x ⊙ in_scale and a to WIDER; sums in float32.
    Bytes: x once for each BLOCK_R ranks, a once for each BLOCK_M rows, the slots; flops 2·M·K·R.
    Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_m, pid_r, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p = share_of_p(
        x_ptr, a_ptr, in_scale_ptr, rng_ptr, pid_m * BLOCK_M, pid_r * BLOCK_R, slot * k_share,
        min(K, (slot + 1) * k_share), M, R, stride_xm, stride_xk, stride_ar, stride_ak, p_scale,
        threshold, IN_SCALE, MASK_IN, WIDER, PRECISION, WIDE, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    store_slot(slots_ptr, slot, pid_m * BLOCK_M, pid_r * BLOCK_R, p, M, R, BLOCK_M, BLOCK_R)


@triton.jit
def share_of_p(
    x_ptr,
    a_ptr,
    in_scale_ptr,
    rng_ptr,
    m0,
    r0,
    k_start,
    k_end,
    M,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    p_scale,
    threshold,
    IN_SCALE: tl.constexpr,
    MASK_IN: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] from [m0, r0] on, of the elements from k_start to k_end."""
    offs_m, offs_r = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k0 in range(k_start, k_end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k_end
        x = load_tile(x_ptr, offs_m, stride_xm, offs_k, stride_xk, mask_m, mask_k, WIDE)
        if IN_SCALE:
            in_scale = tl.load(in_scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            x = x.to(tl.float32) * in_scale[None, :]
        if MASK_IN:
            x = tl.where(keep_mask(rng_ptr, m0, k0, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, offs_k, stride_ak, offs_r, stride_ar, mask_k, mask_r, WIDE)
        p = dot(to_dtype(x, WIDER), to_dtype(a, WIDER), p, PRECISION)
    return p * p_scale


@triton.jit
def store_slot(slots_ptr, slot, m0, r0, p, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_m, offs_r = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    at = (slot.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(slots_ptr + at, p, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
