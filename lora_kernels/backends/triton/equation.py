"""The functions that `ops` calls, which launch kernels on tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear as library_linear

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.packed4bit import Packed4bit
from ...device import DeviceInfo
from .. import workspace
from ..dropout import NO_DROPOUT, Dropout
from . import (
    COOPERATIVE,
    FUSED,
    LIBRARY,
    TWO_PASS,
    codec,
    configs,
    is_interpreted,
    launch,
    measured,
)
from .arguments import Codes, Format, Mask, Matrix
from .configs import GemmTiles, OuterTiles
from .gradients import outer_kernel, reduce_kernel, shrink_outer_kernel
from .linear import cooperative_kernel, fused_kernel, two_pass_kernel
from .row_norm import row_norm_kernel
from .shrink import shrink_kernel


@launch.replayed
def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng = operands
    scaling, dropout_p, dtype, y_dtype, save_z = spec
    dropout = Dropout.from_rng(dropout_p, rng)
    gemm = _Gemm(x, weight, lora_A, lora_B.t(), scaling, dtype, y_dtype)
    gemm = gemm._replace(gate=rank_gate, out_scale=column_scale, bias=bias)
    gemm = gemm._replace(dropout=dropout, save_z=save_z)
    y, p, z = _linear(gemm, strategy)
    return y, Saved(p, z)


@launch.replayed
def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng = operands
    (p, z, _), (scaling, dropout_p, dtype, *_) = saved, spec
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias = needs
    dropout = Dropout.from_rng(dropout_p, rng)
    (M, N), R = dy.shape, p.shape[1]
    dx = dA = dg = ds = partials = dbias = dc = None
    dB: Tensor | None = None
    once = None  # tiles of a kernel that computes dS and dB in one read of dY
    if need_B and (need_A or need_gate or need_x) and not (need_x and strategy == FUSED):
        once = configs.shrink_outer(
            launch.target(dy), M, N, R, max(dy.dtype.itemsize, lora_B.dtype.itemsize)
        )
    z = z if need_column_scale else None
    if once is not None:
        partials, dB, dbias, dc = _shrink_outer(
            once, p, dy, lora_B, column_scale, z, scaling, rank_gate, need_bias
        )
    elif need_B or need_column_scale or need_bias:
        if need_B:
            dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        outer = partial(_outer, p, dy, None if dB is None else dB.t(), v_scale=column_scale)
        dbias, dc = outer(z=z, scale=scaling, gate=rank_gate, need_sum=need_bias)
    if need_x:
        s_scale = scaling * dropout.scale
        gemm = _Gemm(dy, weight, lora_B.t(), lora_A, s_scale, dtype, x.dtype, forward=False)
        gemm = gemm._replace(gate=rank_gate, in_scale=column_scale, dropout=dropout)
        dx, ds, _ = _linear(gemm, strategy, partials)
    elif need_A or need_gate:
        if partials is None:
            partials = _shrink(dy, lora_B.t(), column_scale, NO_DROPOUT)
        ds = partials[0] if partials.shape[0] == 1 else partials.sum(0)
    if need_A:
        assert ds is not None
        dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _outer(ds, x, dA, dropout=dropout, scale=scaling * dropout.scale, gate=rank_gate)
    if need_gate:
        assert ds is not None
        dg = (ds * p).sum(0).mul_(scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


class _Gemm(NamedTuple):
    """y = out_scale ⊙ (v·W + S·q) + bias, v = x ⊙ in_scale, S = s_scale · gate ⊙ P, P = v·aᵀ.

    Args:
        x: [M, inner].
        weight: W. Its rows are columns of y in the forward, and the inner dimension in the
            backward.
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
    gemm: _Gemm, strategy: str, partials: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute y [M, columns], P [M, R] and z or None.

    partials: the partial sums [num_splits, M, R] of P if they were computed before, or None.
    """
    x, weight, a, q, forward, dropout = (
        gemm.x,
        gemm.weight,
        gemm.a,
        gemm.q,
        gemm.forward,
        gemm.dropout,
    )
    (M, K), (R, N), target = x.shape, q.shape, launch.target(x)
    from_library = strategy == LIBRARY and weight is not None and M > 0
    y = _library(gemm) if from_library else x.new_empty(M, N, dtype=gemm.y_dtype)
    z = torch.empty_like(y) if gemm.save_z else None
    if not M:
        return y, x.new_empty(M, R, dtype=torch.float32), z
    mask_in, mask_out = (dropout, NO_DROPOUT) if forward else (NO_DROPOUT, dropout)
    codes = weight if isinstance(weight, Packed4bit) and not from_library else None
    dense = weight if isinstance(weight, Tensor) and not from_library else None
    w = dense if dense is None or forward else dense.t()
    # A row of a 4-bit weight runs along K in the forward, and along dx's columns in the backward.
    format_4bit = launch.format_4bit(codes, K if forward else N, target)
    config = _tiles(gemm, strategy, target, w is not None, codes, format_4bit)
    k_per_split = configs.cooperative(M, N, K, R, config) if strategy == COOPERATIVE else 0
    flags = workspace.flags(x.device) if k_per_split and not is_interpreted() else None
    if strategy == FUSED:
        partials = x.new_empty(1, M, R, dtype=torch.float32)
    elif k_per_split:
        partials = x.new_empty(triton.cdiv(K, k_per_split), M, R, dtype=torch.float32)
    elif partials is None:
        partials = _shrink(x, a, gemm.in_scale, mask_in)
    p = partials[0] if partials.shape[0] == 1 else x.new_empty(M, R, dtype=torch.float32)
    wide = any(launch.is_wide(t) for t in (x, y, a, q, w) if t is not None)
    wide = wide or (codes is not None and N * K >= 1 << 31)
    programs = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    config = replace(config, cooperative=flags is not None)

    base = (
        Matrix.from_tensor(x),
        None if w is None else Matrix.from_tensor(w),
        None if codes is None else Codes.from_weight(codes),
    )
    factors = map(_contiguous, (gemm.gate, gemm.in_scale, gemm.out_scale, gemm.bias))
    masked = (Mask.from_dropout(mask_in),), (Mask.from_dropout(mask_out), y, z, M, N, K, R)
    meta: dict[str, Any] = {
        "K_INNER": forward,
        "LEFT": codes is not None and forward and config.block_m < 64,
        "FORMAT": format_4bit,
        "TYPES": launch.build_types(target, launch.promote_dtypes(x, a), wide, gemm.dtype),
        **config.blocks,
        "BLOCK_R": configs.block_of_ranks(R),
        "GROUP_M": config.group_m,
    }
    scales, A, Q = (mask_in.scale, gemm.s_scale), Matrix.from_tensor(a), Matrix.from_tensor(q)
    run = partial(launch.run, grid=(programs,), device=x.device)
    if strategy == FUSED:
        run(fused_kernel, config, *base, A, Q, p, *factors, *masked[0], *masked[1], *scales, **meta)
    elif not k_per_split:
        args = *base, Q, p, partials, *factors, *masked[1], partials.shape[0], gemm.s_scale
        meta["BLOCK_R"] = configs.block_of_update(R, launch.promote_dtypes(x, a).itemsize)
        run(two_pass_kernel, config, *args, ADD_TO_Y=from_library, **meta)
    else:
        sizes = partials.shape[0], k_per_split
        args = *base, A, Q, p, partials, flags, *factors, *masked[0], *masked[1], *sizes, *scales
        if programs > target.multiprocessors:
            both = {"PUBLISH": True, "CONSUME": True, **meta}
            fitting = launch.choose_stages(
                programs, target, cooperative_kernel, config, x.device, *args, **both
            )
            if fitting is None:
                return _linear(gemm, TWO_PASS)
            config = fitting
        # The interpreter runs programs in order, so a first launch computes all partial sums.
        for publish, consume in (
            [(True, False), (False, True)] if is_interpreted() else [(True, True)]
        ):
            run(cooperative_kernel, config, *args, PUBLISH=publish, CONSUME=consume, **meta)
    return y, p, z


def _tiles(
    gemm: _Gemm,
    strategy: str,
    target: DeviceInfo,
    dense: bool,
    codes: Packed4bit | None,
    format_4bit: Format,
) -> GemmTiles:
    """Return the tiles of a kernel with a dense, a 4-bit or no base GEMM."""
    x, (M, K), (R, N) = gemm.x, gemm.x.shape, gemm.q.shape
    fused, base = strategy == FUSED, dense or codes is not None
    multiplied = max(x.dtype.itemsize, gemm.dtype.itemsize)
    operand = launch.promote_dtypes(x, gemm.a).itemsize
    unchanged = gemm.in_scale is None and gemm.dropout.rng is None
    config = configs.UPDATE
    if base or fused:
        config = configs.linear(
            target,
            M,
            max(multiplied, operand) if fused else multiplied,
            codes is not None,
            R if fused else 0,
            in_registers=not unchanged or operand > multiplied,
            scattered=codes is not None and not format_4bit.WORDS,
        )
    if base and unchanged:  # `tune` measures calls like this one
        columns, inner = (N, K) if gemm.forward else (K, N)
        dtypes = gemm.dtype, gemm.q.dtype
        key = measured.shape(target, M, columns, inner, R, *dtypes, codes is not None)
        known = measured.find(key)
        if known is not None and known.strategy == strategy:
            return (known.forward if gemm.forward else known.backward) or config
    return config


def _library(gemm: _Gemm) -> Tensor:
    """Compute the base GEMM [M, columns] by PyTorch, contiguous and in y's dtype."""
    x, weight, dtype = gemm.x, gemm.weight, gemm.dtype
    if gemm.in_scale is not None:
        x = x * gemm.in_scale.to(x.dtype)
    if isinstance(weight, Packed4bit):
        shape = gemm.q.shape[1], x.shape[1]
        weight = codec.dequantize(weight, shape if gemm.forward else shape[::-1], dtype)
    assert weight is not None
    weight = weight.to(dtype)
    return library_linear(x.to(dtype), weight if gemm.forward else weight.t()).to(gemm.y_dtype)


