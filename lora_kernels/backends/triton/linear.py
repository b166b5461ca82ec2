"""y, and dx in the other layout: the base product and the adapter's update in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .shrink import share_of_p, store_slot
from .tiles import dot, grouped, keep_mask, load_codes, load_tile, to_dtype


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["slots"])
def linear_kernel(
    x_ptr,
    w_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    a_ptr,
    q_ptr,
    p_ptr,
    slots_ptr,
    flags_ptr,
    gate_ptr,
    in_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    rng_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_qr,
    stride_qn,
    slots,
    k_share,
    p_scale,
    s_scale,
    threshold,
    BASE: tl.constexpr,
    K_INNER: tl.constexpr,
    SINGLE_PASS: tl.constexpr,
    PUBLISH: tl.constexpr,
    CONSUME: tl.constexpr,
    WAIT: tl.constexpr,
    GATE: tl.constexpr,
    IN_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    MASK_IN: tl.constexpr,
    MASK_OUT: tl.constexpr,
    SAVE_Z: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    LEFT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """z = x·W + mask(S)·Q, y = out_scale ⊙ z + bias; S = (P ⊙ gate)·s_scale.

    x [M, K] (times in_scale [K]), W [K, N] given by strides or as 4-bit codes of [N, K] (K_INNER)
    or of [K, N], a [R, K], q [R, N]. A program makes BLOCK_M × BLOCK_N of y.
    SINGLE_PASS: P = p_scale · mask(x)·aᵀ is summed beside the product, R ≤ BLOCK_R, and the
    programs of the first columns store it. Else P is the sum of `slots` [slots, M, R], BLOCK_R
    ranks at a time, and what they store; with one slot P is there already.
    LEFT: codes are the left operand, of which a matrix instruction takes 64 or 16 rows at a time.
    PUBLISH: the slots are made here, by as many programs, before all stream their share of W, and
    CONSUME: added last, at most 16 rows and BLOCK_R ranks. WAIT: for the flag that counts them
    (flags: how many have published, how many are done; the last one out clears both). Launched
    cooperatively, so that no program waits for one that has no place yet. In the interpreter, where
    programs run one after another, the two are two launches, without WAIT.
    BASE: "none", "dense", "codes", or "library": y holds x·W already.
    Rounding points: x, W to COMPUTE; x, a, S, q to WIDER; sums in float32; y and z once.
    Bytes: x, W once a tile of columns or rows, less what the L2 cache keeps; flops 2·M·N·(K + R),
    and in a single pass 2·M·K·BLOCK_R for each tile of columns. Deterministic.
    Tested by tests/triton/test_lora_linear.py.
    """
    pid_m, pid_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m, offs_n = (
        pid_m * BLOCK_M + tl.arange(0, BLOCK_M),
        pid_n * BLOCK_N + tl.arange(0, BLOCK_N),
    )
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)

    if PUBLISH:
        slot = tl.program_id(0)
        if slot < slots:
            share = share_of_p(
                x_ptr, a_ptr, in_scale_ptr, rng_ptr, 0, 0, slot * k_share,
                min(K, (slot + 1) * k_share), M, R, stride_xm, stride_xk, stride_ar, stride_ak,
                p_scale, threshold, IN_SCALE, MASK_IN, WIDER, PRECISION, WIDE, BLOCK_M, BLOCK_K,
                BLOCK_R,
            )  # fmt: skip
            store_slot(slots_ptr, slot, 0, 0, share, M, R, BLOCK_M, BLOCK_R)
            if WAIT:
                tl.debug_barrier()  # all threads have stored before one says so
                tl.atomic_add(flags_ptr, 1, sem="release")
        if not CONSUME:
            return

    if not (SINGLE_PASS or CONSUME):
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            ranks = r0 + offs_r
            part = load_slots(slots_ptr, offs_m, ranks, M, R, slots)
            if slots > 1 and pid_n == 0:
                store_p(p_ptr, offs_m, ranks, part, M, R)
            acc = add_update(
                acc, part, q_ptr, gate_ptr, offs_n, ranks, N, R, stride_qr, stride_qn, s_scale,
                GATE, WIDER, PRECISION, WIDE,
            )  # fmt: skip
        if MASK_OUT:
            acc = tl.where(
                keep_mask(rng_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N),
                acc,
                0.0,
            )

    if LEFT:
        acc_t = tl.trans(acc)
    if BASE == "dense" or BASE == "codes" or SINGLE_PASS:
        for k0 in range(0, K, BLOCK_K):
            offs_k = k0 + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            x = load_tile(x_ptr, offs_m, stride_xm, offs_k, stride_xk, mask_m, mask_k, WIDE)
            if IN_SCALE:
                in_scale = tl.load(in_scale_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                x = x.to(tl.float32) * in_scale[None, :]
            if BASE == "dense":
                w = load_tile(w_ptr, offs_k, stride_wk, offs_n, stride_wn, mask_k, mask_n, WIDE)
                acc = dot(to_dtype(x, COMPUTE), to_dtype(w, COMPUTE), acc, PRECISION)
            elif BASE == "codes":
                if K_INNER:
                    w = load_codes(
                        w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
                        offset_ptr, pid_n * BLOCK_N, k0, N, K, BLOCK_N, BLOCK_K, LOG2_BLOCK,
                        NESTED, WHOLE, WORDS, ASM, WIDE,
                    )  # fmt: skip
                    w = to_dtype(w, COMPUTE)
                    if LEFT:
                        acc_t = dot(w, tl.trans(to_dtype(x, COMPUTE)), acc_t, PRECISION)
                    else:
                        acc = dot(to_dtype(x, COMPUTE), tl.trans(w), acc, PRECISION)
                else:
                    w = load_codes(
                        w_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
                        offset_ptr, k0, pid_n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, LOG2_BLOCK,
                        NESTED, WHOLE, WORDS, ASM, WIDE,
                    )  # fmt: skip
                    acc = dot(to_dtype(x, COMPUTE), to_dtype(w, COMPUTE), acc, PRECISION)
            if SINGLE_PASS:
                if MASK_IN:
                    x = tl.where(
                        keep_mask(rng_ptr, pid_m * BLOCK_M, k0, threshold, BLOCK_M, BLOCK_K), x, 0.0
                    )
                a = load_tile(a_ptr, offs_k, stride_ak, offs_r, stride_ar, mask_k, offs_r < R, WIDE)
                p = dot(to_dtype(x, WIDER), to_dtype(a, WIDER), p, PRECISION)

    if LEFT:
        acc = tl.trans(acc_t)
    if CONSUME:
        if WAIT:
            while tl.atomic_add(flags_ptr, 0, sem="acquire") < slots:
                pass
            tl.debug_barrier()
        p = load_slots(slots_ptr, offs_m, offs_r, M, R, slots)
        if WAIT:
            tl.debug_barrier()
            if tl.atomic_add(flags_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
                tl.store(flags_ptr, 0)
                tl.store(flags_ptr + 1, 0)
        if slots > 1 and pid_n == 0:
            store_p(p_ptr, offs_m, offs_r, p, M, R)
    if SINGLE_PASS:
        p = p * p_scale
        if pid_n == 0:
            store_p(p_ptr, offs_m, offs_r, p, M, R)
    if SINGLE_PASS or CONSUME:
        if MASK_OUT:
            update = add_update(
                tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), p, q_ptr, gate_ptr, offs_n, offs_r,
                N, R, stride_qr, stride_qn, s_scale, GATE, WIDER, PRECISION, WIDE,
            )  # fmt: skip
            acc += tl.where(
                keep_mask(rng_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N),
                update,
                0.0,
            )
        else:
            acc = add_update(
                acc, p, q_ptr, gate_ptr, offs_n, offs_r, N, R, stride_qr, stride_qn, s_scale, GATE,
                WIDER, PRECISION, WIDE,
            )  # fmt: skip

    mask = mask_m[:, None] & mask_n[None, :]
    if WIDE:
        offs_m = offs_m.to(tl.int64)
    at = offs_m[:, None] * N + offs_n[None, :]
    if BASE == "library":
        acc += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SAVE_Z:
        tl.store(z_ptr + at, to_dtype(acc, z_ptr.dtype.element_ty), mask=mask)
    if OUT_SCALE:
        acc = acc * tl.load(out_scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    if BIAS:
        acc = acc + tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
    tl.store(y_ptr + at, to_dtype(acc, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_slots(slots_ptr, offs_m, ranks, M, R, slots):
    """Their sum [BLOCK_M, BLOCK_R], in order."""
    mask = (offs_m < M)[:, None] & (ranks < R)[None, :]
    at = slots_ptr + (offs_m.to(tl.int64)[:, None] * R + ranks[None, :])
    # Not from the L1 cache, which others' stores do not reach.
    total = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for _ in range(1, slots):
        at += M * R
        total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def store_p(p_ptr, offs_m, ranks, p, M, R):
    at = p_ptr + (offs_m.to(tl.int64)[:, None] * R + ranks[None, :])
    tl.store(at, p, mask=(offs_m < M)[:, None] & (ranks < R)[None, :])


@triton.jit
def add_update(
    acc,
    p,
    q_ptr,
    gate_ptr,
    offs_n,
    ranks,
    N,
    R,
    stride_qr,
    stride_qn,
    s_scale,
    GATE: tl.constexpr,
    WIDER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc + S·Q for these ranks."""
    s = p * s_scale
    if GATE:
        gate = tl.load(gate_ptr + ranks, mask=ranks < R, other=0.0)
        s = s * gate.to(tl.float32)[None, :]
    q = load_tile(q_ptr, ranks, stride_qr, offs_n, stride_qn, ranks < R, offs_n < N, WIDE)
    return dot(to_dtype(s, WIDER), to_dtype(q, WIDER), acc, PRECISION)
