"""From tensors to the equation's launches: what `ops` calls. Tests compile through these too."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear as library_linear

from ...core import reference
from ...core.call import (
    Grads,
    MultiGrads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ...core.packed4bit import Packed4bit
from .. import stacked, workspace
from ..dropout import NO_DROPOUT, Dropout
from . import (
    COOPERATIVE,
    LIBRARY,
    SINGLE_PASS,
    SPLIT,
    codec,
    configs,
    interpreted,
    launch,
    measured,
)
from .configs import Config
from .gradients import outer_kernel, reduce_kernel, shrink_outer_kernel
from .linear import linear_kernel
from .row_norm import row_norm_kernel
from .shrink import shrink_kernel

_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng = operands
    scaling, dropout_p, dtype, y_dtype, save_z = spec
    dropout = Dropout.of(dropout_p, rng)
    gemm = _Gemm(
        x, weight, lora_A, lora_B.t(), scaling, dtype, y_dtype, gate=rank_gate,
        out_scale=column_scale, bias=bias, dropout=dropout, save_z=save_z,
    )  # fmt: skip
    y, p, z = _linear(gemm, strategy)
    return y, Saved(p, z)


def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng = operands
    (p, z, _), (scaling, dropout_p, dtype, *_) = saved, spec
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias = needs
    dropout = Dropout.of(dropout_p, rng)
    (M, N), R = dy.shape, p.shape[1]
    dx = dA = dg = ds = slots = dbias = dc = None
    dB: Tensor | None = None
    once = None  # tiles of a kernel that computes dS and dB in one read of dY
    if need_B and (need_A or need_gate or need_x) and not (need_x and strategy == SINGLE_PASS):
        once = configs.shrink_outer(
            launch.target(dy), M, N, R, max(dy.dtype.itemsize, lora_B.dtype.itemsize)
        )
    if once is not None:
        slots, dB, dbias, dc = _shrink_outer(
            once, p, dy, lora_B, column_scale, z if need_column_scale else None, scaling,
            rank_gate, need_bias,
        )  # fmt: skip
    elif need_B or need_column_scale or need_bias:
        if need_B:
            dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        dbias, dc = _outer(
            p, dy, None if dB is None else dB.t(), v_scale=column_scale,
            z=z if need_column_scale else None, scale=scaling, gate=rank_gate, need_sum=need_bias,
        )  # fmt: skip
    if need_x:
        gemm = _Gemm(
            dy, weight, lora_B.t(), lora_A, scaling * dropout.scale, dtype, x.dtype, forward=False,
            gate=rank_gate, in_scale=column_scale, dropout=dropout,
        )  # fmt: skip
        dx, ds, _ = _linear(gemm, strategy, slots)
    elif need_A or need_gate:
        if slots is None:
            slots = _shrink(dy, lora_B.t(), column_scale, NO_DROPOUT)
        ds = slots[0] if slots.shape[0] == 1 else slots.sum(0)
    if need_A:
        assert ds is not None
        dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _outer(ds, x, dA, dropout=dropout, scale=scaling * dropout.scale, gate=rank_gate)
    if need_gate:
        assert ds is not None
        dg = (ds * p).sum(0).mul_(scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


def multi_lora_linear(
    operands: MultiOperands, spec: MultiSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K], whose rows each have an adapter or none.

    All ranks of all adapters are one GEMM, which reads W once. A row's other ranks are zeroed.
    """
    x, weight, lora_A, lora_B, index, bias, rng = operands
    scaling, dropout_p, dtype, y_dtype = spec
    if not len(x):
        y = x.new_empty(0, lora_B[0].shape[0], dtype=y_dtype)
        return y, Saved(x.new_empty(0, max(A.shape[0] for A in lora_A), dtype=torch.float32))
    dropout = Dropout.of(dropout_p, rng)
    stack = stacked.stack(lora_A, lora_B, index, scaling)
    slots = stack.kept(_shrink(x, stack.lora_A, None, dropout).sum(0))
    gemm = _Gemm(
        x, weight, stack.lora_A, stack.lora_B.t(), 1.0, dtype, y_dtype, gate=stack.gate, bias=bias
    )
    y, p, _ = _linear(gemm, strategy, slots[None])
    return y, Saved(stack.compact(p))


