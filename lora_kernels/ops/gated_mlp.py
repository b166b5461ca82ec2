"""The gated MLP's down-projection of h = act(g) ⊙ u, as one autograd Function that keeps no h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from ..backends.eager import gated_mlp as eager_mlp
from ..backends.eager import linear as eager
from ..backends.rows import set_leading_dims_
from ..core.call import Needs, Operands, Saved, Spec
from ..core.dtypes import stat_dtype
from ..core.packed4bit import PACKED4BIT_TENSORS
from ..quantization import Weight4bit
from . import context, linear
from .arguments import check_weight
from .autograd import differentiable_once, new_unsaved
from .registry import join_weight


class GatedOptions(NamedTuple):
    """The arguments of `GatedMLPFunction` that are not tensors.

    Args:
        activation: of `eager_mlp.ACTIVATIONS`.
        spec: of the down-projection.
        is_private: whether nothing but the Function holds g and u.
        blocksizes: the fields of `Packed4bit` that are not tensors; () for a dense weight.
    """

    activation: str
    spec: Spec
    is_private: bool
    blocksizes: tuple[Any, ...]


class Hidden(NamedTuple):
    """h = act(g) ⊙ u, which is not in memory.

    Args:
        g, u: [..., K], one shape and dtype, the outputs of the gate's and the up-projection.
        activation: "silu", "gelu_tanh" or "gelu".
        is_private: whether nothing but the call that gets this holds g and u. Its backward then
            overwrites them, if autograd frees the graph.
    """

    g: Tensor
    u: Tensor
    activation: str
    is_private: bool = False


def gated_mlp(
    hidden: Hidden,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the adapted down-projection of h = act(g) ⊙ u, as `lora_linear` returns it for h.

    h is not kept for the backward, which makes it again. The eager backend computes both.

    Args:
        hidden: h [..., K].
        weight: [N, K] of the down-projection, dense or 4-bit.
        lora_A, lora_B, scaling, bias, compute_dtype: as in `lora_linear`.

    Returns:
        y [..., N], in autocast's dtype if autocast is enabled for g's device, else in g's.

    >>> hidden = Hidden(torch.full((2, 3), 9.0), torch.ones(2, 3), "gelu")
    >>> gated_mlp(hidden, torch.eye(3), torch.ones(1, 3), torch.zeros(3, 1))[0]
    tensor([9., 9., 9.])
    """
    g, u, activation, is_private = hidden
    shape = lora_B.shape[0], lora_A.shape[1]
    cast_dtype = context.autocast_dtype(context.device_of(g)[0], g.dtype)
    dense, codes, dtype = check_weight(g, weight, shape, compute_dtype, cast_dtype)
    y_dtype = cast_dtype or g.dtype
    if cast_dtype is not None:
        g, u, lora_A, lora_B = (t.to(y_dtype) for t in (g, u, lora_A, lora_B))
        dense = dense if dense is None else dense.to(y_dtype)
    spec = Spec(scaling, 0.0, dtype, y_dtype)
    # A view of a larger tensor shares its memory.
    is_private = is_private and all(t.untyped_storage().nbytes() == t.nbytes for t in (g, u))
    options = GatedOptions(activation, spec, is_private, codes[PACKED4BIT_TENSORS:])
    frozen = codes[:PACKED4BIT_TENSORS] or (dense,)
    y: Tensor = GatedMLPFunction.apply(g, u, lora_A, lora_B, bias, options, *frozen)
    return y


class GatedMLPFunction(torch.autograd.Function):
    """y = down(act(g) ⊙ u). The backward needs the operands, and P [M, R] for dB."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        u: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        options: GatedOptions,
        *weight: Any,
    ) -> Tensor:
        activation, spec, _, blocksizes = options
        g, u = g.contiguous(), u.contiguous()
        base = join_weight(weight, blocksizes)
        with context.no_autocast(g):
            h = eager_mlp.gated(g, u, activation).view(-1, g.shape[-1])
            operands = Operands(h, base, lora_A, lora_B, bias=bias)
            y, (p, _, _) = eager.lora_linear(operands, spec, "")
        ctx.save_for_backward(g, u, lora_A, lora_B, p if ctx.needs_input_grad[3] else None, *weight)
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        return set_leading_dims_(y, g.shape[:-1])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        g, u, lora_A, lora_B, p, *weight = saved
        activation, spec, is_private, blocksizes = ctx.options
        need_g, need_u, *rest = ctx.needs_input_grad[:5]
        base = join_weight(weight, blocksizes)
        rows = g.view(-1, g.shape[-1]), u.view(-1, g.shape[-1])
        if p is None:
            p = new_unsaved(dy, lora_A.shape[0], stat_dtype(spec.dtype), flat=True)
        needs = Needs(need_g or need_u, rest[0], rest[1], bias=rest[2])
        operands, dy = Operands(rows[0], base, lora_A, lora_B), dy.reshape(-1, dy.shape[-1])
        with context.no_autocast(g):
            if context.is_batched(dy):
                operands = operands._replace(x=eager_mlp.gated(*rows, activation))
                grads = linear.FAMILY.backward_op(dy, operands, Saved(p), spec, needs, "eager")
                dg, du = eager_mlp.split_gradient(*rows, grads.x, activation)
            else:  # a second backward reads g and u again
                in_place = is_private and not _get_current_graph_task_keep_graph()
                dg, du, grads = eager_mlp.down_backward(
                    dy, *rows, operands, Saved(p), spec, needs, in_place, activation
                )
        dg, du = (None if t is None else t.view(g.shape) for t in (dg, du))
        dbias = None if grads.bias is None else grads.bias.to(ctx.bias_dtype)
        return dg, du, grads.lora_A, grads.lora_B, dbias, *[None] * (1 + len(weight))
