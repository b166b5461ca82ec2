"""A low-rank update that is added in place to the result of a base layer.

The base layer is another library's module, whose weight is not read: y = base(x), and then
`y.addmm_(S, Bᵀ)`. That reads and writes y once, where y + S·Bᵀ writes the update, reads both and
writes the sum. If something else holds y, the update goes to a copy. Either way autograd saves the
same tensors, so a forward and its recomputation by checkpointing agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ..backends.eager import blocks
from ..backends.eager import linear as eager
from ..core.call import Needs, Operands, Saved, Spec
from ..core.dtypes import stat_dtype
from ..core.record import Record
from . import context, linear
from .autograd import differentiable_once


def can_overwrite(y: Tensor) -> bool:
    """Return True if y, which only the caller holds, can be changed in place.

    A base may return a part of a larger memory, or compute in inference mode.

    >>> y = torch.ones(2, 3)
    >>> can_overwrite(y), can_overwrite(y.view(6)), can_overwrite(y[0]), can_overwrite(y.t())
    (True, True, False, False)
    """
    if context.is_intercepted() and not y.is_meta:
        return False  # a mode may keep the results of ops
    return (
        type(y) is Tensor
        and y.is_contiguous()
        and y.untyped_storage().nbytes() == y.nbytes
        and y.is_inference() is torch.is_inference_mode_enabled()
    )


def add_lora_linear_(y: Tensor, x: Tensor, bias: Tensor | None, record: Record) -> Tensor:
    """Add scaling·((D(x)·Aᵀ) ⊙ g)·Bᵀ + bias to y in place, by the eager backend, and return y.

    Args:
        y: [..., N], contiguous, all of its memory, in autocast's dtype if autocast is enabled for
            x's device, else in x's. Nothing else may hold it.
        x: [..., K].
        bias: [N] or None.
        record: of the adapter, whose base is not read. On a CPU there is no dropout.

    >>> y, x = torch.ones(2, 3), torch.ones(2, 4)
    >>> add_lora_linear_(y, x, None, Record(None, torch.ones(1, 4), torch.ones(3, 1), None, 0.5))
    tensor([[3., 3., 3.],
            [3., 3., 3.]])
    """
    lora_A, lora_B, rank_gate = record.lora_A, record.lora_B, record.rank_gate
    if y.dtype is not x.dtype:  # under autocast
        x = x.to(y.dtype)
    if context.autocast_dtype(context.device_of(x)[0], x.dtype) is not None:
        lora_A, lora_B = lora_A.to(y.dtype), lora_B.to(y.dtype)
    spec = Spec(cast(float, record.scaling), record.dropout_p, y.dtype, y.dtype)
    if torch.is_grad_enabled():
        added: Tensor = AddLoRALinear.apply(y, x, lora_A, lora_B, rank_gate, bias, spec)
        return added
    _add(y, x, lora_A, lora_B, rank_gate, bias, spec)
    return y


def _add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    rank_gate: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
) -> Saved:
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    with context.no_autocast(y):
        saved = blocks.add_update_(
            y_rows, x_rows, lora_A, lora_B, spec.scaling, rank_gate, spec.dropout_p
        )
        if bias is not None:
            y += bias
    return saved


class AddLoRALinear(torch.autograd.Function):
    """y += scaling·((D(x)·Aᵀ) ⊙ g)·Bᵀ + bias. The backward needs x for dA, and P [M, R] for dB.

    The result is another tensor on y's memory. Were it y itself, `mark_dirty` would make a y that
    is a view copy its gradient, and were it a view of y, no one might change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        rank_gate: Tensor | None,
        bias: Tensor | None,
        spec: Spec,
    ) -> Tensor:
        *_, need_A, need_B, need_gate, _, _ = ctx.needs_input_grad
        saved = _add(y, x, lora_A, lora_B, rank_gate, bias, spec)
        kept_x, kept_p = x if need_A else None, saved.p if need_B or need_gate else None
        ctx.save_for_backward(kept_x, lora_A, lora_B, rank_gate, kept_p, saved.mask)
        ctx.spec, ctx.x_shape, ctx.x_dtype = spec, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.new_empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, rank_gate, p, mask = saved
        need_y, need_x, need_A, need_B, need_gate, need_bias, _ = ctx.needs_input_grad
        rows, stat = dy.reshape(-1, dy.shape[-1]), stat_dtype(ctx.spec.dtype)
        if x is None:  # its values are not read
            x = dy.new_empty(rows.shape[0], lora_A.shape[1], dtype=ctx.x_dtype)
        if p is None:
            p = dy.new_empty(rows.shape[0], dtype=stat)
        operands = Operands(x.reshape(-1, x.shape[-1]), None, lora_A, lora_B, rank_gate, mask=mask)
        needs = Needs(need_x, need_A, need_B, need_gate)
        with context.no_autocast(dy):
            args = rows, operands, Saved(p), ctx.spec, needs
            grads: Iterable[Any]
            if context.is_batched(dy):
                ctx.choice = "eager"  # of the op, for which PyTorch slices dy
                grads = linear.call_linear_backward(ctx, *args)
            else:
                grads = eager.lora_linear_backward(*args, "")
            dbias = rows.sum(0, dtype=stat).to(ctx.bias_dtype) if need_bias else None
        dx, dA, dB, dg, *_ = grads
        dx = None if dx is None else dx.view(ctx.x_shape)
        dg = None if dg is None else dg.to(rank_gate.dtype)
        return dy if need_y else None, dx, dA, dB, dg, dbias, None
