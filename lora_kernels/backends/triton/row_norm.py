"""DoRA's row norm: ‖W + (B ⊙ g)·A‖ by rows, the sum made in registers and nowhere else."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, load_codes, load_tile, to_dtype


@triton.jit
def row_norm_kernel(
    w_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    a_ptr,
    b_ptr,
    gate_ptr,
    slots_ptr,
    N,
    K,
    R,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    k_share,
    scaling,
    CODES: tl.constexpr,
    GATE: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """slots[i, n] = Σ (W + scaling · (B ⊙ gate)·A)² over the i-th share of row n.

    W [N, K] dense or 4-bit codes, a [R, K], b [N, R]; slots float32 [slots, N]. Program (n, i)
    makes BLOCK_N rows of slot i from k_share elements of each. The reader adds the slots.
    Rounding points: b ⊙ gate and a to WIDER; all else in float32.
    Bytes: W once, a once for each BLOCK_N rows, b; flops 2·N·K·R. Deterministic.
    Tested by tests/triton/test_dora_norm.py.
    """
    pid_n, slot = tl.program_id(0), tl.program_id(1)
    offs_n, offs_r = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    end = min(K, (slot + 1) * k_share)
    for k0 in range(slot * k_share, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        if CODES:
            w = load_codes(
                w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
                pid_n * BLOCK_N, k0, N, K, BLOCK_N, BLOCK_K, LOG2_BLOCK, NESTED, WHOLE, WORDS, ASM,
                WIDE,
            )  # fmt: skip
        else:
            w = load_tile(w_ptr, offs_n, stride_wn, offs_k, stride_wk, mask_n, mask_k, WIDE)
        update = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if ONE_BLOCK:
            update = add_ranks(
                update, a_ptr, b_ptr, gate_ptr, offs_n, offs_k, offs_r, mask_n, mask_k, R,
                stride_ar, stride_ak, stride_bn, stride_br, GATE, WIDER, PRECISION, WIDE,
            )  # fmt: skip
        else:
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                update = add_ranks(
                    update, a_ptr, b_ptr, gate_ptr, offs_n, offs_k, r0 + offs_r, mask_n, mask_k, R,
                    stride_ar, stride_ak, stride_bn, stride_br, GATE, WIDER, PRECISION, WIDE,
                )  # fmt: skip
        row = w.to(tl.float32) + update * scaling
        total += tl.sum(row * row, 1)
    tl.store(slots_ptr + slot * N + offs_n, total, mask=mask_n)


@triton.jit
def add_ranks(
    update,
    a_ptr,
    b_ptr,
    gate_ptr,
    offs_n,
    offs_k,
    ranks,
    mask_n,
    mask_k,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    GATE: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """update + (B ⊙ gate)·A for these ranks."""
    mask_r = ranks < R
    b = load_tile(b_ptr, offs_n, stride_bn, ranks, stride_br, mask_n, mask_r, WIDE)
    if GATE:
        gate = tl.load(gate_ptr + ranks, mask=mask_r, other=0.0).to(tl.float32)
        b = b.to(tl.float32) * gate[None, :]
    a = load_tile(a_ptr, ranks, stride_ar, offs_k, stride_ak, mask_r, mask_k, WIDE)
    return dot(to_dtype(b, WIDER), to_dtype(a, WIDER), update, PRECISION)
