"""y, and dx in the other layout: the base GEMM and the adapter's low-rank update in one kernel.

    z = x·W + mask_out(S)·Q,    y = out_scale ⊙ z + bias,    S = (P ⊙ gate)·s_scale

x [M, K] (times in_scale [K]); W [K, N] as w, or as 4-bit codes of [N, K] (K_INNER) or of [K, N];
a [R, K], q [R, N]. A program computes BLOCK_M × BLOCK_N of y. z is stored if z_ptr is given.

Rounding points: x, W to COMPUTE; x, a, S, q to WIDER; sums in float32; y and z once.
Bytes: x once for each tile of columns, W once for each tile of rows, minus L2 hits. Deterministic.
LEFT: codes are the left operand, because a tensor core instruction takes 64 or 16 of its rows.
Tested by tests/triton/test_lora_linear.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .profiling import profiled
from .shrink import compute_p, store_partial
from .tiles import dot, grouped, keep_mask, load_codes, load_tile, to_dtype, to_named


@triton.jit(do_not_specialize=["M"], **profiled("fused_kernel", "MNK", "MKR", "MNR"))
def fused_kernel(
    x,
    w,
    codes,
    a,
    q,
    p_ptr,
    gate_ptr,
    in_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    mask_in,
    mask_out,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    R,
    p_scale,
    s_scale,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y, with P = p_scale · mask_in(x)·aᵀ summed in the main loop, R ≤ BLOCK_R.

    The programs of the first columns store P. Flops 2·M·N·(K + R), and 2·M·K·BLOCK_R for each tile
    of columns.
    """
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n, offs_r = (
        m0 + tl.arange(0, BLOCK_M),
        n0 + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_R),
    )
    mask_m = offs_m < M
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if LEFT:
        acc = tl.trans(acc)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        v = load_x(x, in_scale_ptr, offs_m, offs_k, mask_m, mask_k, TYPES)
        acc = add_base(
            acc, v, w, codes, n0, k0, N, K, K_INNER, LEFT, FORMAT, TYPES, BLOCK_N, BLOCK_K
        )
        if mask_in is not None:
            v = tl.where(keep_mask(mask_in, m0, k0, BLOCK_M, BLOCK_K), v, 0.0)
        A = load_tile(a.ptr, offs_k, a.col, offs_r, a.row, mask_k, offs_r < R, TYPES.WIDE)
        p = dot(to_named(v, TYPES.WIDER), to_named(A, TYPES.WIDER), p, TYPES.PRECISION)
    if LEFT:
        acc = tl.trans(acc)
    p = p * p_scale
    if pid_n == 0:
        store_p(p_ptr, offs_m, offs_r, p, M, R)
    acc = add_masked_update(
        acc, p, q, gate_ptr, mask_out, m0, n0, offs_r, N, R, s_scale, TYPES, BLOCK_M, BLOCK_N
    )
    store_y(acc, y_ptr, z_ptr, out_scale_ptr, bias_ptr, offs_m, offs_n, M, N, False, TYPES)


