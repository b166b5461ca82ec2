"""Thin autograd Functions: they call ops and hold no mathematics of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backends.eager.linear import stat_dtype
from ..core.call import (
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Grads,
    MultiNeeds,
    MultiOperands,
    MultiSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ..core.packed4bit import Packed4bit
from ..core.problem import Choice
from . import registry as ops

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


def differentiable_once(backward: _Backward) -> _Backward:
    """Return `backward(ctx, saved, *dy)` as a Function's backward that raises if differentiated.

    `_Gradients` runs only if gradients are enabled in the backward, because it takes as long as a
    kernel of a small layer.
    """

    def call(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks no tensor twice
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *dy)
        with torch.no_grad():  # copies, because `blocks` overwrites what it is given
            grads = backward(ctx, saved, *(None if t is None else t.clone() for t in dy))
        return cast(tuple[Tensor | None, ...], _Gradients.apply(len(grads), *grads, *dy, *saved))

    return call


class Options(NamedTuple):
    """The arguments of `LoRALinearFunction` that are not tensors.

    They are one argument, because a Function's call takes time for each argument.

    Args:
        spec: of the call.
        recompute: whether the backward recomputes P instead of saving it.
        blocksizes: the fields of `Packed4bit` that are not tensors; () for a dense weight.
    """

    spec: Spec
    recompute: bool
    blocksizes: tuple[Any, ...]


class MultiOptions(NamedTuple):
    """The arguments of `MultiLoRALinearFunction` that are not tensors; see `Options`."""

    spec: MultiSpec
    blocksizes: tuple[Any, ...]


class ExpertsOptions(NamedTuple):
    """The arguments of `LoRAExpertsFunction` that are not tensors; see `Options`."""

    spec: ExpertsSpec
    blocksizes: tuple[Any, ...]


def _can_bypass(ctx: Any, *tensors: Tensor | None) -> bool:
    """Return True if the backward can run the forward's choice without the dispatcher.

    A forward that was dispatched has chosen inside of the op: its `ctx.choice` is the request that
    was in force, as text.
    """
    return isinstance(ctx.choice, Choice) and ops.can_bypass_dispatcher(*tensors)


def _unread(dy: Tensor, columns: int, dtype: torch.dtype, flat: bool = False) -> Tensor:
    """Return uninitialized memory in place of x, or of P if `flat`: no gradient reads its values.

    The backends read its shape and dtype. It is allocated in the backward and freed with it; a
    saved tensor occupies memory from the forward on.
    """
    shape = (dy.numel() // dy.shape[-1],) if flat else dy.shape[:-1]
    return dy.new_empty(*shape, columns, dtype=dtype)


class LoRALinearFunction(torch.autograd.Function):
    """`ops.lora_linear` with `ops.lora_linear_backward`.

    `weight` is a dense weight or None, or the tensors of a 4-bit weight. The backward needs the
    operands, but x for dA alone; P [M, R] for dB and dg, unless `Options.recompute` makes it from
    x; and z [M, N] if the column scale needs a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rank_gate: Tensor | None,
        column_scale: Tensor | None,
        bias: Tensor | None,
        options: Options,
        *frozen: Any,  # rng, then the weight
    ) -> Tensor:
        rng, *weight = frozen
        spec, recompute, blocksizes = options
        base = Packed4bit(*weight, *blocksizes) if blocksizes else weight[0]
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, bias, rng)
        if column_scale is not None and ctx.needs_input_grad[4]:
            spec = spec._replace(save_z=True)
        if ops.can_bypass_dispatcher(x, weight[0], lora_A, lora_B):
            ctx.choice = ops.choose(operands, spec)
            y, (p, z, mask) = ops.lora_linear_direct(operands, spec, ctx.choice)
        else:
            ctx.choice = ops.requested()
            y, (p, z, mask) = ops.lora_linear_dispatched(operands, spec)
        reads_p = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        reads_x = ctx.needs_input_grad[1] or (reads_p and recompute)
        kept_x, kept_p = x if reads_x else None, p if reads_p and not recompute else None
        adapter = lora_A, lora_B, rank_gate, column_scale
        ctx.save_for_backward(kept_x, *adapter, rng if mask is None else mask, kept_p, z, *weight)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, rank_gate, column_scale, rng, p, z, *weight = tensors
        spec, _, blocksizes = ctx.options
        needs = Needs(*ctx.needs_input_grad[:6])
        base = Packed4bit(*weight, *blocksizes) if blocksizes else weight[0]
        R, K = lora_A.shape
        if x is None:
            x = _unread(dy, K, ctx.x_dtype)
        operands = Operands(x, base, lora_A, lora_B, rank_gate, column_scale, None, rng)
        if p is None and not (needs.lora_B or needs.rank_gate):
            p = _unread(dy, R, stat_dtype(spec.dtype), flat=True)
        elif p is None:
            backend, _, _ = str(ctx.choice).partition(" ")  # the strategy depends on N, here 1
            p = ops.down_projection(x, lora_A, spec.dropout_p, rng, spec.dtype, backend)
        args = dy, operands, Saved(p, z), spec, needs
        if _can_bypass(ctx, dy, x, weight[0], lora_A, lora_B):
            grads = ops.lora_linear_backward_direct(*args, ctx.choice)
        else:
            grads = ops.lora_linear_backward_dispatched(*args, str(ctx.choice))
        return *_cast_grads(ctx, grads, operands), *[None] * (2 + len(weight))