def multi_lora_linear_backward(
    dy: Tensor,
    operands: MultiOperands,
    saved: Saved,
    spec: MultiSpec,
    needs: MultiNeeds,
    strategy: str,
) -> MultiGrads:
    """Compute the gradients for dy [M, N] and x [M, K].

    dx is computed as y is; dA and dB for each adapter, from its own rows alone.
    """
    x, weight, lora_A, lora_B, index, _, rng = operands
    p, (scaling, dropout_p, dtype, _) = saved.p, spec
    need_x, need_A, need_B, need_bias = needs
    dropout = Dropout.of(dropout_p, rng)
    dA = [torch.zeros_like(A) if need else None for A, need in zip(lora_A, need_A, strict=True)]
    dB = [torch.zeros_like(B) if need else None for B, need in zip(lora_B, need_B, strict=True)]
    dx = ds = dbias = None
    if not len(x):
        dbias = dy.new_zeros(dy.shape[1], dtype=torch.float32) if need_bias else None
        dx = torch.empty_like(x) if need_x else None
        return MultiGrads(dx, dA, dB, dbias)
    if need_bias:
        dbias, _ = _outer(p, dy, None, need_sum=True)
    stack = stacked.stack(lora_A, lora_B, index, scaling)
    if need_x or any(need_A):
        ds = stack.kept(_shrink(dy, stack.lora_B.t(), None, NO_DROPOUT).sum(0))
    if need_x:
        assert ds is not None
        gemm = _Gemm(
            dy, weight, stack.lora_B.t(), stack.lora_A, dropout.scale, dtype, x.dtype,
            forward=False, gate=stack.gate, dropout=dropout,
        )  # fmt: skip
        dx, _, _ = _linear(gemm, strategy, ds[None])
    if ds is not None:
        ds = stack.compact(ds)
    if rng is not None and any(need_A):  # by the rows' own places, before they are sorted
        x = x * reference.dropout_mask(rng, x.shape[0], x.shape[1], dropout_p)
    for e, rows in stack.rows.each():
        A, B, s = dA[e], dB[e], p[rows, : lora_A[e].shape[0]]
        if B is not None:
            _outer(s.contiguous(), dy[rows], B.t(), scale=scaling[e])
        if A is not None:
            assert ds is not None
            own = ds[rows, : A.shape[0]].contiguous()
            _outer(own, x[rows], A, scale=scaling[e] * dropout.scale)
    return MultiGrads(dx, dA, dB, dbias)


class _Gemm(NamedTuple):
    """y = out_scale ⊙ (v·W + S·q) + bias, v = x ⊙ in_scale, S = s_scale · gate ⊙ P, P = v·aᵀ.

    Args:
        x: [M, inner].
        weight: W; its rows are columns of y in the forward, the inner dimension in the backward.
        a: [R, inner].
        q: [R, columns].
        dropout: masks v in P in the forward, and S·q in the backward.
        save_z: whether to return y before out_scale and bias.
    """

    x: Tensor
    weight: Tensor | Packed4bit | None
    a: Tensor
    q: Tensor
    s_scale: float
    dtype: torch.dtype
    y_dtype: torch.dtype
    forward: bool = True
    gate: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    dropout: Dropout = NO_DROPOUT
    save_z: bool = False


