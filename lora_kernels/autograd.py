"""Thin autograd Functions: they call ops and hold no mathematics of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from . import ops
from .backends import forced
from .backends.forced import Forced
from .quantization.codes import Codes
from .select import Choice

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


class LoRALinearFunction(torch.autograd.Function):
    """`ops.lora_linear` with `ops.lora_linear_backward`.

    What is no tensor comes in one tuple, since a Function takes time for each argument: scaling,
    dropout_p, dtype, y_dtype, recompute, a 4-bit weight's block sizes and type, and the
    `prepared.Step` that is to be taken, or None. rng is the dropout mask's state, or the mask; None
    with dropout_p > 0 has the op draw a mask.

    Saved for backward: the inputs, P = D(x)·Aᵀ [M, R] (made again there where `recompute` is), the
    rng state; z [M, N] only where the column scale needs a gradient.
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
        numbers: tuple[Any, ...],
        *codes: Any,
    ) -> Tensor:
        scaling, dropout_p, dtype, y_dtype, recompute, blocksizes, step = numbers
        save_z = column_scale is not None and ctx.needs_input_grad[5]
        y: Tensor
        p: Tensor | None
        z: Tensor | None = None
        mask: Tensor | None = None
        choice: Choice | None = None
        if step is not None:
            y, p = step.train(x, bias, rng)
        elif ops.plain(x, codes[0] if codes else weight, lora_A, lora_B):
            held = Codes(*codes, *blocksizes) if codes else weight
            choice = ops.choose(x, held, lora_A, lora_B, dtype, rng, dropout_p)
            y, p, z, mask = ops.lora_linear_direct(
                x, held, lora_A, lora_B, scaling, rank_gate, column_scale, bias, dropout_p, rng,
                dtype, y_dtype, save_z, choice,
            )  # fmt: skip
        else:
            call: Any = ops.lora_linear_4bit if codes else ops.lora_linear
            base: tuple[Any, ...] = (*codes, *blocksizes) if codes else (weight,)
            y, p, z, mask = call(
                x, *base, lora_A, lora_B, scaling, rank_gate, column_scale, bias, dropout_p, rng,
                dtype, y_dtype, save_z,
            )  # fmt: skip
        if recompute:
            p = None
        if rng is None and dropout_p:
            rng = mask
        ctx.save_for_backward(x, lora_A, lora_B, p, z, rank_gate, column_scale, rng, weight, *codes)
        ctx.numbers, ctx.choice = numbers, choice
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, p, z, rank_gate, column_scale, rng, weight, *codes = saved
        scaling, dropout_p, dtype, _, _, blocksizes, step = ctx.numbers
        choice, need = ctx.choice, ctx.needs_input_grad
        need_x, need_A, need_B = need[0], need[2], need[3]
        need_gate, need_column_scale, need_bias = need[4], need[5], need[6]
        if step is not None:
            wanted = need_x, need_A, need_B
            found = None
            if not need_bias:
                found = step.backward(dy, x, weight, lora_A, lora_B, p, rng, *wanted)
            if found is not None:
                dx, dA, dB = found
                return dx, None, dA, dB, *[None] * (5 + len(codes))
            choice = step.choice(p.shape[0])
        base: tuple[Any, ...] = (*codes, *blocksizes) if codes else (weight,)
        call: Any = ops.lora_linear_backward_4bit if codes else ops.lora_linear_backward
        if p is None:
            with _again(choice, strategy=False):  # of a layer with one column
                p = ops.rank_product(x, lora_A, dropout_p, rng, dtype)
        chosen: tuple[Choice | None, ...] = ()
        direct = choice is not None and ops.plain(dy, x, base[0], lora_A, lora_B)
        if direct and not ops.batched(dy):
            call, chosen = ops.lora_linear_backward_direct, (choice,)
            base = (Codes(*base) if codes else weight,)
        with _NOTHING if chosen else _again(choice):
            dx, dA, dB, dg, dc, dbias = call(
                dy, x, *base, lora_A, lora_B, p, z, scaling, rank_gate, column_scale, dropout_p,
                rng, dtype, need_x, need_A, need_B, need_gate, need_column_scale, need_bias,
                *chosen,
            )  # fmt: skip
        return (
            dx if need_x else None,
            None,
            dA if need_A else None,
            dB if need_B else None,
            dg.to(rank_gate.dtype) if need_gate else None,
            dc.to(column_scale.dtype) if need_column_scale else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            *[None] * (2 + len(codes)),
        )


class MultiLoRALinearFunction(torch.autograd.Function):
    """`ops.multi_lora_linear` with `ops.multi_lora_linear_backward`.

    Numbers: the adapters' scalings, dropout_p, dtype, y_dtype and a 4-bit weight's block sizes. The
    adapters' tensors come last: E of A, E of B and, for a 4-bit weight, its codes. Saved for
    backward: the inputs, P [M, R], the rng state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        index: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        numbers: tuple[Any, ...],
        *tensors: Any,
    ) -> Tensor:
        scaling, dropout_p, dtype, y_dtype, blocksizes = numbers
        E = len(scaling)
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        base: tuple[Any, ...] = (*codes, *blocksizes) if codes else (weight,)
        call: Any = ops.multi_lora_linear_4bit if codes else ops.multi_lora_linear
        chosen: tuple[Choice, ...] = ()
        ctx.choice = None
        if ops.plain(x, index, base[0], *lora_A, *lora_B):
            call, held = ops.multi_lora_linear_direct, Codes(*base) if codes else weight
            ctx.choice = ops.choose_multi(x, held, lora_A, lora_B, dtype, rng, dropout_p)
            base, chosen = (held,), (ctx.choice,)
        y: Tensor
        y, p, mask = call(
            x, *base, lora_A, lora_B, index, scaling, bias, dropout_p, rng, dtype, y_dtype, *chosen
        )
        if rng is None and dropout_p:
            rng = mask
        ctx.save_for_backward(x, weight, index, p, rng, *tensors)
        ctx.numbers = numbers
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, p, rng, *tensors = saved
        scaling, dropout_p, dtype, _, blocksizes = ctx.numbers
        E, need = len(scaling), ctx.needs_input_grad
        lora_A, lora_B, codes = tensors[:E], tensors[E : 2 * E], tensors[2 * E :]
        need_bias, need_A, need_B = need[3], need[6 : 6 + E], need[6 + E : 6 + 2 * E]
        base: tuple[Any, ...] = (*codes, *blocksizes) if codes else (weight,)
        call: Any = ops.multi_lora_linear_backward_4bit if codes else ops.multi_lora_linear_backward
        chosen: tuple[Choice, ...] = ()
        direct = ctx.choice is not None and ops.plain(dy, x, index, base[0], *lora_A, *lora_B)
        if direct and not ops.batched(dy):
            call, chosen = ops.multi_lora_linear_backward_direct, (ctx.choice,)
            base = (Codes(*base) if codes else weight,)
        with _NOTHING if chosen else _again(ctx.choice):
            dx, dA, dB, dbias = call(
                dy, x, *base, lora_A, lora_B, index, p, scaling, dropout_p, rng, dtype,
                need[0], need_A, need_B, need_bias, *chosen,
            )  # fmt: skip
        return (
            dx if need[0] else None, None, None,
            dbias.to(ctx.bias_dtype) if need_bias else None, None, None,
            *[grad if needed else None for grad, needed in zip(dA, need_A, strict=True)],
            *[grad if needed else None for grad, needed in zip(dB, need_B, strict=True)],
            *[None] * len(codes),
        )  # fmt: skip