@triton.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["num_splits"],
    **profiled("two_pass_kernel", "MNK", "MNR"),
)
def two_pass_kernel(
    x,
    w,
    codes,
    q,
    p_ptr,
    partials_ptr,
    gate_ptr,
    in_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    mask_out,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    R,
    num_splits,
    s_scale,
    ADD_TO_Y: tl.constexpr,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y from the partial sums [num_splits, M, R] of P. The sums of y start at S·Q.

    If there are several partial sums, the programs of the first columns store P. ADD_TO_Y: whether
    y holds x·W. Without w and codes there is no base GEMM. Flops 2·M·N·(K + R).
    """
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = r0 + tl.arange(0, BLOCK_R)
        p = load_p(partials_ptr, offs_m, ranks, M, R, num_splits)
        if num_splits > 1 and pid_n == 0:
            store_p(p_ptr, offs_m, ranks, p, M, R)
        acc = add_update(acc, p, q, gate_ptr, offs_n, ranks, N, R, s_scale, TYPES)
    if mask_out is not None:
        acc = tl.where(keep_mask(mask_out, m0, n0, BLOCK_M, BLOCK_N), acc, 0.0)
    acc = add_base_gemm(
        acc, x, w, codes, in_scale_ptr, m0, n0, M, N, K, K_INNER, LEFT, FORMAT, TYPES, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_y(acc, y_ptr, z_ptr, out_scale_ptr, bias_ptr, offs_m, offs_n, M, N, ADD_TO_Y, TYPES)


@triton.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["num_splits"],
    **profiled("cooperative_kernel", "MNK", "MKR", "MNR"),
)
def cooperative_kernel(
    x,
    w,
    codes,
    a,
    q,
    p_ptr,
    partials_ptr,
    flags_ptr,
    gate_ptr,
    in_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    mask_in,
    mask_out,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    R,
    num_splits,
    k_per_split,
    p_scale,
    s_scale,
    PUBLISH: tl.constexpr,
    CONSUME: tl.constexpr,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute y for at most 16 rows and BLOCK_R ranks, in one cooperative launch.

    PUBLISH: the first programs each store a partial sum of P, before all programs read
    their tiles of W. CONSUME: the epilogue adds the low-rank update. Before the epilogue all
    programs wait for the flag that counts the stored partial sums. A second flag counts the
    programs that have read them, and the last program clears both. A cooperative launch guarantees
    that all programs are co-resident. The interpreter runs programs in order, hence two launches
    without flags.
    """
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0, split = pid_m * BLOCK_M, pid_n * BLOCK_N, tl.program_id(0)
    offs_m, offs_n, offs_r = (
        m0 + tl.arange(0, BLOCK_M),
        n0 + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_R),
    )
    if PUBLISH:
        if split < num_splits:
            k_range = split * k_per_split, min(K, (split + 1) * k_per_split)
            p = compute_p(
                x, a, in_scale_ptr, mask_in, 0, 0, k_range, M, R, TYPES, BLOCK_M, BLOCK_K, BLOCK_R
            )
            store_partial(partials_ptr, split, 0, 0, p * p_scale, M, R, BLOCK_M, BLOCK_R)
            if flags_ptr is not None:
                tl.debug_barrier()  # all threads store before one releases the flag
                tl.atomic_add(flags_ptr, 1, sem="release")
        if not CONSUME:
            return
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = add_base_gemm(
        acc, x, w, codes, in_scale_ptr, m0, n0, M, N, K, K_INNER, LEFT, FORMAT, TYPES, BLOCK_M,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if flags_ptr is not None:
        while tl.atomic_add(flags_ptr, 0, sem="acquire") < num_splits:
            pass
        tl.debug_barrier()
    p = load_p(partials_ptr, offs_m, offs_r, M, R, num_splits)
    if flags_ptr is not None:
        tl.debug_barrier()
        if tl.atomic_add(flags_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(flags_ptr, 0)
            tl.store(flags_ptr + 1, 0)
    if num_splits > 1 and pid_n == 0:
        store_p(p_ptr, offs_m, offs_r, p, M, R)
    acc = add_masked_update(
        acc, p, q, gate_ptr, mask_out, m0, n0, offs_r, N, R, s_scale, TYPES, BLOCK_M, BLOCK_N
    )
    store_y(acc, y_ptr, z_ptr, out_scale_ptr, bias_ptr, offs_m, offs_n, M, N, False, TYPES)


@triton.jit
def load_x(x, in_scale_ptr, offs_m, offs_k, mask_m, mask_k, TYPES: tl.constexpr):
    """Return x ⊙ in_scale [BLOCK_M, BLOCK_K]."""
    v = load_tile(x.ptr, offs_m, x.row, offs_k, x.col, mask_m, mask_k, TYPES.WIDE)
    if in_scale_ptr is not None:
        in_scale = tl.load(in_scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        v = v.to(tl.float32) * in_scale[None, :]
    return v


@triton.jit
def add_base(
    acc,
    v,
    w,
    codes,
    n0,
    k0,
    N,
    K,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return acc + v·W for one step of the main loop, transposed if LEFT."""
    if codes is not None:
        if K_INNER:
            tile = load_codes(codes, n0, k0, N, K, BLOCK_N, BLOCK_K, FORMAT, TYPES.WIDE)
            tile = to_named(tile, TYPES.COMPUTE)
            if LEFT:
                return dot(tile, tl.trans(to_named(v, TYPES.COMPUTE)), acc, TYPES.PRECISION)
            else:
                return dot(to_named(v, TYPES.COMPUTE), tl.trans(tile), acc, TYPES.PRECISION)
        else:
            tile = load_codes(codes, k0, n0, K, N, BLOCK_K, BLOCK_N, FORMAT, TYPES.WIDE)
            tile = to_named(tile, TYPES.COMPUTE)
            return dot(to_named(v, TYPES.COMPUTE), tile, acc, TYPES.PRECISION)
    elif w is not None:
        offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
        tile = load_tile(w.ptr, offs_k, w.col, offs_n, w.row, offs_k < K, offs_n < N, TYPES.WIDE)
        tile = to_named(tile, TYPES.COMPUTE)
        return dot(to_named(v, TYPES.COMPUTE), tile, acc, TYPES.PRECISION)
    else:
        return acc


@triton.jit
def add_base_gemm(
    acc,
    x,
    w,
    codes,
    in_scale_ptr,
    m0,
    n0,
    M,
    N,
    K,
    K_INNER: tl.constexpr,
    LEFT: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return acc + (x ⊙ in_scale)·W."""
    if w is not None or codes is not None:
        offs_m = m0 + tl.arange(0, BLOCK_M)
        if LEFT:
            acc = tl.trans(acc)
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            v = load_x(x, in_scale_ptr, offs_m, offs_k, offs_m < M, offs_k < K, TYPES)
            acc = add_base(
                acc, v, w, codes, n0, k0, N, K, K_INNER, LEFT, FORMAT, TYPES, BLOCK_N, BLOCK_K
            )
        if LEFT:
            acc = tl.trans(acc)
    return acc


@triton.jit
def load_p(partials_ptr, offs_m, ranks, M, R, num_splits):
    """Return P [BLOCK_M, BLOCK_R], the sum of its partial sums in order."""
    mask = (offs_m < M)[:, None] & (ranks < R)[None, :]
    at = partials_ptr + (offs_m.to(tl.int64)[:, None] * R + ranks[None, :])
    # Bypass the L1 cache, which is not coherent with other programs' stores.
    total = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for _ in range(1, num_splits):
        at += M * R
        total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_p(p_ptr, offs_m, ranks, p, M, R):
    at = p_ptr + (offs_m.to(tl.int64)[:, None] * R + ranks[None, :])
    tl.store(at, p, mask=(offs_m < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def add_update(acc, p, q, gate_ptr, offs_n, ranks, N, R, s_scale, TYPES: tl.constexpr):
    """Return acc + S·Q for these ranks."""
    s = p * s_scale
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + ranks, mask=ranks < R, other=0.0)
        s = s * gate.to(tl.float32)[None, :]
    Q = load_tile(q.ptr, ranks, q.row, offs_n, q.col, ranks < R, offs_n < N, TYPES.WIDE)
    return dot(to_named(s, TYPES.WIDER), to_named(Q, TYPES.WIDER), acc, TYPES.PRECISION)


@triton.jit
def add_masked_update(
    acc,
    p,
    q,
    gate_ptr,
    mask_out,
    m0,
    n0,
    ranks,
    N,
    R,
    s_scale,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return acc + mask_out(S·Q)."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    if mask_out is not None:
        update = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        update = add_update(update, p, q, gate_ptr, offs_n, ranks, N, R, s_scale, TYPES)
        return acc + tl.where(keep_mask(mask_out, m0, n0, BLOCK_M, BLOCK_N), update, 0.0)
    else:
        return add_update(acc, p, q, gate_ptr, offs_n, ranks, N, R, s_scale, TYPES)


@triton.jit
def store_y(
    acc,
    y_ptr,
    z_ptr,
    out_scale_ptr,
    bias_ptr,
    offs_m,
    offs_n,
    M,
    N,
    ADD_TO_Y: tl.constexpr,
    TYPES: tl.constexpr,
):
    """Store z if z_ptr is given, and y = out_scale ⊙ z + bias."""
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if TYPES.WIDE:
        offs_m = offs_m.to(tl.int64)
    at = offs_m[:, None] * N + offs_n[None, :]
    if ADD_TO_Y:
        acc += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + at, to_dtype(acc, z_ptr.dtype.element_ty), mask=mask)
    if out_scale_ptr is not None:
        acc = acc * tl.load(out_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    tl.store(y_ptr + at, to_dtype(acc, y_ptr.dtype.element_ty), mask=mask)
