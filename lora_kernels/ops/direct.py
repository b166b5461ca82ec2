"""`lora_linear` for a layer's forward: reads the layer's tensors in each call, and keeps nothing.

On a CPU one native call (csrc/direct.cpp) checks the tensors, chooses the strategy and runs the
kernels; the autograd Function is handed its result. On a GPU it is a block of one layer. For all
else `call` returns None, and the layer calls `lora_linear`, whose errors name the argument.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_tls_local_include_set
from torch.autograd import forward_ad

from ..backends import library
from ..backends.cpu import native
from ..backends.cpu.linear import library_dx, library_linear
from ..choice import choose as selection
from ..core import forced
from ..core.call import Needs, Operands, Saved, Spec
from ..core.codes import CODES_TENSORS, Codes
from ..core.dropout import dropout_scale, dropout_threshold
from ..core.dtypes import DTYPE_NUMBERS
from ..core.problem import MAX_KERNEL_RANK
from ..core.record import CodePath, Record, path_reason
from ..quantization import QuantizedWeight, codebooks
from . import blocks, context, linear
from .arguments import draw_rng
from .autograd import differentiable_once, new_unsaved
from .registry import join_weight

# The operands that a layer of `lora_kernels.layers` takes.
LAYER = CodePath("LoRALayer", (frozenset({"dropout_p", "rank_gate", "column_scale"}),))


def _set_up() -> None:
    """Give the extension PyTorch's classes and functions, in the order of csrc/direct.cpp."""
    assert native.module is not None
    methods = Tensor.new_empty, Tensor.is_neg, Tensor.data_ptr, Tensor.stride, Tensor.to
    functions = library_linear, library_dx, torch.get_num_threads
    observers = _dispatch_tls_local_include_set, context.KEYS, context.INFERENCE_KEYS
    of_types = {name: codebooks.code(name, "cpu") for name in codebooks.QUANT_TYPES}
    values = torch.empty(0), *observers, vars(forward_ad), of_types, MAX_KERNEL_RANK
    native.module.set_up(*context.TENSOR_TYPES, *methods, *functions, *DTYPE_NUMBERS, *values)


if native.module is not None:
    _set_up()


@functools.cache
def _dropout(p: float) -> tuple[int, float]:
    return dropout_threshold(p), dropout_scale(p)


def call(
    x: Tensor,
    weight: Tensor | Codes | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Return y = x·Wᵀ + scaling · (D(x)·Aᵀ)·Bᵀ + bias; None if `lora_linear` must be called.

    Args:
        x, bias, scaling, dropout_p, compute_dtype: as in `lora_linear`.
        weight: [N, K], frozen, dense or packed.
        lora_A, lora_B: [R, K] and [N, R]. None: no adapter, for a few rows without gradients.
    """
    if library.emulates_gpu or not x.is_cpu:
        record = Record(weight, lora_A, lora_B, bias, scaling, dropout_p)
        return blocks.call_linear(x, record, compute_dtype)
    module = native.module
    if module is None or weight is None or torch.is_autocast_enabled("cpu"):
        return None
    if forced.current.get() is not forced.DEFAULT or forced.DEFAULT.backend is not None:
        return None
    dropout = (draw_rng, *_dropout(dropout_p)) if dropout_p else None
    has_grad = torch.is_grad_enabled()
    if has_grad and isinstance(weight, Tensor) and weight.requires_grad:
        return None
    result: Any = module.direct_forward(
        x, weight, lora_A, lora_B, compute_dtype, scaling, dropout, bias, has_grad
    )
    if result is None or not has_grad:
        return result  # type: ignore[no-any-return]
    frozen = (weight,) if isinstance(weight, Tensor) else weight
    computed = *result, scaling, dropout_p, compute_dtype, frozen
    return DirectFunction.apply(x, lora_A, lora_B, bias, computed)  # type: ignore[no-any-return]


class DirectFunction(torch.autograd.Function):
    """The graph of a result that the native call has computed already, and its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        computed: tuple[Any, ...],
    ) -> Tensor:
        y, p, rng, *numbers, frozen = computed
        _, need_A, need_B, *_ = ctx.needs_input_grad
        saved = x if need_A else None, p if need_B else None
        ctx.save_for_backward(*saved, lora_A, lora_B, rng, *frozen[:CODES_TENSORS])
        ctx.numbers, ctx.blocksizes = numbers, frozen[CODES_TENSORS:]
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
        assert native.module is not None
        x, p, lora_A, lora_B, rng, *frozen = tensors
        scaling, dropout_p, compute_dtype = ctx.numbers
        weight = join_weight(frozen, ctx.blocksizes)
        needs = ctx.needs_input_grad[:4]
        dropout = None if rng is None else (rng, *_dropout(dropout_p))
        operands = weight, lora_A, lora_B, compute_dtype, scaling, dropout
        grads = native.module.direct_backward(dy, *operands, x, p, *needs)
        if grads is None:
            grads = _backward(ctx, dy, weight, x, p, lora_A, lora_B, rng)
        dx, dA, dB, dbias = grads
        return dx, dA, dB, None if dbias is None else dbias.to(ctx.bias_dtype), None


def _backward(
    ctx: Any,
    dy: Tensor,
    weight: Tensor | Codes,
    x: Tensor | None,
    p: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    rng: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients by `lora_linear`'s backward, for any dy and whatever observes it."""
    scaling, dropout_p, compute_dtype = ctx.numbers
    R, K = lora_A.shape
    x = new_unsaved(dy, K, ctx.x_dtype) if x is None else x
    p = new_unsaved(dy, R, torch.float32, flat=True) if p is None else p
    if isinstance(weight, Codes):  # bitsandbytes' parameters, in the shape of its quant_storage
        packed = weight.packed.detach().reshape(-1).view(torch.uint8)
        weight = weight._replace(packed=packed.as_subclass(Tensor))
    operands = Operands(x, weight, lora_A, lora_B, None, None, None, rng, None)
    spec = Spec(scaling, dropout_p, compute_dtype or ctx.x_dtype, ctx.x_dtype)
    need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
    needs = Needs(need_x, need_A, need_B, False, False, need_bias)
    ctx.choice = linear.choose(operands, spec, selection.parse_request("cpu"))
    dx, dA, dB, _, _, dbias = linear.call_linear_backward(ctx, dy, operands, Saved(p), spec, needs)
    return dx, dA, dB, dbias


def compute(
    x: Tensor, record: Record, compute_dtype: torch.dtype | None = None, recompute: bool = False
) -> Tensor:
    """Return what `lora_linear` returns for a record's operands, by `call` if it takes them.

    record: whose weight may be a `QuantizedWeight`.

    Raises ValueError for an operand beyond `LAYER`.
    """
    # As a list: Dynamo of torch 2.8 cannot slice a NamedTuple.
    weight, lora_A, lora_B, bias, scaling, p, _, _, *others = list(record)
    is_plain = not any([t is not None and t is not False for t in others])
    if not is_plain and (reason := path_reason([record], LAYER)) is not None:
        raise ValueError(reason)
    gate, column_scale = record.rank_gate, record.column_scale
    if is_plain and not (recompute or torch.compiler.is_compiling()):
        operand = weight.codes if isinstance(weight, QuantizedWeight) else weight
        y = call(x, operand, lora_A, lora_B, bias, scaling, p, compute_dtype)
        if y is not None:
            return y
    return linear.lora_linear(
        x,
        weight,
        lora_A,
        lora_B,
        scaling,
        bias,
        rank_gate=gate,
        column_scale=column_scale,
        dropout_p=p,
        compute_dtype=compute_dtype,
        recompute=recompute,
    )
