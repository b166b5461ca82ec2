"""Launch the kernels of a gated MLP, and that of a head's loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ...core.device import DeviceInfo
from ..launches import Plan
from . import configs, launch
from .gated import (
    gated_backward_kernel,
    gated_gradients_kernel,
    gated_kernel,
    gated_update_backward_kernel,
    gated_update_kernel,
)
from .softmax import cross_entropy_kernel

# `gated.activate`'s names.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return h = act(g) ⊙ u for contiguous g and u of one shape and dtype."""
    return _gated(g, u, activation) if g.numel() else torch.empty_like(g)


def gated_backward(
    g: Tensor, u: Tensor, dh: Tensor, dg: Tensor, du: Tensor, h: Tensor, activation: str
) -> None:
    """Write dg, du and h, which may be g, u and dh; all contiguous, of one shape and dtype."""
    if g.numel():
        _gated_backward(g, u, dh, dg, du, h, activation)


@launch.planned
def _gated(plan: Plan, g: Tensor, u: Tensor, activation: str) -> Tensor:
    h = plan.empty(*g.shape, dtype=g.dtype)
    _run(plan, gated_kernel, activation, g_ptr=g, u_ptr=u, h_ptr=h)
    return h


@launch.planned
def _gated_backward(
    plan: Plan, g: Tensor, u: Tensor, dh: Tensor, dg: Tensor, du: Tensor, h: Tensor, activation: str
) -> None:
    tensors = {"g_ptr": g, "u_ptr": u, "dh_ptr": dh, "dg_ptr": dg, "du_ptr": du, "h_ptr": h}
    _run(plan, gated_backward_kernel, activation, **tensors)


def _run(plan: Plan, kernel: object, activation: str, **tensors: Tensor) -> None:
    config, n = configs.elementwise(launch.target(plan.device)), tensors["g_ptr"].numel()
    launch.run(
        kernel,
        config,
        plan,
        grid=(triton.cdiv(n, config.block_n),),
        device=plan.device,
        **tensors,
        n=n,
        ACTIVATION=ACTIVATIONS[activation],
        WIDE=n >= 1 << 31,
        **config.blocks,
    )


@launch.planned
def gated_update(
    plan: Plan,
    g: Tensor,
    u: Tensor,
    s_gate: Tensor,
    s_up: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
) -> Tensor:
    """Return h [M, N]; see `gated_update_kernel`. M and N are not 0."""
    (M, N), target = g.shape, launch.target(plan.device)
    rank = max(b_gate.shape[1], b_up.shape[1])
    config = configs.gated_update(target, M, g.dtype.itemsize, rank)
    h = plan.empty(M, N, dtype=g.dtype)
    launch.run(
        gated_update_kernel,
        config,
        plan,
        grid=(triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)),
        device=plan.device,
        **{"g_ptr": g, "u_ptr": u, "h_ptr": h},
        **_updates(s_gate, s_up, b_gate, b_up, scale_gate, scale_up),
        **{"M": M, "N": N},
        **_constants(target, M * N, b_gate, b_up, activation),
        **config.blocks,
    )
    return h


@launch.planned
def gated_update_backward(
    plan: Plan,
    g: Tensor,
    u: Tensor,
    dh: Tensor,
    s_gate: Tensor,
    s_up: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    ds: Tensor,
    a: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
    dg: Tensor,
    du: Tensor,
    h: Tensor | None,
    partials: Tensor | None,
) -> None:
    """Write dg and du [M, N], and h [M, N] or partial sums of three gradients, if given.

    See `gated_update_backward_kernel`; all contiguous. M and N are not 0.
    """
    (M, N), target = g.shape, launch.target(plan.device)
    ranks = a.shape[0], b_gate.shape[1], b_up.shape[1]
    config, rows, _ = configs.gated_update_backward(target, M, N, g.dtype.itemsize, max(ranks))
    launch.run(
        gated_update_backward_kernel,
        config,
        plan,
        grid=(triton.cdiv(N, config.block_n), triton.cdiv(M, rows)),
        device=plan.device,
        **{"g_ptr": g, "u_ptr": u, "dh_ptr": dh, "dg_ptr": dg, "du_ptr": du, "h_ptr": h},
        **_updates(s_gate, s_up, b_gate, b_up, scale_gate, scale_up),
        **{"ds_ptr": ds, "a_ptr": a, "partials_ptr": partials},
        **{"M": M, "N": N, "m_per_split": rows, "RANK_DOWN": ranks[0]},
        **_constants(target, M * N, b_gate, b_up, activation),
        **config.blocks,
    )


