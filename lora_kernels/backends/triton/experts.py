"""Rows sorted by expert: tensors to launches of the kernels in grouped_gemm.py.

Two passes in each direction: P or dS, and the GEMM that adds the update. The host never waits for
the offsets. No tensor of E·N·K elements is made.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...core.call import ExpertsGrads, ExpertsNeeds, ExpertsOperands, ExpertsSpec, Saved
from ...core.packed4bit import Packed4bit
from ..dropout import NO_DROPOUT, Dropout
from . import configs, launch
from .arguments import Codes, Mask, Matrix, Stack
from .grouped_gemm import grouped_linear_kernel, grouped_outer_kernel, grouped_shrink_kernel


@launch.replayed
def lora_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, rng = operands.x, operands.rng
    dropout = Dropout.from_rng(spec.dropout_p, rng)
    p = _shrink(x, operands.lora_A, operands.offsets, dropout)
    return _linear(x, p, operands, spec, NO_DROPOUT, is_forward=True), Saved(p)


@launch.replayed
def lora_experts_backward(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
) -> ExpertsGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, _, lora_A, lora_B, offsets, _, rng = operands
    dropout = Dropout.from_rng(spec.dropout_p, rng)
    dx = dA = dB = dbias = None
    if needs.lora_B:
        dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
    if needs.bias:
        dbias = dy.new_empty(lora_B.shape[:2], dtype=torch.float32)
    if needs.lora_B or needs.bias:
        grad = None if dB is None else dB.mT
        _outer(saved.p, dy, grad, offsets, NO_DROPOUT, spec.scaling, dbias)
    if needs.x or needs.lora_A:
        ds = _shrink(dy, lora_B.mT, offsets, NO_DROPOUT)
        if needs.x:
            dx = _linear(dy, ds, operands._replace(bias=None), spec, dropout, is_forward=False)
        if needs.lora_A:
            dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
            _outer(ds, x, dA, offsets, dropout, spec.scaling * dropout.scale)
    return ExpertsGrads(dx, dA, dB, dbias)


def _shrink(x: Tensor, a: Tensor, offsets: Tensor, dropout: Dropout) -> Tensor:
    """Return scale · mask(x)·a_eᵀ [M, R] for a [E, R, K], float32; zeros for rows of no expert."""
    (M, K), (E, R, _), target = x.shape, a.shape, launch.target(x)
    p = x.new_empty(M, R, dtype=torch.float32)
    if not R:
        return p
    dtype = launch.promote_dtypes(x, a)
    config, _ = configs.shrink(target, _rows_of_an_expert(M, E), K, R, dtype.itemsize)
    operands = Matrix.from_tensor(x), Stack.from_tensor(a), Mask.from_dropout(dropout)
    launch.run(
        grouped_shrink_kernel,
        config,
        *operands,
        offsets.contiguous(),
        p,
        M,
        K,
        R,
        E,
        dropout.scale,
        grid=(triton.cdiv(M, config.block_m) + E, triton.cdiv(R, config.block_r)),
        device=x.device,
        TYPES=launch.build_types(target, dtype, launch.is_wide(x) or launch.is_wide(a[0])),
        **config.blocks,
        BLOCK_E=configs.block_of_experts(E),
    )
    return p


def _linear(
    x: Tensor,
    p: Tensor,
    operands: ExpertsOperands,
    spec: ExpertsSpec,
    dropout: Dropout,
    is_forward: bool,
) -> Tensor:
    """Return y for x [M, K] and P, or dx for dy [M, N] and dS, whose update dropout masks."""
    weight, lora_A, lora_B, offsets, bias = operands[1:6]
    E, q = lora_A.shape[0], lora_B.mT if is_forward else lora_A
    (M, K), (_, R, N), target = x.shape, q.shape, launch.target(x)
    y = x.new_empty(M, N, dtype=spec.y_dtype if is_forward else operands.x.dtype)
    codes = weight if isinstance(weight, Packed4bit) else None
    w = None
    if isinstance(weight, Tensor):
        w = weight if is_forward else weight.mT
    # The 4-bit weight's own rows run along the inner dimension, or along the columns of y.
    is_inner = codes is None or is_forward != spec.transposed
    format_4bit = launch.format_4bit(codes, K if is_inner else N, target)
    multiplied = max(x.dtype.itemsize, spec.dtype.itemsize)
    dtype = launch.promote_dtypes(x, q)
    config = configs.linear(
        target,
        _rows_of_an_expert(M, E),
        multiplied,
        codes is not None,
        rank=0,
        in_registers=dropout.rng is not None or dtype.itemsize > multiplied,
        scattered=codes is not None and not format_4bit.WORDS,
    )
    wide = any(launch.is_wide(t) for t in (x, y, q[0], *(() if w is None else (w[0],))))
    wide = wide or (codes is not None and E * N * K >= 1 << 31)
    tiles_m = triton.cdiv(M, config.block_m) + E
    launch.run(
        grouped_linear_kernel,
        config,
        Matrix.from_tensor(x),
        None if w is None else Stack.from_tensor(w),
        None if codes is None else Codes.from_weight(codes),
        Stack.from_tensor(q),
        p,
        None if bias is None else bias.contiguous(),
        Mask.from_dropout(dropout),
        offsets.contiguous(),
        y,
        M,
        N,
        K,
        R,
        E,
        spec.scaling * dropout.scale,
        grid=(tiles_m * triton.cdiv(N, config.block_n),),
        device=x.device,
        K_INNER=is_inner,
        LEFT=codes is not None and is_inner and config.block_m < 64,
        FORMAT=format_4bit,
        TYPES=launch.build_types(target, dtype, wide, spec.dtype),
        **config.blocks,
        BLOCK_R=configs.block_of_update(R, dtype.itemsize),
        BLOCK_E=configs.block_of_experts(E),
        GROUP_M=config.group_m,
    )
    return y


def _outer(
    s: Tensor,
    v: Tensor,
    grad: Tensor | None,
    offsets: Tensor,
    dropout: Dropout,
    scale: float,
    sums: Tensor | None = None,
) -> None:
    """Write grad [E, R, N] = scale · sᵀ·mask(v) and sums [E, N] = Σ v over each expert's rows."""
    (M, N), R, E, target = v.shape, s.shape[1], offsets.shape[0], launch.target(v)
    dtype = torch.float32 if grad is None else launch.promote_dtypes(v, grad)
    config, _ = configs.outer(target, _rows_of_an_expert(M, E), N, max(1, R), dtype.itemsize)
    ranks = 1 if grad is None else triton.cdiv(R, config.block_r)
    launch.run(
        grouped_outer_kernel,
        config,
        s,
        Matrix.from_tensor(v),
        Mask.from_dropout(dropout),
        offsets.contiguous(),
        None if grad is None else Stack.from_tensor(grad),
        sums,
        M,
        N,
        R,
        E,
        scale,
        grid=(triton.cdiv(N, config.block_n), ranks, E),
        device=v.device,
        TYPES=launch.build_types(target, dtype, launch.is_wide(v)),
        **config.blocks,
    )


def _rows_of_an_expert(rows: int, experts: int) -> int:
    """Return the mean number of rows of an expert, at least 1, by which tiles are chosen."""
    return max(1, rows // experts)
