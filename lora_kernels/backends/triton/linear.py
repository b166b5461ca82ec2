"""The functions that `ops` calls, which launch kernels on tensors."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.packed4bit import Packed4bit
from . import FUSED, configs, launch
from .configs import OuterTiles
from .gemm import fused_kernel, two_pass_kernel
from .gradients import outer_kernel, reduce_kernel, shrink_outer_kernel
from .launch import matrix_arguments
from .shrink import shrink_kernel


@launch.replayed
def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, *_ = operands
    y, p, z = _linear(
        x,
        weight,
        lora_A,
        lora_B.t(),
        spec,
        strategy,
        y_dtype=spec.y_dtype,
        is_forward=True,
        gate=rank_gate,
        out_scale=column_scale,
        bias=bias,
        save_z=spec.save_z,
    )
    return y, Saved(p, z)


@launch.replayed
def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, *_ = operands
    p, z, scaling = saved.p, saved.z if needs.column_scale else None, spec.scaling
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias, *_ = needs
    (M, N), R = dy.shape, p.shape[1]
    dx = dA = dB = dg = ds = partials = dbias = dc = None
    once = None  # tiles of a kernel that computes dS and dB in one read of dY
    if need_B and (need_A or need_gate or need_x) and not (need_x and strategy == FUSED):
        once = configs.shrink_outer(
            launch.target(dy), M, N, R, max(dy.dtype.itemsize, lora_B.dtype.itemsize)
        )
    if once is not None:
        partials, dB, dbias, dc = _shrink_outer(
            once, p, dy, lora_B, column_scale, z, scaling, rank_gate, need_bias
        )
    elif need_B or need_column_scale or need_bias:
        if need_B:
            dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        dbias, dc = _outer(
            p, dy, None if dB is None else dB.t(), scaling, rank_gate, column_scale, z, need_bias
        )
    if need_x:
        dx, ds, _ = _linear(
            dy,
            weight,
            lora_B.t(),
            lora_A,
            spec,
            strategy,
            y_dtype=x.dtype,
            is_forward=False,
            gate=rank_gate,
            in_scale=column_scale,
            partials=partials,
        )
    elif need_A or need_gate:
        if partials is None:
            partials = _shrink(dy, lora_B.t(), column_scale)
        ds = partials[0] if partials.shape[0] == 1 else partials.sum(0)
    if need_A:
        assert ds is not None
        dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _outer(ds, x, dA, scaling, rank_gate)
    if need_gate:
        assert ds is not None
        dg = (ds * p).sum(0).mul_(scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


def _linear(
    x: Tensor,
    weight: Tensor | Packed4bit | None,
    a: Tensor,
    q: Tensor,
    spec: Spec,
    strategy: str,
    *,
    y_dtype: torch.dtype,
    is_forward: bool,
    gate: Tensor | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    save_z: bool = False,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute y [M, columns], P [M, R], and z or None; see linear.py.

    Args:
        x: [M, inner].
        weight: its rows are columns of y in the forward, and the inner dimension in the backward.
        a, q: [R, inner] and [R, columns].
        save_z: whether to return y before out_scale and bias.
        partials: the partial sums [num_splits, M, R] of P if they were computed before, or None.
    """
    (M, K), (R, N), target = x.shape, q.shape, launch.target(x)
    y = x.new_empty(M, N, dtype=y_dtype)
    z = torch.empty_like(y) if save_z else None
    if not M:
        return y, x.new_empty(M, R, dtype=torch.float32), z
    codes = weight if isinstance(weight, Packed4bit) else None
    w = weight if isinstance(weight, Tensor) else None
    if w is not None and is_forward:
        w = w.t()
    # A row of a 4-bit weight runs along K in the forward, and along dx's columns in the backward.
    codes_4bit = launch.codes_arguments(codes, K if is_forward else N, target)
    wider = launch.promote_dtypes(x, a)
    multiplied, is_fused = max(x.dtype.itemsize, spec.dtype.itemsize), strategy == FUSED
    config = configs.UPDATE
    if is_fused or weight is not None:
        config = configs.linear(
            target,
            M,
            max(multiplied, wider.itemsize) if is_fused else multiplied,
            codes is not None,
            R if is_fused else 0,
            in_registers=in_scale is not None or wider.itemsize > multiplied,
            scattered=codes is not None and not codes_4bit["WORDS"],
        )
    if is_fused:
        partials = x.new_empty(1, M, R, dtype=torch.float32)
    elif partials is None:
        partials = _shrink(x, a, in_scale)
    p = partials[0] if partials.shape[0] == 1 else x.new_empty(M, R, dtype=torch.float32)
    wide = any(launch.is_wide(t) for t in (x, y, a, q, w) if t is not None)
    wide = wide or (codes is not None and N * K >= 1 << 31)
    arguments: dict[str, Any] = {
        **matrix_arguments("x", x, "mk"),
        **matrix_arguments("w", w, "kn"),
        **codes_4bit,
        **matrix_arguments("q", q, "rn"),
        "p_ptr": p,
        "gate_ptr": _contiguous(gate),
        "in_scale_ptr": _contiguous(in_scale),
        "out_scale_ptr": _contiguous(out_scale),
        "bias_ptr": _contiguous(bias),
        "y_ptr": y,
        "z_ptr": z,
        **{"M": M, "N": N, "K": K, "R": R, "s_scale": spec.scaling},
        "K_INNER": is_forward,
        "LEFT": codes is not None and is_forward and config.block_m < 64,
        **launch.dtype_arguments(target, wider, wide, spec.dtype),
        **config.blocks,
        "GROUP_M": config.group_m,
    }
    if is_fused:
        kernel = fused_kernel
        arguments |= matrix_arguments("a", a, "rk")
        arguments["BLOCK_R"] = configs.block_of_ranks(R)
    else:
        kernel = two_pass_kernel
        arguments |= {"partials_ptr": partials, "num_splits": partials.shape[0]}
        arguments["BLOCK_R"] = configs.block_of_update(R, wider.itemsize)
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
    launch.run(kernel, config, grid=grid, device=x.device, **arguments)
    return y, p, z


