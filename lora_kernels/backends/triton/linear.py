"""The functions that `ops` calls, which launch kernels on tensors."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.codes import Codes
from ..launches import Plan, contiguous, sum_products
from . import configs, launch
from .gemm import fused_kernel
from .gradients import outer_kernel, reduce_kernel
from .launch import matrix_arguments
from .shrink import shrink_kernel


@launch.planned
def lora_linear(plan: Plan, operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    y, p, z = _linear(plan, operands, spec)
    return y, Saved(p, z)


@launch.planned
def lora_linear_backward(
    plan: Plan,
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    strategy: str,
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    x, _, lora_A, lora_B, rank_gate, column_scale, *_ = operands
    p, z, scaling = saved.p, saved.z if needs.column_scale else None, spec.scaling
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias, *_ = needs
    dx = dA = dB = dg = ds = dbias = dc = None
    if need_B or need_column_scale or need_bias:
        if need_B:
            dB = plan.empty(*lora_B.shape, dtype=lora_B.dtype)
        dbias, dc = _outer(
            plan,
            p,
            dy,
            None if dB is None else dB.t(),
            scaling,
            rank_gate,
            column_scale,
            z,
            need_bias,
        )
    if need_x:
        dx, ds, _ = _linear(plan, operands, spec, dy)
    elif need_A or need_gate:
        partials = _shrink(plan, dy, lora_B.t(), column_scale)
        ds = _sum(plan, partials)
    if need_A:
        assert ds is not None
        dA = plan.empty(*lora_A.shape, dtype=lora_A.dtype)
        _outer(plan, ds, x, dA, scaling, rank_gate)
    if need_gate:
        assert ds is not None
        dg = plan.empty(p.shape[1])
        plan.call(sum_products, dg, ds, p, scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


@launch.planned
def shrink_to(plan: Plan, x: Tensor, a: Tensor, scale: float, out: Tensor) -> None:
    """Write scale·x·aᵀ to out [M, R], rounded once, for x [M, K] and a [R, K]."""
    if x.shape[0]:
        plan.call(_scale_to, out, _sum(plan, _shrink(plan, x, a, None)), scale)


@launch.planned
def outer_to(plan: Plan, v: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """Write scale·sᵀ·v to out [R, N], rounded once, for v [M, N] and s [M, R]."""
    rows = s if s.is_contiguous() else plan.copy(s)
    _outer(plan, rows, v, out, scale, None)


def _linear(
    plan: Plan, operands: Operands, spec: Spec, dy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, P, and z or None. For a dy return dx and dS in place of y and P.

    The kernel computes y [M, N] and P [M, R] from x [M, K], a [R, K] and q [R, N]. In the backward
    its x is dy: the weight's rows, which are y's columns in the forward, are the inner dimension.
    """
    x, weight, lora_A, lora_B, gate, column_scale, bias, *_ = operands
    is_forward = dy is None
    in_scale, out_scale = (None, column_scale) if is_forward else (column_scale, None)
    a, q, y_dtype = lora_A, lora_B.t(), spec.y_dtype
    if dy is not None:
        a, q, y_dtype = lora_B.t(), lora_A, x.dtype
        x, bias = dy, None
    (M, K), (R, N), target = x.shape, q.shape, launch.target(plan.device)
    y = plan.empty(M, N, dtype=y_dtype)
    z = plan.empty(M, N, dtype=y_dtype) if spec.save_z and is_forward else None
    p = plan.empty(M, R)
    if not M:
        return y, p, z
    codes = weight if isinstance(weight, Codes) else None
    w = weight if isinstance(weight, Tensor) else None
    if w is not None and is_forward:
        w = w.t()
    # A row of a 4-bit weight runs along K in the forward, and along dx's columns in the backward.
    codes_4bit = launch.codes_arguments(codes, K if is_forward else N, target)
    wider = launch.promote_dtypes(x, a)
    multiplied = max(x.dtype.itemsize, spec.dtype.itemsize)
    config = configs.linear(
        target,
        M,
        max(multiplied, wider.itemsize),
        codes is not None,
        R,
        in_registers=in_scale is not None or wider.itemsize > multiplied,
        scattered=codes is not None and not codes_4bit["WORDS"],
    )
    wide = any(launch.is_wide(t) for t in (x, y, a, q, w) if t is not None)
    wide = wide or (codes is not None and N * K >= 1 << 31)
    arguments: dict[str, Any] = {
        **matrix_arguments("x", x, "mk"),
        **matrix_arguments("w", w, "kn"),
        **codes_4bit,
        **matrix_arguments("a", a, "rk"),
        **matrix_arguments("q", q, "rn"),
        "p_ptr": p,
        "gate_ptr": contiguous(plan, gate),
        "in_scale_ptr": contiguous(plan, in_scale),
        "out_scale_ptr": contiguous(plan, out_scale),
        "bias_ptr": contiguous(plan, bias),
        "y_ptr": y,
        "z_ptr": z,
        **{"M": M, "N": N, "K": K, "R": R, "s_scale": spec.scaling},
        "K_INNER": is_forward,
        "LEFT": codes is not None and is_forward and config.block_m < 64,
        **launch.dtype_arguments(target, wider, wide, spec.dtype),
        **config.blocks,
        "BLOCK_R": configs.block_of_ranks(R),
        "GROUP_M": config.group_m,
    }
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),)
    launch.run(fused_kernel, config, plan, grid=grid, device=plan.device, **arguments)
    return y, p, z


