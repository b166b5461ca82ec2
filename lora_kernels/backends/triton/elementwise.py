"""Launch the elementwise kernels of a gated MLP, and that of a head's loss."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configs, launch
from .gated import gated_backward_kernel, gated_kernel
from .softmax import cross_entropy_kernel

# `gated.activate`'s names.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def gated(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """Return h = act(g) ⊙ u for contiguous g and u of one shape and dtype."""
    h = torch.empty_like(g)
    _run(gated_kernel, activation, g_ptr=g, u_ptr=u, h_ptr=h)
    return h


def gated_backward(
    g: Tensor, u: Tensor, dh: Tensor, dg: Tensor, du: Tensor, h: Tensor, activation: str
) -> None:
    """Write dg, du and h, which may be g, u and dh; all contiguous, of one shape and dtype."""
    tensors = {"g_ptr": g, "u_ptr": u, "dh_ptr": dh, "dg_ptr": dg, "du_ptr": du, "h_ptr": h}
    _run(gated_backward_kernel, activation, **tensors)


def _run(kernel: object, activation: str, **tensors: Tensor) -> None:
    g = tensors["g_ptr"]
    config, n = configs.elementwise(launch.target(g.device)), g.numel()
    if not n:
        return
    launch.run(
        kernel,
        config,
        grid=(triton.cdiv(n, config.block_n),),
        device=g.device,
        **tensors,
        n=n,
        ACTIVATION=ACTIVATIONS[activation],
        WIDE=n >= 1 << 31,
        **config.blocks,
    )


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
