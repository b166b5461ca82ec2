"""Registration of the ops from schemas that each op's file writes by hand, and their calls.

An op takes the fields of its call types as flat arguments, in their order. `define` registers it
twice: `name` for a dense weight, and `name` + "_quantized", whose schema has the fields of `Codes`
in the weight's place. All ops are functional, and x may have any leading dimensions. The backend is
chosen inside the op, so a compiled graph does not contain the choice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choice import choose as selection
from ..core.call import Saved, Spec
from ..core.codes import CODES_TENSORS, Codes
from ..core.problem import Choice
from . import context

_LIB = torch.library.Library("lora_kernels", "DEF")
_PACKED_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int blocksize, int nested_blocksize, str quant_type"
)
# Op name -> implementation, for `bench.counter`, which counts the kernels inside an op.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


class Op(NamedTuple):
    """The op for a dense weight, and the one for a weight that is packed in 4 bits."""

    dense: Any
    packed: Any


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> Op:
    """Register the ops `lora_kernels::name` and `lora_kernels::name_quantized`, and return both.

    Args:
        schema: of the op for a dense weight, with "Tensor weight" or "Tensor? weight" in it.
        implementation, fake: functions of the schema's arguments. The weight is a `Codes` in
            a call of the op for a quantized one.
        tags: of the op.
    """
    first, _, last = re.split(r"(Tensor\?? weight)", schema)
    place = first.count(",")

    def join(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_join_packed, place, function)

    dense = _register(name, schema, implementation, fake, tags)
    schema = first + _PACKED_WEIGHT + last
    packed = _register(f"{name}_quantized", schema, join(implementation), join(fake), tags)
    return Op(dense, packed)


def _join_packed(place: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` with the fields of a `Codes`, which begin at `place`, as one."""
    end = place + len(Codes._fields)
    return function(*args[:place], Codes(*args[place:end]), *args[end:], **kwargs)


def _register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...],
) -> Any:
    """Register one op for every device, and return it."""
    _LIB.define(name + schema, tags=tags)
    IMPLEMENTATIONS[name] = implementation
    overload = getattr(torch.ops.lora_kernels, name).default
    names = [argument.name for argument in overload._schema.arguments]
    # register_kernel keeps Dynamo out of the op: Dynamo would separate the native call from the
    # tensors whose addresses it gets.
    qualified = f"lora_kernels::{name}"
    run = functools.partial(_run, names, implementation)
    torch.library.register_kernel(qualified, None, run, lib=_LIB)
    torch.library.register_fake(qualified, fake, lib=_LIB)
    return overload


