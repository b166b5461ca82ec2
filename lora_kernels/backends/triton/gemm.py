"""y, and dx in the other layout: the base GEMM and the adapter's low-rank update in one kernel.

    z = x·W + S·Q,    y = out_scale ⊙ z + bias,    S = (P ⊙ gate)·s_scale

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

from .tiles import dot, grouped, load_codes, load_tile, scale_columns, to_dtype


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
    x_ptr, stride_xm, stride_xk,
    w_ptr, stride_wk, stride_wn,
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    a_ptr, stride_ar, stride_ak,
    q_ptr, stride_qr, stride_qn,
    p_ptr, gate_ptr, in_scale_ptr, out_scale_ptr, bias_ptr, y_ptr, z_ptr,
    M, N, K, R, s_scale,
    K_INNER: tl.constexpr, LEFT: tl.constexpr,
    LOG2_BLOCK: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
    COMPUTE: tl.constexpr, WIDER: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute y, with P = (x ⊙ in_scale)·aᵀ summed in the main loop, R ≤ BLOCK_R.

    The programs of the first columns store P. Flops 2·M·N·(K + R), and 2·M·K·BLOCK_R for each tile
    of columns.
    """
    dense, sizes = (w_ptr, stride_wk, stride_wn), (N, K)
    codes = packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr
    FORMAT: tl.constexpr = (LOG2_BLOCK, WHOLE, WORDS, ASM)
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if LEFT:
        acc = tl.trans(acc)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = load_tile(x_ptr, offs_m, stride_xm, offs_k, stride_xk, mask_m, mask_k, WIDE)
        x = scale_columns(x, in_scale_ptr, offs_k, mask_k)
        acc = add_base(
            acc, x, dense, codes, n0, k0, sizes, K_INNER, LEFT, FORMAT, COMPUTE, PRECISION,
            WIDE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        a = load_tile(a_ptr, offs_k, stride_ak, offs_r, stride_ar, mask_k, offs_r < R, WIDE)
        p = dot(to_dtype(x, WIDER), to_dtype(a, WIDER), p, PRECISION)
    if LEFT:
        acc = tl.trans(acc)
    if pid_n == 0:
        store_p(p_ptr, offs_m, offs_r, p, M, R)
    q = load_tile(q_ptr, offs_r, stride_qr, offs_n, stride_qn, offs_r < R, offs_n < N, WIDE)
    acc = add_update(acc, p, q, gate_ptr, offs_r, R, s_scale, WIDER, PRECISION)
    store_y(acc, y_ptr, z_ptr, out_scale_ptr, bias_ptr, offs_m, offs_n, M, N, WIDE)


@triton.jit
def add_base(
    acc, x, dense, codes, n0, k0, sizes,
    K_INNER: tl.constexpr, LEFT: tl.constexpr, FORMAT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + x·W for one step of the main loop, transposed if LEFT.

    Args:
        dense: the pointer and the strides of w, or None as the pointer.
        codes, FORMAT: as of `load_codes`; None as `packed_ptr` without codes.
        sizes: N and K.
    """
    w_ptr, stride_wk, stride_wn = dense
    N, K = sizes
    if w_ptr is not None:
        offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, offs_k, stride_wk, offs_n, stride_wn, offs_k < K, offs_n < N, WIDE)
        return dot(to_dtype(x, COMPUTE), to_dtype(w, COMPUTE), acc, PRECISION)
    elif codes[0] is not None:
        if K_INNER:
            w = load_codes(codes, n0, k0, N, K, BLOCK_N, BLOCK_K, FORMAT, WIDE)
            if LEFT:
                x = tl.trans(to_dtype(x, COMPUTE))
                return dot(to_dtype(w, COMPUTE), x, acc, PRECISION)
            else:
                w = tl.trans(to_dtype(w, COMPUTE))
                return dot(to_dtype(x, COMPUTE), w, acc, PRECISION)
        else:
            w = load_codes(codes, k0, n0, K, N, BLOCK_K, BLOCK_N, FORMAT, WIDE)
            return dot(to_dtype(x, COMPUTE), to_dtype(w, COMPUTE), acc, PRECISION)
    else:
        return acc


@triton.jit
def store_p(p_ptr, offs_m, offs_r, p, M, R):
    at = p_ptr + (offs_m.to(tl.int64)[:, None] * R + offs_r[None, :])
    tl.store(at, p, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


@triton.jit
def add_update(
    acc, p, q, gate_ptr, offs_r, R, s_scale, WIDER: tl.constexpr, PRECISION: tl.constexpr
):
    """Return acc + S·Q for these ranks."""
    s = p * s_scale
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0)
        s = s * gate.to(tl.float32)[None, :]
    return dot(to_dtype(s, WIDER), to_dtype(q, WIDER), acc, PRECISION)


@triton.jit
def store_y(
    acc, y_ptr, z_ptr, out_scale_ptr, bias_ptr, offs_m, offs_n, M, N, WIDE: tl.constexpr
):  # fmt: skip
    """Store z if z_ptr is given, and y = out_scale ⊙ z + bias."""
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if WIDE:
        offs_m = offs_m.to(tl.int64)
    at = offs_m[:, None] * N + offs_n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, to_dtype(acc, z_ptr.dtype.element_ty), mask=mask)
    if out_scale_ptr is not None:
        acc = acc * tl.load(out_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    tl.store(y_ptr + at, to_dtype(acc, y_ptr.dtype.element_ty), mask=mask)