@launch.planned
def gated_gradients(
    plan: Plan, partials: Tensor, dA: Tensor, dB_gate: Tensor, dB_up: Tensor
) -> None:
    """Write dA [R, N], dB_gate and dB_up [N, R], contiguous, from partials [num_splits, ΣR, N]."""
    (splits, _, N), ranks = partials.shape, (dA.shape[0], dB_gate.shape[1], dB_up.shape[1])
    config = replace(configs.REDUCE, block_r=configs.block_of_ranks(max(ranks)))
    launch.run(
        gated_gradients_kernel,
        config,
        plan,
        grid=(triton.cdiv(N, config.block_n), 3),
        device=plan.device,
        **{"partials_ptr": partials, "dA_ptr": dA, "dB_gate_ptr": dB_gate, "dB_up_ptr": dB_up},
        **{"N": N, "num_splits": splits},
        **{"RANK_DOWN": ranks[0], "RANK_GATE": ranks[1], "RANK_UP": ranks[2]},
        **config.blocks,
    )


def _updates(
    s_gate: Tensor, s_up: Tensor, b_gate: Tensor, b_up: Tensor, scale_gate: float, scale_up: float
) -> dict[str, Any]:
    return {
        **{"s_gate_ptr": s_gate, "stride_s_gate": s_gate.stride(0)},
        **{"b_gate_ptr": b_gate, "scale_gate": scale_gate},
        **{"s_up_ptr": s_up, "stride_s_up": s_up.stride(0)},
        **{"b_up_ptr": b_up, "scale_up": scale_up},
    }


def _constants(
    target: DeviceInfo, elements: int, b_gate: Tensor, b_up: Tensor, activation: str
) -> dict[str, Any]:
    return {
        **{"RANK_GATE": b_gate.shape[1], "RANK_UP": b_up.shape[1]},
        **{"ACTIVATION": ACTIVATIONS[activation], "PRECISION": configs.precision(target)},
        "WIDE": elements >= 1 << 31,
    }


def cross_entropy(
    y: Tensor,
    labels: Tensor,
    scale: float,
    cap: float,
    weight: float,
    smoothing: float,
    has_gradient: bool,
) -> Tensor:
    """Return the loss of each row in float32, and write its gradient into y.

    Args:
        y: [rows, columns], contiguous; left as it is without has_gradient.
        labels: [rows], int64, 0 to columns - 1.
        scale, cap: z is scale·y, or cap·tanh(scale·y) if cap is not 0.
        weight: of the gradient.
        smoothing: label smoothing.
    """
    rows, columns = y.shape
    loss = torch.empty(rows, dtype=torch.float32, device=y.device)
    if not rows:
        return loss
    config = configs.softmax(launch.target(y.device), columns)
    launch.run(
        cross_entropy_kernel,
        config,
        grid=(rows,),
        device=y.device,
        y_ptr=y,
        labels_ptr=labels,
        loss_ptr=loss,
        columns=columns,
        scale=scale,
        cap=cap,
        weight=weight,
        smoothing=smoothing,
        HAS_CAP=bool(cap),
        HAS_SMOOTHING=bool(smoothing),
        HAS_GRADIENT=has_gradient,
        WIDE=rows * columns >= 1 << 31,
        **config.blocks,
    )
    return loss