def _shrink(plan: Plan, x: Tensor, a: Tensor, in_scale: Tensor | None) -> Tensor:
    """Return the partial sums of (x ⊙ in_scale)·aᵀ, float32 [num_splits, M, R]."""
    (M, K), R, target = x.shape, a.shape[0], launch.target(plan.device)
    wider = launch.promote_dtypes(x, a)
    config, k_per_split = configs.shrink(target, M, K, R, wider.itemsize)
    num_splits = triton.cdiv(K, k_per_split)
    partials = plan.empty(num_splits, M, R)
    if not M:
        return partials
    launch.run(
        shrink_kernel,
        config,
        plan,
        grid=(triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r), num_splits),
        device=plan.device,
        **matrix_arguments("x", x, "mk"),
        **matrix_arguments("a", a, "rk"),
        in_scale_ptr=contiguous(plan, in_scale),
        partials_ptr=partials,
        **{"M": M, "K": K, "R": R, "k_per_split": k_per_split},
        **launch.dtype_arguments(target, wider, launch.is_wide(x) or launch.is_wide(a)),
        **config.blocks,
    )
    return partials


def _outer(
    plan: Plan,
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
    (M, N), R, target = v.shape, s.shape[1], launch.target(plan.device)
    if not M:
        sums, sums_z = (plan.empty(N) if needed else None for needed in (need_sum, z is not None))
        for out in (sums, sums_z, grad):
            if out is not None:
                plan.call(Tensor.zero_, out)
        return sums, sums_z
    wider = torch.float32 if grad is None else launch.promote_dtypes(v, grad)
    config, m_per_split = configs.outer(target, M, N, R, wider.itemsize)
    num_splits = triton.cdiv(M, m_per_split)
    partials = plan.empty(num_splits, R + 2, N)
    ranks = triton.cdiv(R, config.block_r) if grad is not None else 1
    launch.run(
        outer_kernel,
        config,
        plan,
        grid=(triton.cdiv(N, config.block_n), ranks, num_splits),
        device=plan.device,
        **matrix_arguments("v", v, "mn"),
        s_ptr=s,
        v_scale_ptr=contiguous(plan, v_scale),
        z_ptr=z,
        partials_ptr=partials,
        **{"M": M, "N": N, "R": R, "m_per_split": m_per_split},
        RANKS=grad is not None,
        SUM=need_sum,
        **launch.dtype_arguments(target, wider, launch.is_wide(v)),
        **config.blocks,
    )
    return _reduce(plan, partials, scale, gate, grad, need_sum, z is not None)


def _reduce(
    plan: Plan,
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
    sums, sums_z = (plan.empty(N) if needed else None for needed in (need_sum, need_sum_z))
    launch.run(
        reduce_kernel,
        config,
        plan,
        grid=(triton.cdiv(N, config.block_n), triton.cdiv(needed_rows, config.block_r)),
        device=plan.device,
        **matrix_arguments("grad", grad, "rn"),
        partials_ptr=partials,
        gate_ptr=contiguous(plan, gate),
        sum_ptr=sums,
        sum_z_ptr=sums_z,
        **{"N": N, "R": rows - 2, "num_splits": num_splits, "scale": scale},
        **config.blocks,
    )
    return sums, sums_z


def _sum(plan: Plan, partials: Tensor) -> Tensor:
    """Return Σ partials; a view if there is one partial sum."""
    if partials.shape[0] == 1:
        return partials[0]
    out = plan.empty(*partials.shape[1:])
    plan.call(_sum_to, out, partials)
    return out


def _sum_to(out: Tensor, partials: Tensor) -> None:
    torch.sum(partials, 0, out=out)


def _scale_to(out: Tensor, t: Tensor, scale: float) -> None:
    torch.mul(t, scale, out=out)
