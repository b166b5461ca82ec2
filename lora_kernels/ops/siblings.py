"""Autograd Functions of layers that share their x; no mathematics (see `backends.eager.siblings`).

x is threaded through the siblings:

    x_0, P_1 … P_n = DownProjections(x, A_1 … A_n)        y_i, x_i = SiblingLinear(x_{i-1}, P_i, …)

Each x_i is x again. Its gradient is that of the siblings after i, in a tensor that no one else
holds, so the backward of sibling i adds its own dx in place. A sibling whose y has no gradient
hands dx on; a sibling that is never called has no part in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.eager import siblings as eager_siblings
from ..backends.rows import set_leading_dims_
from ..choice import choose as selection
from ..core import forced
from ..core.call import Operands, Spec
from ..core.packed4bit import PACKED4BIT_TENSORS
from ..quantization import Weight4bit
from . import context, linear
from .arguments import FLOATS
from .autograd import differentiable_once
from .registry import join_weight


class _DownProjections(torch.autograd.Function):
    """x [..., K] -> x_0 [M, K] and each P_i [M, R_i].

    The backward needs each A_i, and x if a dA is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_rounded: bool, *lora_A: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        need_x, _, *need_A = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        with context.no_autocast(x):
            p = eager_siblings.down_projections(rows, lora_A, is_rounded)
        ctx.save_for_backward(x if any(need_A) else None, *lora_A)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        if not need_x:  # else the siblings would compute dx
            frozen = [t for t, need in zip(p, need_A, strict=True) if not need]
            ctx.mark_non_differentiable(rows, *frozen)
        return rows, *p

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Any) -> tuple[Tensor | None, ...]:
        x, *lora_A = saved
        need_x, _, *need_A = ctx.needs_input_grad
        dx, *dp = grads
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        with context.no_autocast(lora_A[0]):
            dx, dA = eager_siblings.down_projections_backward(
                dx, dp, rows, lora_A, any(need_A), ctx.x_dtype if need_x else None
            )
        dx = None if dx is None or not need_x else dx.view(ctx.x_shape)
        return dx, None, *(t if need else None for t, need in zip(dA, need_A, strict=True))


class _Options(NamedTuple):
    """The arguments of `_SiblingLinear` that are not tensors.

    Args:
        scaling: alpha / r.
        y_shape: of y.
        blocksizes: the fields of `Packed4bit` that are not tensors; () for a dense weight.
    """

    scaling: float
    y_shape: torch.Size
    blocksizes: tuple[Any, ...]


class _SiblingLinear(torch.autograd.Function):
    """x_{i-1} [M, K] and P_i -> y_i and x_i.

    The backward needs P_i for dB and dg, B, the gate, and the weight for dx.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: Tensor,
        lora_B: Tensor,
        rank_gate: Tensor | None,
        bias: Tensor | None,
        options: _Options,
        *weight: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scaling, y_shape, blocksizes = options
        base = join_weight(weight, blocksizes)
        with context.no_autocast(x):
            sibling = eager_siblings.Sibling(p, base, lora_B, scaling, rank_gate)
            y = eager_siblings.sibling_linear(x, sibling, bias)
        y = set_leading_dims_(y, y_shape[:-1])
        need_x, _, need_B, need_gate, *_ = ctx.needs_input_grad
        kept_p = p if need_B or need_gate else None
        ctx.save_for_backward(kept_p, lora_B, rank_gate, *(weight if need_x else ()))
        ctx.options, ctx.columns, ctx.p_dtype = options, x.shape[1], p.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.num_weights = len(weight)
        if not need_x:
            ctx.mark_non_differentiable(x)
        return y, x

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dx: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        p, lora_B, rank_gate, *weight = saved
        others = [None] * (1 + ctx.num_weights)
        if dy is None:
            return dx, None, None, None, None, *others
        base = None
        if weight:
            blocksizes = ctx.options.blocksizes
            base = join_weight(weight, blocksizes)
        sibling = eager_siblings.Sibling(p, base, lora_B, ctx.options.scaling, rank_gate)
        rows, needs = dy.reshape(-1, dy.shape[-1]), ctx.needs_input_grad[:5]
        with context.no_autocast(dy):
            grads = eager_siblings.sibling_linear_backward(
                rows, dx, sibling, ctx.columns, ctx.p_dtype, needs
            )
        dg, dbias = grads.rank_gate, grads.bias
        dg = None if rank_gate is None or dg is None else dg.to(rank_gate.dtype)
        dbias = None if ctx.bias_dtype is None or dbias is None else dbias.to(ctx.bias_dtype)
        return grads.x, grads.p, grads.lora_B, dg, dbias, *others


def down_projections(
    x: Tensor, lora_A: Sequence[Tensor], is_rounded: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return x [..., K] as rows [M, K], to be threaded through the siblings, and P_i = x·A_iᵀ.

    is_rounded: whether P has x's 16-bit dtype, see `eager_siblings.is_p_rounded`.
    """
    rows, *p = _DownProjections.apply(x, is_rounded, *lora_A)
    return rows, p


