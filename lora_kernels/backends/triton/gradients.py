"""dA, dB and sums over rows: skinny GEMMs with split M, whose partial sums a second kernel adds."""

from __future__ import annotations

import triton
import triton.language as tl

from .shrink import store_slot
from .tiles import dot, keep_mask, load_tile, to_dtype, to_named


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    s_ptr,
    v,
    v_scale_ptr,
    z_ptr,
    mask,
    parts_ptr,
    M,
    N,
    R,
    m_share,
    RANKS: tl.constexpr,
    SUM: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write partial sums over the i-th split of rows to parts[i]:

        parts[i, :R] = sᵀ·mask(v ⊙ v_scale),    parts[i, R] = Σ v,    parts[i, R + 1] = Σ v ⊙ z

    s [M, R] float32, v [M, N], z [M, N] contiguous; parts float32 [parts, R + 2, N]. RANKS and SUM:
    whether to compute the first and second. The third is computed if z is given. Program (n, r, i)
    computes BLOCK_R × BLOCK_N of parts[i], a sum over m_share rows.
    Rounding points: s and v ⊙ v_scale to WIDER; sums in float32.
    Bytes: v (and z) once for each BLOCK_R ranks, s once for each BLOCK_N columns, the parts;
    flops 2·M·N·R. Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_n, pid_r, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n0, r0 = pid_n * BLOCK_N, pid_r * BLOCK_R
    offs_n, offs_r = n0 + tl.arange(0, BLOCK_N), r0 + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    rows = part * m_share, min(M, (part + 1) * m_share)
    grad, sum_v, sum_vz = sum_over_rows(
        s_ptr, v, v_scale_ptr, z_ptr, mask, n0, r0, rows, N, R, RANKS, SUM, TYPES, BLOCK_M, BLOCK_N,
        BLOCK_R,
    )  # fmt: skip
    first = parts_ptr + part.to(tl.int64) * (R + 2) * N
    if RANKS:
        at = offs_r[:, None] * N + offs_n[None, :]
        tl.store(first + at, grad, mask=mask_r[:, None] & mask_n[None, :])
    if pid_r == 0:
        if SUM:
            tl.store(first + R * N + offs_n, sum_v, mask=mask_n)
        if z_ptr is not None:
            tl.store(first + (R + 1) * N + offs_n, sum_vz, mask=mask_n)