def _shrink(x: Tensor, a: Tensor, in_scale: Tensor | None, dropout: Dropout) -> Tensor:
    """Return the partial sums of scale · mask(x ⊙ in_scale)·aᵀ, float32 [num_splits, M, R]."""
    (M, K), R, target = x.shape, a.shape[0], launch.target(x)
    config, k_per_split = configs.shrink(target, M, K, R, launch.promote_dtypes(x, a).itemsize)
    num_splits = triton.cdiv(K, k_per_split)
    partials = x.new_empty(num_splits, M, R, dtype=torch.float32)
    if not M:
        return partials
    grid = triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r), num_splits
    operands = (
        Matrix.from_tensor(x),
        Matrix.from_tensor(a),
        _contiguous(in_scale),
        Mask.from_dropout(dropout),
    )
    types = launch.build_types(
        target, launch.promote_dtypes(x, a), launch.is_wide(x) or launch.is_wide(a)
    )
    args = *operands, partials, M, K, R, k_per_split, dropout.scale
    launch.run(
        shrink_kernel, config, *args, grid=grid, device=x.device, TYPES=types, **config.blocks
    )
    return partials


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
    wider = torch.float32 if grad is None else launch.promote_dtypes(v, grad)
    config, m_per_split = configs.outer(target, M, N, R, wider.itemsize)
    num_splits = triton.cdiv(M, m_per_split)
    partials = v.new_empty(num_splits, R + 2, N, dtype=torch.float32)
    ranks = triton.cdiv(R, config.block_r) if grad is not None else 1
    grid = triton.cdiv(N, config.block_n), ranks, num_splits
    meta = {
        "RANKS": grad is not None,
        "SUM": need_sum,
        "TYPES": launch.build_types(target, wider, launch.is_wide(v)),
        **config.blocks,
    }
    args = (
        s,
        Matrix.from_tensor(v),
        _contiguous(v_scale),
        z,
        Mask.from_dropout(dropout),
        partials,
        M,
        N,
        R,
        m_per_split,
    )
    launch.run(outer_kernel, config, *args, grid=grid, device=v.device, **meta)
    return _reduce(partials, scale, gate, grad, need_sum, need_sum_z)


