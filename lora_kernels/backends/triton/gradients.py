"""dA, dB and sums over rows: skinny GEMMs with split M, whose partial sums a second kernel adds."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, load_tile, scale_columns, to_dtype


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    v_ptr, stride_vm, stride_vn,
    s_ptr, v_scale_ptr, z_ptr, partials_ptr,
    M, N, R, m_per_split,
    RANKS: tl.constexpr, SUM: tl.constexpr,
    WIDER: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write partial sums over the i-th split of rows to partials[i]:

        partials[i, :R] = sᵀ·(v ⊙ v_scale)
        partials[i, R] = Σ v,    partials[i, R + 1] = Σ v ⊙ z

    s [M, R] and z [M, N] contiguous, v [M, N]; partials float32 [num_splits, R + 2, N]. RANKS
    and SUM: whether to compute the first and second. The third is computed if z is given. Program
    (n, r, i) computes BLOCK_R × BLOCK_N of partials[i], a sum over m_per_split rows.
    Rounding points: s and v ⊙ v_scale to WIDER; sums in float32.
    Bytes: v (and z) once for each BLOCK_R ranks, s once for each BLOCK_N columns, the partials;
    flops 2·M·N·R. Deterministic. Tested by tests/triton/test_lora_linear.py.
    """
    pid_n, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n0, r0 = pid_n * BLOCK_N, pid_r * BLOCK_R
    offs_n, offs_r = n0 + tl.arange(0, BLOCK_N), r0 + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    end = min(M, (split + 1) * m_per_split)
    grad = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    sum_v = tl.zeros([BLOCK_N], dtype=tl.float32)
    sum_vz = tl.zeros([BLOCK_N], dtype=tl.float32)
    for m0 in range(split * m_per_split, end, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        v = load_tile(v_ptr, offs_m, stride_vm, offs_n, stride_vn, mask_m, mask_n, WIDE)
        if SUM:
            sum_v += tl.sum(v.to(tl.float32), 0)
        if z_ptr is not None:
            z = load_tile(z_ptr, offs_m, N, offs_n, 1, mask_m, mask_n, WIDE)
            sum_vz += tl.sum(v.to(tl.float32) * z.to(tl.float32), 0)
        if RANKS:
            v = scale_columns(v, v_scale_ptr, offs_n, mask_n)
            s = load_tile(s_ptr, offs_r, 1, offs_m, R, mask_r, mask_m, WIDE)
            grad = dot(to_dtype(s, WIDER), to_dtype(v, WIDER), grad, PRECISION)
    first = partials_ptr + split.to(tl.int64) * (R + 2) * N
    if RANKS:
        at = offs_r[:, None] * N + offs_n[None, :]
        tl.store(first + at, grad, mask=mask_r[:, None] & mask_n[None, :])
    if pid_r == 0:
        if SUM:
            tl.store(first + R * N + offs_n, sum_v, mask=mask_n)
        if z_ptr is not None:
            tl.store(first + (R + 1) * N + offs_n, sum_vz, mask=mask_n)


@triton.jit(do_not_specialize_on_alignment=["num_splits"])
def reduce_kernel(
    grad_ptr, stride_gr, stride_gn,
    partials_ptr, gate_ptr, sum_ptr, sum_z_ptr,
    N, R, num_splits, scale,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write grad [R, N] = scale · gate ⊙ Σ partials[:, :R] in grad's dtype; two sums in float32.

    Program (n, r) computes BLOCK_N elements of BLOCK_R rows; rows R and R + 1 are the sums. The
    partial sums are added in order. Rounding point: grad.
    Bytes: the partial sums that are needed, once; grad once, in sectors of 32 bytes that one
    program fills, also where the ranks of a 16-bit grad lie together.
    Tested by tests/triton/test_lora_linear.py.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, is_rank, is_sum, is_sum_z = offs_n < N, offs_r < R, offs_r == R, offs_r == R + 1
    needed = (
        (is_rank & (grad_ptr is not None))
        | (is_sum & (sum_ptr is not None))
        | (is_sum_z & (sum_z_ptr is not None))
    )
    at = partials_ptr + (offs_r[:, None] * N + offs_n[None, :])
    mask = needed[:, None] & mask_n[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for _ in range(1, num_splits):
        at += (R + 2) * N
        total += tl.load(at, mask=mask, other=0.0)
    columns = tl.broadcast_to(offs_n[None, :], [BLOCK_R, BLOCK_N])
    if sum_ptr is not None:
        tl.store(sum_ptr + columns, total, mask=is_sum[:, None] & mask_n[None, :])
    if sum_z_ptr is not None:
        tl.store(sum_z_ptr + columns, total, mask=is_sum_z[:, None] & mask_n[None, :])
    if grad_ptr is not None:
        grad = total * scale
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs_r, mask=is_rank, other=0.0).to(tl.float32)
            grad = grad * gate[:, None]
        offs_r, offs_n = offs_r.to(tl.int64), offs_n.to(tl.int64)
        to = grad_ptr + offs_r[:, None] * stride_gr + offs_n[None, :] * stride_gn
        grad = to_dtype(grad, grad_ptr.dtype.element_ty)
        tl.store(to, grad, mask=is_rank[:, None] & mask_n[None, :])
