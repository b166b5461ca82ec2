"""Helpers of the autograd Functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

_Backward = Callable[..., tuple[Tensor | None, ...]]


class _Gradients(torch.autograd.Function):
    """The results of a backward, with a graph to all inputs that raises if differentiated.

    `once_differentiable` connects the results to dy alone. If dy needs no gradient, dx would be a
    constant, and a gradient penalty would silently lack terms.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "lora_kernels: trying to differentiate twice; its layers and functions are "
            "differentiable once. Take the plain PyTorch expression, or "
            "lora_kernels.peft.unfuse(model), for a second derivative"
        )


def differentiable_once(
    backward: _Backward, inputs: Callable[[Any], Iterable[Tensor | None]] = lambda ctx: ()
) -> _Backward:
    """Return `backward(ctx, saved, *dy)` as a Function's backward that raises if differentiated.

    inputs: returns what the backward reads of ctx beside the saved tensors.

    `_Gradients` runs only if gradients are enabled in the backward, because it takes as long as a
    kernel of a small layer.
    """

    def call(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *dy)
        with torch.no_grad():  # copies, because `blocks` overwrites what it is given
            grads = backward(ctx, saved, *(None if t is None else t.clone() for t in dy))
        connected: Any = _Gradients.apply(len(grads), *grads, *dy, *saved, *inputs(ctx))
        return cast(tuple[Tensor | None, ...], connected)

    return call


def new_unsaved(dy: Tensor, size: int, dtype: torch.dtype, flat: bool = False) -> Tensor:
    """Return uninitialized memory of the shape and dtype of an x, or a P if `flat`, not saved.

    No gradient reads its values. It is allocated in the backward and freed with it; a saved tensor
    occupies memory from the forward on.
    """
    shape = (dy.numel() // dy.shape[-1],) if flat else dy.shape[:-1]
    return dy.new_empty(*shape, size, dtype=dtype)
