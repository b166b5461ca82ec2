"""The kernels of a gated MLP: h = act(g) ⊙ u, and its gradients.

Two are elementwise. Two more take g and u without their low-rank updates and add them to each tile,
so that no GEMM reads and writes g and u for them:

    g = g₀ + s_g·S_g·B_gᵀ        u = u₀ + s_u·S_u·B_uᵀ        dh = dh₀ + dS·A

with dS and A of the down-projection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, load_tile, to_dtype


@triton.jit
def gated_kernel(
    g_ptr, u_ptr, h_ptr,
    n,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write h = act(g) ⊙ u of n contiguous elements. A program computes BLOCK_N of them.

    ACTIVATION: 0 for SiLU, 1 for GELU by tanh, 2 for GELU by erf.
    Rounding points: act(g) to its own dtype, as in PyTorch, and h; float32 between.
    Bytes: g, u and h once. Deterministic. Tested by tests/triton/test_gated.py.
    """
    at, mask = offsets(n, WIDE, BLOCK_N)
    g = to_dtype(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
    u = to_dtype(tl.load(u_ptr + at, mask=mask, other=0.0), tl.float32)
    a, _ = activate(g, ACTIVATION)
    TYPE: tl.constexpr = h_ptr.dtype.element_ty
    a = to_dtype(to_dtype(a, TYPE), tl.float32)
    tl.store(h_ptr + at, to_dtype(a * u, TYPE), mask=mask)


@triton.jit
def gated_backward_kernel(
    g_ptr, u_ptr, dh_ptr, dg_ptr, du_ptr, h_ptr,
    n,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dg = dh ⊙ u ⊙ act'(g), du = dh ⊙ act(g) and the h of `gated_kernel`.

    dg, du and h may be g, u and dh: a program loads all elements of its own before it stores one.
    Rounding points: act(g) to its own dtype, as in PyTorch, then du and h; dg once.
    Bytes: g, u, dh, dg, du and h once. Deterministic. Tested by tests/triton/test_gated.py.
    """
    at, mask = offsets(n, WIDE, BLOCK_N)
    g = to_dtype(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
    u = to_dtype(tl.load(u_ptr + at, mask=mask, other=0.0), tl.float32)
    dh = to_dtype(tl.load(dh_ptr + at, mask=mask, other=0.0), tl.float32)
    a, slope = activate(g, ACTIVATION)
    TYPE: tl.constexpr = h_ptr.dtype.element_ty
    a = to_dtype(to_dtype(a, TYPE), tl.float32)
    tl.store(dg_ptr + at, to_dtype(dh * u * slope, TYPE), mask=mask)
    tl.store(du_ptr + at, to_dtype(dh * a, TYPE), mask=mask)
    tl.store(h_ptr + at, to_dtype(a * u, TYPE), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gated_update_kernel(
    g_ptr, u_ptr, h_ptr,
    s_gate_ptr, stride_s_gate, b_gate_ptr, scale_gate,
    s_up_ptr, stride_s_up, b_up_ptr, scale_up,
    M, N,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write h = act(g₀ + s_g·S_g·B_gᵀ) ⊙ (u₀ + s_u·S_u·B_uᵀ) of contiguous g₀, u₀ and h [M, N].

    S [M, R], contiguous in its rows; B [N, R] contiguous. All have one dtype. Program (m, n)
    computes BLOCK_M × BLOCK_N of h. ACTIVATION: as in `gated_kernel`.
    Rounding points: h; float32 between.
    Bytes: g₀, u₀ and h once, S once for each BLOCK_N columns, B once for each BLOCK_M rows (from
    the L2 cache); flops 4·M·N·R. Deterministic. Tested by tests/triton/test_gated_update.py.
    """
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    g = load_tile(g_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
    u = load_tile(u_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
    s_gate = load_ranks(s_gate_ptr, offs_m, stride_s_gate, mask_m, RANK_GATE, BLOCK_R, WIDE)
    s_up = load_ranks(s_up_ptr, offs_m, stride_s_up, mask_m, RANK_UP, BLOCK_R, WIDE)
    b_gate = tl.trans(load_ranks(b_gate_ptr, offs_n, RANK_GATE, mask_n, RANK_GATE, BLOCK_R, False))
    b_up = tl.trans(load_ranks(b_up_ptr, offs_n, RANK_UP, mask_n, RANK_UP, BLOCK_R, False))
    g = add_update(g, s_gate, b_gate, scale_gate, PRECISION)
    u = add_update(u, s_up, b_up, scale_up, PRECISION)
    a, _ = activate(g, ACTIVATION)
    store_tile(h_ptr, a * u, offs_m, offs_n, N, mask_m, mask_n, WIDE)


@triton.jit(do_not_specialize=["M", "m_per_split"])
def gated_update_backward_kernel(
    g_ptr, u_ptr, dh_ptr, dg_ptr, du_ptr, h_ptr,
    s_gate_ptr, stride_s_gate, b_gate_ptr, scale_gate,
    s_up_ptr, stride_s_up, b_up_ptr, scale_up,
    ds_ptr, a_ptr, partials_ptr,
    M, N, m_per_split,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write dg and du for dh = dh₀ + dS·A, and what reads the same tiles: h, or three gradients.

    g₀, u₀ and dh₀ [M, N], which dg, du and h may be; S and B as in `gated_update_kernel`; dS [M, R]
    and A [R, N] of the down-projection, contiguous. Without h_ptr no h is written. With
    partials_ptr the sums over the i-th split of rows are written to partials[i], float32
    [num_splits, ΣR, N], of the down-projection, gate and up one after another:

        dSᵀ·h        s_g·S_gᵀ·dg        s_u·S_uᵀ·du

    Program (n, i) computes BLOCK_N columns of the i-th split, a sum over m_per_split rows.
    Rounding points: dg, du and h, before they are multiplied; float32 between, and in the sums.
    Bytes: g₀, u₀, dh₀, dg and du once (and h), S and dS once for each BLOCK_N columns, A and B once
    for each split, the partial sums; flops 12·M·N·R. Deterministic.
    Tested by tests/triton/test_gated_update.py.
    """
    TYPE: tl.constexpr = dg_ptr.dtype.element_ty
    n0, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    offs_n, offs_r = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    b_gate = tl.trans(load_ranks(b_gate_ptr, offs_n, RANK_GATE, mask_n, RANK_GATE, BLOCK_R, False))
    b_up = tl.trans(load_ranks(b_up_ptr, offs_n, RANK_UP, mask_n, RANK_UP, BLOCK_R, False))
    a_down = load_tile(a_ptr, offs_r, N, offs_n, 1, offs_r < RANK_DOWN, mask_n, False)
    dA = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    dB_gate = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    dB_up = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    end = min(M, (split + 1) * m_per_split)
    for m0 in range(split * m_per_split, end, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        s_gate = load_ranks(s_gate_ptr, offs_m, stride_s_gate, mask_m, RANK_GATE, BLOCK_R, WIDE)
        s_up = load_ranks(s_up_ptr, offs_m, stride_s_up, mask_m, RANK_UP, BLOCK_R, WIDE)
        ds = load_ranks(ds_ptr, offs_m, RANK_DOWN, mask_m, RANK_DOWN, BLOCK_R, WIDE)
        g = load_tile(g_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
        u = load_tile(u_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
        dh = load_tile(dh_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
        g = add_update(g, s_gate, b_gate, scale_gate, PRECISION)
        u = add_update(u, s_up, b_up, scale_up, PRECISION)
        dh = dot(ds, a_down, to_dtype(dh, tl.float32), PRECISION)
        a, slope = activate(g, ACTIVATION)
        dg, du, h = to_dtype(dh * u * slope, TYPE), to_dtype(dh * a, TYPE), to_dtype(a * u, TYPE)
        store_tile(dg_ptr, dg, offs_m, offs_n, N, mask_m, mask_n, WIDE)
        store_tile(du_ptr, du, offs_m, offs_n, N, mask_m, mask_n, WIDE)
        if h_ptr is not None:
            store_tile(h_ptr, h, offs_m, offs_n, N, mask_m, mask_n, WIDE)
        if partials_ptr is not None:
            dA = dot(tl.trans(ds), h, dA, PRECISION)
            dB_gate = dot(tl.trans(s_gate), dg, dB_gate, PRECISION)
            dB_up = dot(tl.trans(s_up), du, dB_up, PRECISION)
    if partials_ptr is not None:
        first = partials_ptr + split.to(tl.int64) * (RANK_DOWN + RANK_GATE + RANK_UP) * N
        store_tile(first, dA, offs_r, offs_n, N, offs_r < RANK_DOWN, mask_n, False)
        first += RANK_DOWN * N
        store_tile(
            first, dB_gate * scale_gate, offs_r, offs_n, N, offs_r < RANK_GATE, mask_n, False
        )
        first += RANK_GATE * N
        store_tile(first, dB_up * scale_up, offs_r, offs_n, N, offs_r < RANK_UP, mask_n, False)


@triton.jit(do_not_specialize=["num_splits"])
def gated_gradients_kernel(
    partials_ptr, dA_ptr, dB_gate_ptr, dB_up_ptr,
    N, num_splits,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, RANK_DOWN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dA [R, N], dB_gate and dB_up [N, R], contiguous: the sums of the partial sums.

    Program (n, i) computes BLOCK_N columns of the i-th gradient. The partial sums are added in
    order. Rounding point: the gradient. Bytes: the partial sums once, the gradients once.
    Deterministic. Tested by tests/triton/test_gated_update.py.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, which = offs_n < N, tl.program_id(1)
    ranks: tl.constexpr = RANK_DOWN + RANK_GATE + RANK_UP
    offs_r = tl.arange(0, BLOCK_R)
    if which == 0:
        dA = sum_partials(partials_ptr, offs_n, mask_n, N, num_splits, ranks, RANK_DOWN, BLOCK_R)
        store_tile(dA_ptr, dA, offs_r, offs_n, N, offs_r < RANK_DOWN, mask_n, False)
    elif which == 1:
        first = partials_ptr + RANK_DOWN * N
        dB = sum_partials(first, offs_n, mask_n, N, num_splits, ranks, RANK_GATE, BLOCK_R)
        to, stride, is_rank = dB_gate_ptr, RANK_GATE, offs_r < RANK_GATE
        store_tile(to, tl.trans(dB), offs_n, offs_r, stride, mask_n, is_rank, False)
    else:
        first = partials_ptr + (RANK_DOWN + RANK_GATE) * N
        dB = sum_partials(first, offs_n, mask_n, N, num_splits, ranks, RANK_UP, BLOCK_R)
        to, stride, is_rank = dB_up_ptr, RANK_UP, offs_r < RANK_UP
        store_tile(to, tl.trans(dB), offs_n, offs_r, stride, mask_n, is_rank, False)


@triton.jit
def sum_partials(
    first, offs_n, mask_n, N, num_splits,
    ranks: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return the sum over the splits of RANK rows of the partial sums, [BLOCK_R, BLOCK_N]."""
    offs_r = tl.arange(0, BLOCK_R)
    at = first + (offs_r[:, None] * N + offs_n[None, :])
    mask = (offs_r < RANK)[:, None] & mask_n[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for _ in range(1, num_splits):
        at += ranks * N
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def load_ranks(
    ptr, offs, stride, mask, RANK: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK, BLOCK_R] of a matrix of RANK columns, contiguous in its rows; 0 outside."""
    offs_r = tl.arange(0, BLOCK_R)
    return load_tile(ptr, offs, stride, offs_r, 1, mask, offs_r < RANK, WIDE)


@triton.jit
def add_update(t, s, b, scale, PRECISION: tl.constexpr):
    """Return t + scale·s·b in float32."""
    zero = tl.zeros(t.shape, dtype=tl.float32)
    return to_dtype(t, tl.float32) + scale * dot(s, b, zero, PRECISION)


@triton.jit
def store_tile(ptr, t, offs_0, offs_1, stride, mask_0, mask_1, WIDE: tl.constexpr):
    """Store t in the pointer's dtype into a matrix whose rows are `stride` apart."""
    if WIDE:
        offs_0 = offs_0.to(tl.int64)
    at = ptr + (offs_0[:, None] * stride + offs_1[None, :])
    tl.store(at, to_dtype(t, ptr.dtype.element_ty), mask=mask_0[:, None] & mask_1[None, :])


@triton.jit
def offsets(n, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the offsets of a program's elements, and which of them are below n."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    at = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    return at, at < n


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Return act(g) and act'(g) in float32.

    GELU by tanh is g·σ(2z), since 1 + tanh(z) = 2·σ(2z), and σ·(1 − σ) does not cancel here.
    """
    if ACTIVATION == 2:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        return g * cdf, cdf + g * pdf
    else:
        t = g
        dt = tl.full(g.shape, 1.0, dtype=tl.float32)
        if ACTIVATION == 1:
            t = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            dt = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        e = tl.exp(-tl.abs(t))
        share = 1.0 / (1.0 + e)  # one division is a fifth of the kernels' instructions
        sigmoid = tl.where(t >= 0, share, e * share)
        return g * sigmoid, sigmoid + g * dt * (e * share * share)