def _shrink(x: Tensor, a: Tensor, in_scale: Tensor | None) -> Tensor:
    """Return the partial sums of (x ⊙ in_scale)·aᵀ, float32 [num_splits, M, R]."""
    (M, K), R, target = x.shape, a.shape[0], launch.target(x)
    wider = launch.promote_dtypes(x, a)
    config, k_per_split = configs.shrink(target, M, K, R, wider.itemsize)
    num_splits = triton.cdiv(K, k_per_split)
    partials = x.new_empty(num_splits, M, R, dtype=torch.float32)
    if not M:
        return partials
    launch.run(
        shrink_kernel,
        config,
        grid=(triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r), num_splits),
        device=x.device,
        **matrix_arguments("x", x, "mk"),
        **matrix_arguments("a", a, "rk"),
        in_scale_ptr=_contiguous(in_scale),
        partials_ptr=partials,
        **{"M": M, "K": K, "R": R, "k_per_split": k_per_split},
        **launch.dtype_arguments(target, wider, launch.is_wide(x) or launch.is_wide(a)),
        **config.blocks,
    )
    return partials


def _outer(
    s: Tensor,
    v: Tensor,
    grad: Tensor | None,
    scale: float,
    gate: Tensor | None,
    v_scale: Tensor | None = None,
    z: Tensor | None = None,
    need_sum: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Write grad [R, N] = scale · gate ⊙ sᵀ·(v ⊙ v_scale); return Σ v and, given z, Σ v ⊙ z.

    The sums are float32 [N], or None.
    """
    (M, N), R, target = v.shape, s.shape[1], launch.target(v)
    if not M:
        sums, sums_z = (
            v.new_zeros(N, dtype=torch.float32) if needed else None
            for needed in (need_sum, z is not None)
        )
        if grad is not None:
            grad.zero_()
        return sums, sums_z
    wider = torch.float32 if grad is None else launch.promote_dtypes(v, grad)
    config, m_per_split = configs.outer(target, M, N, R, wider.itemsize)
    num_splits = triton.cdiv(M, m_per_split)
    partials = v.new_empty(num_splits, R + 2, N, dtype=torch.float32)
    ranks = triton.cdiv(R, config.block_r) if grad is not None else 1
    launch.run(
        outer_kernel,
        config,
        grid=(triton.cdiv(N, config.block_n), ranks, num_splits),
        device=v.device,
        **matrix_arguments("v", v, "mn"),
        s_ptr=s,
        v_scale_ptr=_contiguous(v_scale),
        z_ptr=z,
        partials_ptr=partials,
        **{"M": M, "N": N, "R": R, "m_per_split": m_per_split},
        RANKS=grad is not None,
        SUM=need_sum,
        **launch.dtype_arguments(target, wider, launch.is_wide(v)),
        **config.blocks,
    )
    return _reduce(partials, scale, gate, grad, need_sum, z is not None)


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
    config, n_per_split = plan
    grad = torch.empty_like(b, memory_format=torch.contiguous_format)
    (M, N), R, target = v.shape, s.shape[1], launch.target(v)
    partials = v.new_empty(triton.cdiv(N, n_per_split), M, R, dtype=torch.float32)
    grad_partials = v.new_empty(triton.cdiv(M, config.block_m), R + 2, N, dtype=torch.float32)
    launch.run(
        shrink_outer_kernel,
        config,
        grid=(grad_partials.shape[0], partials.shape[0]),
        device=v.device,
        **matrix_arguments("v", v, "mn"),
        **matrix_arguments("b", b, "nr"),
        s_ptr=s,
        v_scale_ptr=_contiguous(v_scale),
        z_ptr=z,
        p_partials_ptr=partials,
        grad_partials_ptr=grad_partials,
        **{"M": M, "N": N, "R": R, "n_per_split": n_per_split},
        SUM=need_sum,
        **launch.dtype_arguments(target, launch.promote_dtypes(v, b), launch.is_wide(v)),
        **config.blocks,
    )
    sums = _reduce(grad_partials, scale, gate, grad.t(), need_sum, z is not None)
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
    (num_splits, rows, N), config = partials.shape, configs.REDUCE
    needed_rows = rows if need_sum_z else rows - 1 if need_sum else rows - 2
    sums, sums_z = (partials.new_empty(N) if needed else None for needed in (need_sum, need_sum_z))
    launch.run(
        reduce_kernel,
        config,
        grid=(triton.cdiv(N, config.block_n), triton.cdiv(needed_rows, config.block_r)),
        device=partials.device,
        **matrix_arguments("grad", grad, "rn"),
        partials_ptr=partials,
        gate_ptr=_contiguous(gate),
        sum_ptr=sums,
        sum_z_ptr=sums_z,
        **{"N": N, "R": rows - 2, "num_splits": num_splits, "scale": scale},
        **config.blocks,
    )
    return sums, sums_z


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