def _cast_grads(ctx: Any, grads: Grads, operands: Operands) -> tuple[Tensor | None, ...]:
    """Return the gradients, each in the dtype of its tensor."""
    gate, scale, bias = grads[3:]
    if gate is not None and operands.rank_gate is not None:
        gate = gate.to(operands.rank_gate.dtype)
    if scale is not None and operands.column_scale is not None:
        scale = scale.to(operands.column_scale.dtype)
    if bias is not None:
        bias = bias.to(ctx.bias_dtype)
    return grads.x, grads.lora_A, grads.lora_B, gate, scale, bias


class MultiLoRALinearFunction(torch.autograd.Function):
    """`ops.multi_lora_linear` with `ops.multi_lora_linear_backward`.

    `tensors` are E of lora_A, E of lora_B and the tensors of a 4-bit weight. The backward needs the
    operands and P [M, R], but x if a dA is needed alone, and P if a dB is.
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
        if ops.can_bypass_dispatcher(x, index, codes[0] if codes else weight, *lora_A, *lora_B):
            ctx.choice = ops.choose_multi(operands, spec)
            y, saved = ops.multi_lora_linear_direct(operands, spec, ctx.choice)
        else:
            ctx.choice = ops.requested()
            y, saved = ops.multi_lora_linear_dispatched(operands, spec)
        rng = rng if saved.mask is None else saved.mask
        need_A, need_B = ctx.needs_input_grad[6 : 6 + E], ctx.needs_input_grad[6 + E : 6 + 2 * E]
        kept = x if any(need_A) else None, saved.p if any(need_B) else None
        ctx.save_for_backward(*kept, weight, index, rng, *tensors)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, weight, index, rng, *tensors = saved
        spec, blocksizes = ctx.options
        E, need = len(spec.scaling), ctx.needs_input_grad
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        if x is None:
            x = _unread(dy, lora_A[0].shape[1], ctx.x_dtype)
        if p is None:
            R = max(A.shape[0] for A in lora_A)
            p = _unread(dy, R, stat_dtype(spec.dtype), flat=True)
        needs = MultiNeeds(need[0], need[6 : 6 + E], need[6 + E : 6 + 2 * E], need[3])
        base, held = (Packed4bit(*codes, *blocksizes), codes[0]) if codes else (weight, weight)
        operands = MultiOperands(x, base, lora_A, lora_B, index, None, rng)
        args = dy, operands, Saved(p), spec, needs
        if _can_bypass(ctx, dy, x, index, held, *lora_A, *lora_B):
            grads = ops.multi_lora_linear_backward_direct(*args, ctx.choice)
        else:
            grads = ops.multi_lora_linear_backward_dispatched(*args, str(ctx.choice))
        dbias = None if grads.bias is None else grads.bias.to(ctx.bias_dtype)
        of_codes = [None] * len(codes)
        return grads.x, None, None, dbias, None, None, *grads.lora_A, *grads.lora_B, *of_codes


class LoRAExpertsFunction(torch.autograd.Function):
    """`ops.lora_experts` with `ops.lora_experts_backward`.

    `weight` is a dense weight or the tensors of a 4-bit weight. The backward needs the operands
    and P [M, R], but x for dA alone, and P for dB.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        options: ExpertsOptions,
        rng: Tensor | None,
        *weight: Any,
    ) -> Tensor:
        spec, blocksizes = options
        base = Packed4bit(*weight, *blocksizes) if blocksizes else weight[0]
        operands = ExpertsOperands(x, base, lora_A, lora_B, offsets, bias, rng)
        if ops.can_bypass_dispatcher(x, weight[0], lora_A, lora_B, offsets):
            ctx.choice = ops.choose_experts(operands, spec)
            y, saved = ops.lora_experts_direct(operands, spec, ctx.choice)
        else:
            ctx.choice = ops.requested()
            y, saved = ops.lora_experts_dispatched(operands, spec)
        rng = rng if saved.mask is None else saved.mask
        kept_x = x if ctx.needs_input_grad[1] else None
        kept_p = saved.p if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept_x, lora_A, lora_B, offsets, kept_p, rng, *weight)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, offsets, p, rng, *weight = tensors
        spec, blocksizes = ctx.options
        _, R, K = lora_A.shape
        x = _unread(dy, K, ctx.x_dtype) if x is None else x
        p = _unread(dy, R, stat_dtype(spec.dtype)) if p is None else p
        needs = ExpertsNeeds(*ctx.needs_input_grad[:4])
        base = Packed4bit(*weight, *blocksizes) if blocksizes else weight[0]
        operands = ExpertsOperands(x, base, lora_A, lora_B, offsets, None, rng)
        args = dy, operands, Saved(p), spec, needs
        if _can_bypass(ctx, dy, x, weight[0], lora_A, lora_B, offsets):
            grads = ops.lora_experts_backward_direct(*args, ctx.choice)
        else:
            grads = ops.lora_experts_backward_dispatched(*args, str(ctx.choice))
        dbias = None if grads.bias is None else grads.bias.to(ctx.bias_dtype)
        return grads.x, grads.lora_A, grads.lora_B, dbias, *[None] * (3 + len(weight))
