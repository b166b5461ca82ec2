"""Thin autograd Functions: they call ops and hold no mathematics of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import ops
from .backends import forced
from .backends.forced import Forced
from .core.call import (
    Grads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from .core.packed4bit import Packed4bit
from .core.problem import Choice

_NOTHING = contextlib.nullcontext()
_Backward = Callable[..., tuple[Tensor | None, ...]]


class _Gradients(torch.autograd.Function):
    """A backward's results, tied to all that they were made of, so that a second derivative raises.

    `once_differentiable` ties them to dy alone: `autograd.grad` then finds no way to x, and a dx
    of a dy that needs no gradient is a constant, which leaves terms out of a penalty in silence.
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


def _once(backward: _Backward) -> _Backward:
    """Gives backward(ctx, saved, dy) the saved tensors, and where it is itself recorded guards its
    results; that costs as much as a kernel of a small layer."""

    def call(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        if not torch.is_grad_enabled():
            return backward(ctx, saved, dy)
        with torch.no_grad():
            grads = backward(ctx, saved, dy)
        return cast(tuple[Tensor | None, ...], _Gradients.apply(len(grads), *grads, dy, *saved))

    return call


def _again(choice: Choice | None, strategy: bool = True) -> AbstractContextManager[None]:
    """For what a backward cannot hand a forward's choice over to: whatever is in force by now or in
    this thread, both directions take one."""
    if choice is None:
        return _NOTHING
    return forced.again(Forced(choice.backend, choice.strategy if strategy else None))


class Options(NamedTuple):
    """What `LoRALinearFunction` takes beside tensors, in one argument: a Function's call costs
    time for each.

    Args:
        spec: of the call.
        recompute: whether the backward computes P again in place of a saved P.
        blocksizes: the fields of `Packed4bit` that are no tensors; () for a dense weight.
    """

    spec: Spec
    recompute: bool
    blocksizes: tuple[Any, ...]


class MultiOptions(NamedTuple):
    """What `MultiLoRALinearFunction` takes beside tensors; see `Options`."""

    spec: MultiSpec
    blocksizes: tuple[Any, ...]


class LoRALinearFunction(torch.autograd.Function):
    """`ops.lora_linear` with `ops.lora_linear_backward`.

    `codes` are the tensors of a 4-bit weight. Saved for the backward: the operands, P [M, R]
    unless `Options.recompute`, and z [M, N] if the column scale needs a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        rank_gate: Tensor | None,
        column_scale: Tensor | None,
        bias: Tensor | None,
        rng: Tensor | None,
        options: Options,
        *codes: Any,
    ) -> Tensor:
        base = Packed4bit(*codes, *options.blocksizes) if codes else weight
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, bias, rng)
        spec = options.spec
        if column_scale is not None and ctx.needs_input_grad[5]:
            spec = spec._replace(save_z=True)
        ctx.choice = None
        if ops.plain(x, codes[0] if codes else weight, lora_A, lora_B):
            ctx.choice = ops.choose(operands, spec)
            y, saved = ops.lora_linear_direct(operands, spec, ctx.choice)
        else:
            y, saved = ops.lora_linear_dispatched(operands, spec)
        ctx.save_for_backward(
            x, weight, lora_A, lora_B, rank_gate, column_scale,
            rng if saved.mask is None else saved.mask, None if options.recompute else saved.p,
            saved.z, *codes,
        )  # fmt: skip
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, rank_gate, column_scale, rng, p, z, *codes = tensors
        spec, _, blocksizes = ctx.options
        need = ctx.needs_input_grad
        needs = Needs(need[0], *need[2:7])
        base = Packed4bit(*codes, *blocksizes) if codes else weight
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, None, rng)
        if p is None:
            with _again(ctx.choice, strategy=False):  # of a layer with one column
                p = ops.down_projection(x, lora_A, spec.dropout_p, rng, spec.dtype)
        saved, held = Saved(p, z), codes[0] if codes else weight
        direct = ctx.choice is not None and ops.plain(dy, x, held, lora_A, lora_B)
        if direct and not ops.batched(dy):
            grads = ops.lora_linear_backward_direct(dy, operands, saved, spec, needs, ctx.choice)
        else:
            with _again(ctx.choice):
                grads = ops.lora_linear_backward_dispatched(dy, operands, saved, spec, needs)
        return _in_dtypes(ctx, grads, operands, len(codes))


def _in_dtypes(ctx: Any, grads: Grads, operands: Operands, codes: int) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments, each in its tensor's dtype."""
    gate, scale, bias = grads[3:]
    if gate is not None and operands.rank_gate is not None:
        gate = gate.to(operands.rank_gate.dtype)
    if scale is not None and operands.column_scale is not None:
        scale = scale.to(operands.column_scale.dtype)
    if bias is not None:
        bias = bias.to(ctx.bias_dtype)
    return grads.x, None, grads.lora_A, grads.lora_B, gate, scale, bias, *[None] * (2 + codes)


class MultiLoRALinearFunction(torch.autograd.Function):
    """`ops.multi_lora_linear` with `ops.multi_lora_linear_backward`.

    `tensors` are E of lora_A, E of lora_B and the tensors of a 4-bit weight. Saved for the
    backward: the operands and P [M, R].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        index: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        options: MultiOptions,
        *tensors: Any,
    ) -> Tensor:
        spec, blocksizes = options
        E = len(spec.scaling)
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        base = Packed4bit(*codes, *blocksizes) if codes else weight
        operands = MultiOperands(x, base, lora_A, lora_B, index, bias, rng)
        ctx.choice = None
        if ops.plain(x, index, codes[0] if codes else weight, *lora_A, *lora_B):
            ctx.choice = ops.choose_multi(operands, spec)
            y, saved = ops.multi_lora_linear_direct(operands, spec, ctx.choice)
        else:
            y, saved = ops.multi_lora_linear_dispatched(operands, spec)
        rng = rng if saved.mask is None else saved.mask
        ctx.save_for_backward(x, weight, index, saved.p, rng, *tensors)
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, p, rng, *tensors = saved
        spec, blocksizes = ctx.options
        E, need = len(spec.scaling), ctx.needs_input_grad
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        needs = MultiNeeds(need[0], need[6 : 6 + E], need[6 + E : 6 + 2 * E], need[3])
        base, held = (Packed4bit(*codes, *blocksizes), codes[0]) if codes else (weight, weight)
        operands = MultiOperands(x, base, lora_A, lora_B, index, None, rng)
        direct = ctx.choice is not None and ops.plain(dy, x, index, held, *lora_A, *lora_B)
        if direct and not ops.batched(dy):
            grads = ops.multi_lora_linear_backward_direct(
                dy, operands, Saved(p), spec, needs, ctx.choice
            )
        else:
            with _again(ctx.choice):
                grads = ops.multi_lora_linear_backward_dispatched(
                    dy, operands, Saved(p), spec, needs
                )
        dbias = None if grads.bias is None else grads.bias.to(ctx.bias_dtype)
        of_codes = [None] * len(codes)
        return grads.x, None, None, dbias, None, None, *grads.lora_A, *grads.lora_B, *of_codes