def _linear(
    gemm: _Gemm, strategy: str, slots: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute y [M, columns], P [M, R] and z or None.

    slots: P if it is at hand, in partial sums [slots, M, R].
    """
    (
        x, weight, a, q, s_scale, dtype, y_dtype, forward, gate, in_scale, out_scale, bias,
        dropout, save_z,
    ) = gemm  # fmt: skip
    (M, K), (R, N), target = x.shape, q.shape, launch.target(x)
    mask_in, mask_out = (dropout, NO_DROPOUT) if forward else (NO_DROPOUT, dropout)
    codes = weight if isinstance(weight, Packed4bit) else None
    base, w = "none", None
    if strategy == LIBRARY and weight is not None and M:
        base, y = "library", _library(x, weight, in_scale, forward, (N, K), dtype, y_dtype)
    else:
        y = x.new_empty(M, N, dtype=y_dtype)
        if codes is not None:
            base, w = "codes", codes.packed
        elif isinstance(weight, Tensor):
            base, w = "dense", weight if forward else weight.t()
    z = torch.empty_like(y) if save_z else None
    if not M:
        return y, x.new_empty(M, R, dtype=torch.float32), z
    # The 4-bit weight's own rows run along K in the forward, along dx's columns in the backward.
    format_4bit = launch.format_4bit(codes, K if forward else N, target)
    single_pass = strategy == SINGLE_PASS
    multiplied, operand = max(x.dtype.itemsize, dtype.itemsize), _operand(x, a).itemsize
    config = configs.UPDATE if base in ("library", "none") and not single_pass else configs.linear(
        target, M, max(multiplied, operand) if single_pass else multiplied, codes is not None,
        R if single_pass else 0,
        in_scale is not None or dropout.rng is not None or operand > multiplied,
        codes is not None and not format_4bit["WORDS"],
    )  # fmt: skip
    if w is not None and in_scale is None and dropout.rng is None:  # as `tune` measures it
        columns, inner = (N, K) if forward else (K, N)
        widest = max(multiplied, operand, q.dtype.itemsize)
        known = measured.find(
            measured.shape(target, M, columns, inner, R, widest, codes is not None)
        )
        if known is not None and known.strategy == strategy:
            config = (known.forward if forward else known.backward) or config
    share = configs.cooperative(M, N, K, R, config) if strategy == COOPERATIVE else 0
    flags = workspace.flags(x.device) if share and not interpreted() else None
    if single_pass:
        slots = x.new_empty(1, M, R, dtype=torch.float32)
    elif share:
        slots = x.new_empty(triton.cdiv(K, share), M, R, dtype=torch.float32)
    elif slots is None:
        slots = _shrink(x, a, in_scale, mask_in)
    p = slots[0] if slots.shape[0] == 1 else x.new_empty(M, R, dtype=torch.float32)
    gate, in_scale, out_scale, bias = map(_contiguous, (gate, in_scale, out_scale, bias))
    wide = any(map(launch.is_wide, (x, y, a, q))) or (
        base == "dense" and w is not None and launch.is_wide(w)
    )
    wide = wide or (codes is not None and N * K >= 1 << 31)
    programs = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    config = replace(config, cooperative=flags is not None)
    args = (
        x, w, *launch.tables(codes), a, q, p, slots, flags, gate, in_scale, out_scale, bias,
        dropout.rng, y, z, M, N, K, R, *x.stride(), *launch.strides(w, codes), *a.stride(),
        *q.stride(), slots.shape[0], share, mask_in.scale, s_scale, dropout.threshold,
    )  # fmt: skip
    meta = dict(
        BASE=base, K_INNER=forward, SINGLE_PASS=single_pass, WAIT=flags is not None,
        GATE=gate is not None, IN_SCALE=in_scale is not None, OUT_SCALE=out_scale is not None,
        BIAS=bias is not None, MASK_IN=mask_in.rng is not None, MASK_OUT=mask_out.rng is not None,
        SAVE_Z=save_z, COMPUTE=_DTYPE[dtype], WIDER=_DTYPE[_operand(x, a)],
        PRECISION=configs.precision(target), **format_4bit,
        LEFT=codes is not None and forward and config.block_m < 64, WIDE=wide,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=configs.block_of_ranks(R), GROUP_M=config.group_m,
    )  # fmt: skip
    if share and programs > target.multiprocessors:
        fitting = launch.choose_stages(
            programs, target, linear_kernel, config, x.device, *args, PUBLISH=True, CONSUME=True,
            **meta,
        )  # fmt: skip
        if fitting is None:
            return _linear(gemm, SPLIT)
        config = fitting
    # One after another where programs are: those that publish, then all.
    phases = [(True, False), (False, True)] if share and interpreted() else [(share > 0, share > 0)]
    for publish, consume in phases:
        launch.run(
            linear_kernel, (programs,), config, x.device, *args, PUBLISH=publish, CONSUME=consume,
            **meta,
        )  # fmt: skip
    return y, p, z


def _library(
    x: Tensor,
    weight: Tensor | Packed4bit,
    in_scale: Tensor | None,
    forward: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> Tensor:
    """The library's product, contiguous, in y's dtype; shape: (columns, inner)."""
    if in_scale is not None:
        x = x * in_scale.to(x.dtype)
    if isinstance(weight, Packed4bit):
        weight = codec.dequantize(weight, shape if forward else shape[::-1], dtype)
    weight = weight.to(dtype)
    return library_linear(x.to(dtype), weight if forward else weight.t()).to(y_dtype)


def _shrink(x: Tensor, a: Tensor, in_scale: Tensor | None, dropout: Dropout) -> Tensor:
    """scale · mask(x ⊙ in_scale)·aᵀ in slots to be added: float32 [slots, M, R]."""
    (M, K), R, target = x.shape, a.shape[0], launch.target(x)
    config, share = configs.shrink(target, M, K, R, _operand(x, a).itemsize)
    slots = triton.cdiv(K, share)
    out = x.new_empty(slots, M, R, dtype=torch.float32)
    if not M:
        return out
    in_scale = _contiguous(in_scale)
    launch.run(
        shrink_kernel, (triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_n), slots),
        config, x.device,
        x, a, in_scale, dropout.rng, out, M, K, R, *x.stride(), *a.stride(), share, dropout.scale,
        dropout.threshold,
        IN_SCALE=in_scale is not None, MASK_IN=dropout.rng is not None,
        WIDER=_DTYPE[_operand(x, a)], PRECISION=configs.precision(target),
        WIDE=launch.is_wide(x) or launch.is_wide(a),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=config.block_n,
    )  # fmt: skip
    return out


def _outer(
    s: Tensor,
    v: Tensor,
    grad: Tensor | None,
    *,
    v_scale: Tensor | None = None,
    z: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    scale: float = 1.0,
    gate: Tensor | None = None,
    need_sum: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Write grad [R, N] = scale · gate ⊙ sᵀ·mask(v ⊙ v_scale); return Σ v and, given z, Σ v ⊙ z.

    The sums are float32 [N], or None.
    """
    need_sum_z = z is not None
    (M, N), R, target = v.shape, s.shape[1], launch.target(v)
    sums, sums_z = (
        v.new_empty(N, dtype=torch.float32) if needed else None for needed in (need_sum, need_sum_z)
    )
    if not M:
        for t in (grad, sums, sums_z):
            if t is not None:
                t.zero_()
        return sums, sums_z
    config, share = configs.outer(target, M, N, R)
    count = triton.cdiv(M, share)
    parts = v.new_empty(count, R + 2, N, dtype=torch.float32)
    v_scale, ranks = _contiguous(v_scale), grad is not None
    launch.run(
        outer_kernel,
        (triton.cdiv(N, config.block_n), triton.cdiv(R, config.block_k) if ranks else 1, count),
        config, v.device,
        s, v, v_scale, z, dropout.rng, parts, M, N, R, *v.stride(), share, dropout.threshold,
        RANKS=ranks, V_SCALE=v_scale is not None, MASK=dropout.rng is not None, SUM=need_sum,
        SUM_Z=need_sum_z, WIDER=tl.float32 if grad is None else _DTYPE[_operand(v, grad)],
        PRECISION=configs.precision(target), WIDE=launch.is_wide(v),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_k,
    )  # fmt: skip
    return _reduce(parts, scale, gate, grad, need_sum, need_sum_z)


def _shrink_outer(
    plan: tuple[Config, int],
    s: Tensor,
    v: Tensor,
    b: Tensor,
    v_scale: Tensor | None,
    z: Tensor | None,
    scale: float,
    gate: Tensor | None,
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (v ⊙ v_scale)·b in slots, and what `_outer` gives with grad [N, R]; read v once.

    plan: tiles, and a slot's share of N.
    """
    (config, share), need_sum_z = plan, z is not None
    grad = torch.empty_like(b, memory_format=torch.contiguous_format)
    (M, N), R, target = v.shape, s.shape[1], launch.target(v)
    slots = v.new_empty(triton.cdiv(N, share), M, R, dtype=torch.float32)
    parts = v.new_empty(triton.cdiv(M, config.block_m), R + 2, N, dtype=torch.float32)
    v_scale = _contiguous(v_scale)
    launch.run(
        shrink_outer_kernel, (parts.shape[0], slots.shape[0]), config, v.device,
        v, b, s, v_scale, z, slots, parts, M, N, R, *v.stride(), *b.stride(), share,
        V_SCALE=v_scale is not None, SUM=need_sum, SUM_Z=need_sum_z, WIDER=_DTYPE[_operand(v, b)],
        PRECISION=configs.precision(target), WIDE=launch.is_wide(v),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_k,
    )  # fmt: skip
    return slots, grad, *_reduce(parts, scale, gate, grad.t(), need_sum, need_sum_z)


def _reduce(
    parts: Tensor,
    scale: float,
    gate: Tensor | None,
    grad: Tensor | None,
    need_sum: bool,
    need_sum_z: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """grad [R, N] = scale · gate ⊙ Σ parts, written, and the two sums, float32 [N]."""
    count, N, R = parts.shape[0], parts.shape[2], parts.shape[1] - 2
    gate, config = _contiguous(gate), configs.REDUCE
    sums, sums_z = (parts.new_empty(N) if needed else None for needed in (need_sum, need_sum_z))
    launch.run(
        reduce_kernel, (triton.cdiv(N, config.block_n), R + 2), config, parts.device,
        parts, gate, grad, sums, sums_z, N, R, *((0, 0) if grad is None else grad.stride()), count,
        scale, RANKS=grad is not None, GATE=gate is not None, SUM=need_sum, SUM_Z=need_sum_z,
        BLOCK_N=config.block_n,
    )  # fmt: skip
    return sums, sums_z


def dora_norm(
    weight: Tensor | Packed4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """‖W + scaling · (B ⊙ gate)·A‖ of each row: float32 [N]."""
    (R, K), N, target = lora_A.shape, lora_B.shape[0], launch.target(lora_A)
    codes = weight if isinstance(weight, Packed4bit) else None
    w = weight.packed if isinstance(weight, Packed4bit) else weight
    # A gate rounds B where that has 16 bits.
    wider = torch.float32 if rank_gate is not None else _operand(lora_A, lora_B)
    config, share = configs.row_norm(target, N, K, wider.itemsize)
    slots = torch.empty(triton.cdiv(K, share), N, dtype=torch.float32, device=lora_A.device)
    gate, block_r = _contiguous(rank_gate), configs.block_of_ranks(R)
    wide = N * K >= 1 << 31 or any(map(launch.is_wide, (w, lora_A, lora_B)))
    launch.run(
        row_norm_kernel, (triton.cdiv(N, config.block_n), slots.shape[0]), config, w.device,
        w, *launch.tables(codes), lora_A, lora_B, gate, slots, N, K, R,
        *launch.strides(w, codes), *lora_A.stride(), *lora_B.stride(), share, scaling,
        CODES=codes is not None, GATE=gate is not None, WIDER=_DTYPE[wider],
        PRECISION=configs.precision(target), **launch.format_4bit(codes, K, target), WIDE=wide,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        ONE_BLOCK=block_r >= R,
    )  # fmt: skip
    return slots.sum(0).sqrt_()


def _operand(x: Tensor, a: Tensor) -> torch.dtype:
    """In which x and the adapter are multiplied."""
    return torch.promote_types(x.dtype, a.dtype)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
