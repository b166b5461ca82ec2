"""Rows sorted by expert: y, dx, P, dS, dA, dB and dbias in grouped GEMMs.

Each program finds its expert from `offsets`, so the host never waits for them. A row tile has rows
of one expert. The rows after the last expert's are expert E, and get zeros.

Rounding points and options are those of linear.py, shrink.py and gradients.py. Deterministic.
Tested by tests/triton/test_lora_experts.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Codes, Matrix
from .gradients import sum_over_rows
from .linear import add_base_gemm, add_update, load_p, store_p, store_y
from .profiling import profiled
from .shrink import compute_p
from .tiles import grouped, keep_mask, to_dtype


@triton.jit(do_not_specialize=["M"], **profiled("grouped_linear_kernel", "MNK", "MNR"))
def grouped_linear_kernel(
    x,
    w,
    codes,
    q,
    p_ptr,
    bias_ptr,
    mask_out,
    offsets_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    E,
    s_scale,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x·W_e + mask_out(s_scale · P·q_e) + bias_e, where the sums start at the update.

    x [M, K]; W_e [K, N] of the stack w, or as 4-bit codes of [E·N, K] (K_INNER) or [E·K, N];
    q [E, R, N], P [M, R] float32, bias [E, N]. A program computes BLOCK_M × BLOCK_N of y.
    Bytes: x once for each tile of columns, W_e once for each row tile of expert e, less what the
    L2 cache keeps; flops 2·M·N·(K + R).
    """
    tiles_m = tl.cdiv(M, BLOCK_M) + E
    tile, pid_n = grouped(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, m0, end = find_rows(offsets_ptr, tile, M, E, BLOCK_M, BLOCK_E)
    if m0 >= end:
        return
    n0 = pid_n * BLOCK_N
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if expert == E:
        store_y(acc, y_ptr, None, None, None, offs_m, offs_n, end, N, False, TYPES)
        return
    own_q, own_w = matrix_of(q, expert), matrix_of(w, expert)
    own_codes = codes_of(codes, expert * (N if K_INNER else K))
    own_bias_ptr = vector_of(bias_ptr, expert, N)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r0 + tl.arange(0, BLOCK_R)
        p = load_p(p_ptr, offs_m, ranks, end, R, 1)
        acc = add_update(acc, p, own_q, None, offs_n, ranks, N, R, s_scale, TYPES)
    if mask_out is not None:
        acc = tl.where(keep_mask(mask_out, m0, n0, BLOCK_M, BLOCK_N), acc, 0.0)
    acc = add_base_gemm(
        acc, x, own_w, own_codes, None, m0, n0, end, N, K, K_INNER, LEFT, FORMAT, TYPES, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_y(acc, y_ptr, None, None, own_bias_ptr, offs_m, offs_n, end, N, False, TYPES)


@triton.jit(do_not_specialize=["M"], **profiled("grouped_shrink_kernel", "MKR"))
def grouped_shrink_kernel(
    x,
    a,
    mask_in,
    offsets_ptr,
    p_ptr,
    M,
    K,
    R,
    E,
    p_scale,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """P = p_scale · mask_in(x)·a_eᵀ, float32 [M, R].

    x [M, K], a [E, R, K]. Program (m, r) makes BLOCK_M × BLOCK_R of P from all of K.
    Bytes: x once for each BLOCK_R ranks, a_e once for each row tile of expert e, P; flops 2·M·K·R.
    """
    expert, m0, end = find_rows(offsets_ptr, tl.program_id(0), M, E, BLOCK_M, BLOCK_E)
    if m0 >= end:
        return
    r0 = tl.program_id(1) * BLOCK_R
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if expert < E:
        p = compute_p(
            x, matrix_of(a, expert), None, mask_in, m0, r0, (0, K), end, R, TYPES, BLOCK_M, BLOCK_K,
            BLOCK_R,
        )  # fmt: skip
    offs_m, ranks = m0 + tl.arange(0, BLOCK_M), r0 + tl.arange(0, BLOCK_R)
    store_p(p_ptr, offs_m, ranks, p * p_scale, end, R)


@triton.jit(do_not_specialize=["M"], **profiled("grouped_outer_kernel", "MNR"))
def grouped_outer_kernel(
    s_ptr,
    v,
    mask,
    offsets_ptr,
    grad,
    sum_ptr,
    M,
    N,
    R,
    E,
    scale,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """grad_e [R, N] = scale · sᵀ·mask(v) over the rows of expert e, and Σ v; zeros without rows.

    s [M, R] float32, v [M, N]; grad [E, R, N] and the sums, float32 [E, N], if they are given.
    Program (n, r, e) makes BLOCK_R × BLOCK_N of grad_e from all rows of expert e, in order.
    Bytes: v once for each BLOCK_R ranks, s once for each BLOCK_N columns; flops 2·M·N·R.
    """
    expert = tl.program_id(2)
    n0, r0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_R
    rows = rows_of(offsets_ptr, expert, M, E)
    total, sum_v, _ = sum_over_rows(
        s_ptr, v, None, None, mask, n0, r0, rows, N, R, grad is not None, sum_ptr is not None,
        TYPES, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    offs_n, offs_r = n0 + tl.arange(0, BLOCK_N), r0 + tl.arange(0, BLOCK_R)
    if grad is not None:
        own = matrix_of(grad, expert)
        at = own.ptr + offs_r[:, None] * own.row + offs_n[None, :] * own.col
        total = to_dtype(total * scale, own.ptr.dtype.element_ty)
        tl.store(at, total, mask=(offs_r < R)[:, None] & (offs_n < N)[None, :])
    if sum_ptr is not None:
        if r0 == 0:
            tl.store(vector_of(sum_ptr, expert, N) + offs_n, sum_v, mask=offs_n < N)


@triton.jit
def find_rows(offsets_ptr, tile, M, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of a row tile, the tile's first row, and the end of the expert's rows.

    Tile offsets[e-1] // BLOCK_M + e is the first of expert e. An expert of n rows has
    ⌈n / BLOCK_M⌉ tiles before the next one's first, and sometimes one more, which has no rows:
    its first row is not before the end. ⌈M / BLOCK_M⌉ + E tiles hold the rows of all experts and of
    none. BLOCK_E > E.
    """
    experts = tl.arange(0, BLOCK_E)
    has_start = (experts > 0) & (experts <= E)
    starts = tl.load(offsets_ptr + experts - 1, mask=has_start, other=0).to(tl.int32)
    is_begun = (experts <= E) & (starts // BLOCK_M + experts <= tile)
    expert = tl.sum(is_begun.to(tl.int32), 0) - 1
    start, end = rows_of(offsets_ptr, expert, M, E)
    return expert, start + (tile - start // BLOCK_M - expert) * BLOCK_M, end


@triton.jit
def rows_of(offsets_ptr, expert, M, E):
    """The first row of an expert and the end of its rows; of expert E, those of no expert."""
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + expert, mask=expert < E, other=M).to(tl.int32)
    return start, end


@triton.jit
def matrix_of(stack, expert):
    """One expert's matrix of a stack, or None."""
    if stack is not None:
        return Matrix(stack.ptr + expert.to(tl.int64) * stack.step, stack.row, stack.col)
    else:
        return None


@triton.jit
def vector_of(ptr, expert, N):
    """One expert's row of a contiguous [E, N], or None."""
    if ptr is not None:
        return ptr + expert.to(tl.int64) * N
    else:
        return None


@triton.jit
def codes_of(codes, first_row):
    """The codes of a stack from this row on, or None."""
    if codes is not None:
        return Codes(
            codes.packed, codes.absmax, codes.code, codes.nested_absmax, codes.nested_code,
            codes.offset, first_row,
        )  # fmt: skip
    else:
        return None