@torch.no_grad()
def _run(
    names: Sequence[str], implementation: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run an op. Autograd records nothing inside: the Functions define the gradients."""
    context.check_memory(names, args)
    return implementation(*args, **kwargs)


def split(args: Sequence[Any], *call_types: Any) -> list[Any]:
    """Return an op's flat arguments as call types, whose fields they are in order.

    >>> from lora_kernels.core.call import ExpertsNeeds
    >>> split((True, [True], [False], False), ExpertsNeeds)
    [ExpertsNeeds(x=True, lora_A=[True], lora_B=[False], bias=False)]
    """
    calls, start = [], 0
    for call_type in call_types:
        stop = start + len(call_type._fields)
        calls.append(call_type(*args[start:stop]))
        start = stop
    return calls


def call_op(op: Op, first: Iterable[Any], operands: Any, *others: Any, **kwargs: Any) -> Any:
    """Call the op that the weight needs, with the operands as flat arguments.

    first, others: the arguments before the operands, and after them.
    """
    # As a list: Dynamo of torch 2.8 cannot slice a NamedTuple.
    x, weight, *tensors = list(operands)
    if isinstance(weight, Codes):
        return op.packed(*first, x, *weight, *tensors, *others, **kwargs)
    return op.dense(*first, x, weight, *tensors, *others, **kwargs)


def call_forward(
    ctx: Any,
    op: Op,
    choose: Callable[[Any, Any], Choice],
    implementation: Callable[..., tuple[Tensor, Saved]],
    operands: Any,
    spec: Any,
) -> tuple[Tensor, Saved]:
    """Call a forward's op if something may observe it, and its implementation otherwise.

    `ctx.choice` becomes the choice, or the request in force as text if the op chose.

    Args:
        op: takes the fields of operands and spec. Returns y, P, z if spec is a `Spec`, and the
            dropout mask if the op drew one.
        choose: returns the choice for operands and spec.
        implementation: returns y and `Saved` for operands, spec and the choice.
    """
    if context.can_bypass_dispatcher(*tensors_of(operands)):
        ctx.choice = choose(operands, spec)
        return implementation(operands, spec, ctx.choice)
    ctx.choice = selection.format_request()
    y, p, *z, mask = call_op(op, (), operands, *spec)
    saved_z = z[0] if z and spec.save_z else None
    return y, Saved(p, saved_z, mask if draws_mask(operands, spec) else None)


def call_backward(
    ctx: Any,
    op: Op,
    implementation: Callable[..., Iterable[Any]],
    dy: Tensor,
    operands: Any,
    saved: Saved,
    spec: Any,
    needs: Any,
) -> Iterable[Any]:
    """Call a backward's op or its implementation, as `call_forward` does.

    Return the gradients in the order of `needs`, None for those that are not needed.

    Args:
        op: takes dy, P, z if spec is a `Spec`, and the fields of operands, spec and needs.
        implementation: returns the gradients for the arguments from dy on and the choice.
    """
    # A forward that was dispatched has chosen inside the op.
    if isinstance(ctx.choice, Choice) and context.can_bypass_dispatcher(
        dy, *tensors_of(operands), *saved
    ):
        return implementation(dy, operands, saved, spec, needs, ctx.choice)
    context.refuse_tangent(dy)
    z = (saved.z,) if isinstance(spec, Spec) else ()
    grads = call_op(op, (dy, saved.p, *z), operands, *spec, *needs, choice=str(ctx.choice))
    return needed(grads, needs)


def tensors_of(operands: Iterable[Any]) -> list[Tensor | None]:
    """Return the tensors of operands, those of a packed weight and of lists among them."""
    tensors: list[Any] = []
    for value in operands:
        if isinstance(value, Codes):
            # As a list: Dynamo of torch 2.8 cannot slice a NamedTuple.
            tensors += list(value)[:CODES_TENSORS]
        elif value is None or isinstance(value, Tensor):
            tensors.append(value)
        else:
            tensors += value
    return tensors


def or_empty(t: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return t, or an empty tensor for None, because an op cannot return optional tensors."""
    return like.new_empty(0, dtype=dtype) if t is None else t


def fill_grads(grads: Iterable[Any], likes: Iterable[Any], dy: Tensor) -> list[Any]:
    """Return the gradients with an empty tensor for each None.

    likes: for each gradient a tensor of its dtype; for a list of gradients a list.
    """
    return [
        or_empty(grad, like.dtype, dy) if isinstance(like, Tensor) else fill_grads(grad, like, dy)
        for grad, like in zip(grads, likes, strict=True)
    ]


def new_grad(need: bool, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return a fake's gradient, empty if it is not needed."""
    return like.new_empty(shape if need else (0,), dtype=dtype)


def needed(grads: Iterable[Any], needs: Iterable[Any]) -> list[Any]:
    """Return the gradients that an op has returned, with None for those that are not needed.

    A list of gradients has a list of needs.
    """
    return [
        (grad if need else None) if isinstance(need, bool) else needed(grad, need)
        for grad, need in zip(grads, needs, strict=True)
    ]


def draws_mask(operands: Any, spec: Any) -> bool:
    """Return True if the op draws a dropout mask."""
    return bool(spec.dropout_p) and operands.rng is None and operands.mask is None


def mask_rows(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask of x's shape as rows [M, K]."""
    return None if mask is None else mask.reshape(-1, x.shape[-1])


def join_weight(tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """Return the weight that a Function's flat arguments hold: dense, a `Codes`, or None.

    Args:
        tensors: the first `CODES_TENSORS` fields of a `Codes`, or one dense weight or
            None.
        numbers: its other fields; () for a weight that is not packed.
    """
    return Codes(*tensors, *numbers) if numbers else tensors[0]