def _shrink_outer(
    plan: tuple[OuterTiles, int],
    s: Tensor,
    v: Tensor,
    b: Tensor,
    v_scale: Tensor | None,
    z: Tensor | None,
    scale: float,
    gate: Tensor | None,
    need_sum: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the partial sums of (v ⊙ v_scale)·b, and grad [N, R] and sums as `_outer` does.

    The kernel reads v once.

    plan: the result of `configs.shrink_outer`.
    """
    (config, n_per_split), need_sum_z = plan, z is not None
    grad = torch.empty_like(b, memory_format=torch.contiguous_format)
    (M, N), R, target = v.shape, s.shape[1], launch.target(v)
    partials = v.new_empty(triton.cdiv(N, n_per_split), M, R, dtype=torch.float32)
    grad_partials = v.new_empty(triton.cdiv(M, config.block_m), R + 2, N, dtype=torch.float32)
    meta = {
        "SUM": need_sum,
        "TYPES": launch.build_types(target, launch.promote_dtypes(v, b), launch.is_wide(v)),
        **config.blocks,
    }
    operands = Matrix.from_tensor(v), Matrix.from_tensor(b), s, _contiguous(v_scale), z
    args = *operands, partials, grad_partials, M, N, R, n_per_split
    grid = grad_partials.shape[0], partials.shape[0]
    launch.run(shrink_outer_kernel, config, *args, grid=grid, device=v.device, **meta)
    sums = _reduce(grad_partials, scale, gate, grad.t(), need_sum, need_sum_z)
    return partials, grad, *sums


def _reduce(
    partials: Tensor,
    scale: float,
    gate: Tensor | None,
    grad: Tensor | None,
    need_sum: bool,
    need_sum_z: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Write scale · gate ⊙ Σ partials to grad [R, N], and return the two sums, float32 [N]."""
    num_splits, N, R = partials.shape[0], partials.shape[2], partials.shape[1] - 2
    gate, config = _contiguous(gate), configs.REDUCE
    sums, sums_z = (partials.new_empty(N) if needed else None for needed in (need_sum, need_sum_z))
    to = None if grad is None else Matrix.from_tensor(grad)
    args, grid = (
        (partials, gate, to, sums, sums_z, N, R, num_splits, scale),
        (triton.cdiv(N, config.block_n), R + 2),
    )
    launch.run(reduce_kernel, config, *args, grid=grid, device=partials.device, **config.blocks)
    return sums, sums_z


def dora_norm(
    weight: Tensor | Packed4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """Return ‖W + scaling · (B ⊙ gate)·A‖ of each row, float32 [N]."""
    (R, K), N, target = lora_A.shape, lora_B.shape[0], launch.target(lora_A)
    codes = weight if isinstance(weight, Packed4bit) else None
    w = weight.packed if isinstance(weight, Packed4bit) else weight
    # B ⊙ gate would be rounded if B has 16 bits.
    wider = torch.float32 if rank_gate is not None else launch.promote_dtypes(lora_A, lora_B)
    config, k_per_split = configs.row_norm(target, N, K, wider.itemsize)
    partials = torch.empty(
        triton.cdiv(K, k_per_split), N, dtype=torch.float32, device=lora_A.device
    )
    gate, block_r = _contiguous(rank_gate), configs.block_of_ranks(R)
    wide = N * K >= 1 << 31 or any(map(launch.is_wide, (w, lora_A, lora_B)))
    meta = {
        "FORMAT": launch.format_4bit(codes, K, target),
        "TYPES": launch.build_types(target, wider, wide),
        **config.blocks,
        "BLOCK_R": block_r,
        "ONE_BLOCK": block_r >= R,
    }
    base = (
        Matrix.from_tensor(w) if codes is None else None,
        None if codes is None else Codes.from_weight(codes),
    )
    args = (
        *base,
        Matrix.from_tensor(lora_A),
        Matrix.from_tensor(lora_B),
        gate,
        partials,
        N,
        K,
        R,
        k_per_split,
        scaling,
    )
    grid = triton.cdiv(N, config.block_n), partials.shape[0]
    launch.run(row_norm_kernel, config, *args, grid=grid, device=w.device, **meta)
    return partials.sum(0).sqrt_()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