@triton.jit
def sum_over_rows(
    s_ptr,
    v,
    v_scale_ptr,
    z_ptr,
    mask,
    n0,
    r0,
    rows,
    N,
    R,
    RANKS: tl.constexpr,
    SUM: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """sᵀ·mask(v ⊙ v_scale) [BLOCK_R, BLOCK_N] from [r0, n0] on, Σ v and Σ v ⊙ z over these rows."""
    start, end = rows
    offs_n, offs_r = n0 + tl.arange(0, BLOCK_N), r0 + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    grad = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    sum_v = tl.zeros([BLOCK_N], dtype=tl.float32)
    sum_vz = tl.zeros([BLOCK_N], dtype=tl.float32)
    for m0 in range(start, end, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        tile = load_tile(v.ptr, offs_m, v.row, offs_n, v.col, mask_m, mask_n, TYPES.WIDE)
        if SUM:
            sum_v += tl.sum(tile.to(tl.float32), 0)
        if z_ptr is not None:
            z = load_tile(z_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, TYPES.WIDE)
            sum_vz += tl.sum(tile.to(tl.float32) * z.to(tl.float32), 0)
        if RANKS:
            if v_scale_ptr is not None:
                v_scale = tl.load(v_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                tile = tile.to(tl.float32) * v_scale[None, :]
            if mask is not None:
                tile = tl.where(keep_mask(mask, m0, n0, BLOCK_M, BLOCK_N), tile, 0.0)
            s = load_tile(s_ptr, offs_r, 1, offs_m, R, mask_r, mask_m, TYPES.WIDE)
            s = to_named(s, TYPES.WIDER)
            grad = dot(s, to_named(tile, TYPES.WIDER), grad, TYPES.PRECISION)
    return grad, sum_v, sum_vz


@triton.jit(do_not_specialize=["M"])
def shrink_outer_kernel(
    v,
    b,
    s_ptr,
    v_scale_ptr,
    z_ptr,
    slots_ptr,
    parts_ptr,
    M,
    N,
    R,
    n_share,
    SUM: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute `shrink_kernel` and `outer_kernel` on the same v with one read of v, R ≤ BLOCK_R:

        slots[i] = (v ⊙ v_scale)[:, split i]·b[split i]
        parts[m, :R] = sᵀ·(v ⊙ v_scale) over the m-th BLOCK_M rows; [R] = Σ v, [R+1] = Σ v ⊙ z

    v [M, N], b [N, R], s [M, R] float32, z [M, N] contiguous; slots float32 [slots, M, R], parts
    float32 [parts, R + 2, N]. Program (m, i) computes BLOCK_M rows of slots[i], and the columns of
    split i of parts[m].
    Rounding points: v ⊙ v_scale, b and s to WIDER; sums in float32.
    Bytes: v (and z) once, b once for each BLOCK_M rows, the slots, the parts; flops 4·M·N·R.
    Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_m, slot = tl.program_id(0), tl.program_id(1)
    offs_m, offs_r = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    s = load_tile(s_ptr, offs_m, R, offs_r, 1, mask_m, mask_r, TYPES.WIDE)
    s = to_named(s, TYPES.WIDER)
    first = parts_ptr + pid_m.to(tl.int64) * (R + 2) * N
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    end = min(N, (slot + 1) * n_share)
    for n0 in range(slot * n_share, end, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        tile = load_tile(v.ptr, offs_m, v.row, offs_n, v.col, mask_m, mask_n, TYPES.WIDE)
        if SUM:
            tl.store(first + R * N + offs_n, tl.sum(tile.to(tl.float32), 0), mask=mask_n)
        if z_ptr is not None:
            z = load_tile(z_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, TYPES.WIDE)
            sum_vz = tl.sum(tile.to(tl.float32) * z.to(tl.float32), 0)
            tl.store(first + (R + 1) * N + offs_n, sum_vz, mask=mask_n)
        if v_scale_ptr is not None:
            v_scale = tl.load(v_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            tile = tile.to(tl.float32) * v_scale[None, :]
        tile = to_named(tile, TYPES.WIDER)
        B = load_tile(b.ptr, offs_n, b.row, offs_r, b.col, mask_n, mask_r, TYPES.WIDE)
        p = dot(tile, to_named(B, TYPES.WIDER), p, TYPES.PRECISION)
        zeros = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
        grad = dot(tl.trans(tile), s, zeros, TYPES.PRECISION)
        at = offs_r[None, :] * N + offs_n[:, None]
        tl.store(first + at, grad, mask=mask_n[:, None] & mask_r[None, :])
    store_slot(slots_ptr, slot, pid_m * BLOCK_M, 0, p, M, R, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize_on_alignment=["parts"])
def reduce_kernel(
    parts_ptr,
    gate_ptr,
    grad,
    sum_ptr,
    sum_z_ptr,
    N,
    R,
    parts,
    scale,
    BLOCK_N: tl.constexpr,
):
    """Write grad [R, N] = scale · gate ⊙ Σ parts[:, :R] in grad's dtype, and two sums in float32.

    Program (n, r) computes BLOCK_N elements of row r; rows R and R + 1 are the sums. The parts are
    added in order. Rounding point: grad. Tested by tests/triton/test_lora_linear.py.
    """
    offs_n, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    mask = offs_n < N
    at = parts_ptr + r * N + offs_n
    if grad is not None:
        if r < R:
            total = add_parts(at, mask, R, N, parts) * scale
            if gate_ptr is not None:
                total = total * tl.load(gate_ptr + r).to(tl.float32)
            to = grad.ptr + r.to(tl.int64) * grad.row + offs_n.to(tl.int64) * grad.col
            tl.store(to, to_dtype(total, grad.ptr.dtype.element_ty), mask=mask)
    if sum_ptr is not None:
        if r == R:
            tl.store(sum_ptr + offs_n, add_parts(at, mask, R, N, parts), mask=mask)
    if sum_z_ptr is not None:
        if r == R + 1:
            tl.store(sum_z_ptr + offs_n, add_parts(at, mask, R, N, parts), mask=mask)


@triton.jit
def add_parts(at, mask, R, N, parts):
    total = tl.load(at, mask=mask, other=0.0)
    for _ in range(1, parts):
        at += (R + 2) * N
        total += tl.load(at, mask=mask, other=0.0)
    return total