def sibling_linear(
    x: Tensor,
    p: Tensor,
    weight: Tensor | Weight4bit,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    rank_gate: Tensor | None,
    leading: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return y [*leading, N], and x [M, K] for the next sibling.

    Args:
        x: of `down_projections`, or of the sibling before.
        p: this sibling's P.
        weight, lora_B, scaling, bias, rank_gate: as in `lora_linear`. x, y and a dense weight have
            one dtype, in which the base GEMM runs.
        leading: the dimensions of the rows of y.
    """
    codes = tuple(weight.codes) if isinstance(weight, Weight4bit) else ()
    y_shape = torch.Size((*leading, lora_B.shape[0]))
    options = _Options(scaling, y_shape, codes[PACKED4BIT_TENSORS:])
    tensors = codes[:PACKED4BIT_TENSORS] or (weight,)
    return _SiblingLinear.apply(  # type: ignore[no-any-return]
        x, p, lora_B, rank_gate, bias, options, *tensors
    )


class LinearArguments(NamedTuple):
    """An adapted linear layer: the arguments of `lora_linear` beside x."""

    weight: Tensor | Weight4bit
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None


def shared_linears(x: Tensor, linears: Sequence[LinearArguments]) -> list[Tensor]:
    """Return y_i [..., N_i] of layers that share x [..., K].

    The A have one dtype. A dense weight has x's dtype, or autocast's after a cast.
    """
    cast_dtype = context.autocast_dtype(context.device_of(x)[0], x.dtype)
    dtype = cast_dtype or x.dtype
    factors = [t for each in linears for t in (each.lora_A, each.lora_B)]
    if cast_dtype is not None:
        factors = [t.to(dtype) for t in factors]
    is_rounded = eager_siblings.is_p_rounded(dtype, [t.dtype for t in factors], False)
    rows, projections = down_projections(x.to(dtype), factors[::2], is_rounded)
    found = []
    for each, B, p in zip(linears, factors[1::2], projections, strict=True):
        weight = each.weight if isinstance(each.weight, Weight4bit) else each.weight.to(dtype)
        y, rows = sibling_linear(rows, p, weight, B, each.scaling, each.bias, None, x.shape[:-1])
        found.append(y)
    return found


def is_eager(
    x: Tensor,
    weight: Tensor | Weight4bit,
    lora_A: Tensor,
    lora_B: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> bool:
    """Return True if the eager backend computes `lora_linear` of these arguments.

    It reads no values, so that under autocast nothing is cast for it.
    """
    cast_dtype = context.autocast_dtype(context.device_of(x)[0], x.dtype)
    if cast_dtype is not None:
        x, lora_A, lora_B = (empty_like(t, cast_dtype) for t in (x, lora_A, lora_B))
    codes = weight.codes if isinstance(weight, Weight4bit) else weight
    spec = Spec(1.0, 0.0, cast_dtype or compute_dtype or x.dtype, x.dtype)
    return linear.choose(Operands(x, codes, lora_A, lora_B), spec).backend == "eager"


def empty_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of t's shape that takes the memory of one element."""
    return t.new_empty((), dtype=dtype).expand(t.shape)


def can_run_block(x: Tensor) -> bool:
    """Return True if a block may run for x: a plain tensor on a GPU that runs the eager backend,
    seen by no mode."""
    device_type, _ = context.device_of(x)
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype in FLOATS
        and selection.is_eager_on_gpu(device_type)
        and forced.entered in (None, "eager")  # the backward's thread knows no other
        # A mode may replay single ops, as selective checkpointing does. On meta the counter looks.
        and (device_type == "meta" or not context.is_intercepted())
    )
