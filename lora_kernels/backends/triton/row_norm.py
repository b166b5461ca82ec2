"""DoRA's row norm ‖W + (B ⊙ g)·A‖, with the sum in registers alone."""

from __future__ import annotations

import triton
import triton.language as tl

from .profiling import profiled
from .tiles import dot, load_codes, load_tile, to_named


@triton.jit(**profiled("row_norm_kernel", "NKR"))
def row_norm_kernel(
    w,
    codes,
    a,
    b,
    gate_ptr,
    partials_ptr,
    N,
    K,
    R,
    k_per_split,
    scaling,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Write partials[i, n] = Σ (W + scaling · (B ⊙ gate)·A)² over the i-th split of row n.

    W [N, K] dense or 4-bit codes, a [R, K], b [N, R]; partials float32 [num_splits, N]. Program
    (n, i) computes BLOCK_N rows of partials[i], from k_per_split elements of each. The caller adds
    the partial sums.
    Rounding points: b ⊙ gate and a to WIDER; all else in float32.
    Bytes: W once, a once for each BLOCK_N rows, b; flops 2·N·K·R. Deterministic.
    Tested by tests/triton/test_dora_norm.py.
    """
    pid_n, split = tl.program_id(0), tl.program_id(1)
    offs_n, offs_r = pid_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    end = min(K, (split + 1) * k_per_split)
    for k0 in range(split * k_per_split, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        if codes is not None:
            n0 = pid_n * BLOCK_N
            tile = load_codes(codes, n0, k0, N, K, BLOCK_N, BLOCK_K, FORMAT, TYPES.WIDE)
        else:
            tile = load_tile(w.ptr, offs_n, w.row, offs_k, w.col, mask_n, mask_k, TYPES.WIDE)
        update = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if ONE_BLOCK:
            update = add_ranks(
                update, a, b, gate_ptr, offs_n, offs_k, offs_r, mask_n, mask_k, R, TYPES
            )
        else:
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                update = add_ranks(
                    update, a, b, gate_ptr, offs_n, offs_k, r0 + offs_r, mask_n, mask_k, R, TYPES
                )
        row = tile.to(tl.float32) + update * scaling
        total += tl.sum(row * row, 1)
    tl.store(partials_ptr + split * N + offs_n, total, mask=mask_n)


@triton.jit
def add_ranks(
    update,
    a,
    b,
    gate_ptr,
    offs_n,
    offs_k,
    ranks,
    mask_n,
    mask_k,
    R,
    TYPES: tl.constexpr,
):
    """Return update + (B ⊙ gate)·A for these ranks."""
    mask_r = ranks < R
    B = load_tile(b.ptr, offs_n, b.row, ranks, b.col, mask_n, mask_r, TYPES.WIDE)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + ranks, mask=mask_r, other=0.0).to(tl.float32)
        B = B.to(tl.float32) * gate[None, :]
    A = load_tile(a.ptr, ranks, a.row, offs_k, a.col, mask_r, mask_k, TYPES.WIDE)
    return dot(to_named(B, TYPES.WIDER), to_named(A, TYPES.WIDER), update, TYPES.PRECISION)
