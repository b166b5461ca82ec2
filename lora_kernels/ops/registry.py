"""Registration: schemas made from the call types, twins for 4-bit weights, fakes and dispatch.

An op takes the fields of its call types as flat arguments, in their order. Each is registered
twice: `name` for a dense weight, and `name` + "_4bit" for a weight that is passed as the fields of
`Packed4bit`. All ops are functional, and x may have any leading dimensions. The backend is chosen
inside the op, so a compiled graph does not contain the choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from ..choice import choose as selection
from ..core.call import Saved
from ..core.dtypes import stat_dtype
from ..core.packed4bit import PACKED4BIT_TENSORS, Packed4bit
from ..core.problem import Choice
from . import context

_LIB = torch.library.Library("lora_kernels", "DEF")
# Op name -> implementation, for `bench.counter`, which counts the kernels inside an op.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_WEIGHTS = {Tensor | Packed4bit: "Tensor weight", Tensor | Packed4bit | None: "Tensor? weight"}
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    bool: "bool",
    Sequence[bool]: "bool[]",
    float: "float",
    Sequence[float]: "float[]",
    int: "int",
    str: "str",
    torch.dtype: "ScalarType",
}
_hints = functools.cache(get_type_hints)
OperandsT = TypeVar("OperandsT", bound=Any)
SpecT = TypeVar("SpecT", bound=Any)
NeedsT = TypeVar("NeedsT", bound=Any)
GradsT = TypeVar("GradsT", bound=Any)


def arguments_of(call_type: Any, prefix: str = "", fields: Iterable[str] = ()) -> str:
    """Return the fields of a call type as arguments of a schema, the weight as `{weight}`.

    fields: a part of them; () for all.

    >>> from lora_kernels.core.call import ExpertsNeeds
    >>> arguments_of(ExpertsNeeds, "need_")
    'bool need_x, bool need_lora_A, bool need_lora_B, bool need_bias'
    """
    hints = _hints(call_type)
    return ", ".join(
        "{weight}" if hints[name] in _WEIGHTS else f"{_SCHEMA_TYPES[hints[name]]} {prefix}{name}"
        for name in fields or call_type._fields
    )


def results_of(grads_type: Any) -> str:
    """Return the fields of a type of gradients as results of a schema.

    >>> from lora_kernels.core.call import ExpertsGrads
    >>> results_of(ExpertsGrads)
    'Tensor grad_x, Tensor grad_lora_A, Tensor grad_lora_B, Tensor grad_bias'
    """
    hints = _hints(grads_type)
    return ", ".join(
        f"Tensor{'' if hints[name] == Tensor | None else '[]'} grad_{name}"
        for name in grads_type._fields
    )


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    types: Sequence[tuple[Any, int]] = (),
    before: int = 0,
    tags: tuple[torch.Tag, ...] = (),
) -> tuple[Any, Any]:
    """Register the ops `lora_kernels::name` and `lora_kernels::name_4bit`, and return both.

    Args:
        schema: with `{weight}` in the weight's place.
        implementation, fake: functions of the arguments before the call types, and of these.
        types: the call types that the arguments are packed into, the weight's first, each with the
            number of its first fields in the schema. (): the functions take the weight and the
            flat arguments.
        before: the number of arguments that stand before the call types.
        tags: of the op.
    """
    hints = _hints(types[0][0]) if types else {"weight": Tensor | Packed4bit}
    place = before + types[0][0]._fields.index("weight") if types else 0
    for suffix, weight, at in (
        ("", _WEIGHTS[hints["weight"]], None),
        ("_4bit", arguments_of(Packed4bit), place),
    ):
        run, run_fake = (_pack(each, types, before, at) for each in (implementation, fake))
        _register(name + suffix, schema.format(weight=weight), run, run_fake, tags)
    dense, packed = (getattr(torch.ops.lora_kernels, each) for each in (name, f"{name}_4bit"))
    return dense.default, packed.default


def _pack(
    function: Callable[..., Any], types: Sequence[tuple[Any, int]], before: int, at: int | None
) -> Callable[..., Any]:
    """Wrap `function`, which takes call types, as a function of an op's flat arguments.

    at: where the fields of `Packed4bit` begin; None for a dense weight.
    """

    def flat(*args: Any, **kwargs: Any) -> Any:
        rest = list(args)
        if at is not None:
            end = at + len(Packed4bit._fields)
            rest[at:end] = [Packed4bit(*rest[at:end])]
        if not types:
            return function(*rest, **kwargs)
        packed, start = rest[:before], before
        for each, count in types:
            packed.append(each(*rest[start : start + count]))
            start += count
        return function(*packed, **kwargs)

    return flat


def _register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...],
) -> None:
    """Register one op for every device."""
    _LIB.define(name + schema, tags=tags)
    IMPLEMENTATIONS[name] = implementation
    # Autograd must not record the ops inside; the Functions define the gradients. register_kernel
    # keeps Dynamo out of the op: Dynamo would separate the native call from the tensors whose
    # addresses it gets.
    qualified = f"lora_kernels::{name}"
    overload = getattr(torch.ops.lora_kernels, name).default
    names = [argument.name for argument in overload._schema.arguments]

    @torch.no_grad()
    def checked(*args: Any, **kwargs: Any) -> Any:
        context.check_memory(names, args)
        return implementation(*args, **kwargs)

    torch.library.register_kernel(qualified, None, checked, lib=_LIB)
    torch.library.register_fake(qualified, fake, lib=_LIB)


class Family(NamedTuple):
    """An op's forward and backward as an autograd Function calls them.

    They call the op if something may observe it (see `context.can_bypass_dispatcher`), and its
    implementation otherwise.

    Args:
        forward: (ctx, operands, spec) -> y, Saved. `ctx.choice` becomes the choice, or the request
            in force as text if the op chose.
        backward: (ctx, dy, operands, saved, spec, needs) -> the gradients.
        backward_op: (dy, operands, saved, spec, needs, choice) -> the gradients, always by the op.
    """

    forward: Callable[..., tuple[Tensor, Saved]]
    backward: Callable[..., Any]
    backward_op: Callable[..., Any]


def define_family(
    name: str,
    call_types: tuple[type[OperandsT], type[SpecT], type[NeedsT], type[GradsT]],
    results: tuple[str, ...],
    choose: Callable[..., Choice],
    forward: Callable[[OperandsT, SpecT, Choice], tuple[Tensor, Saved]],
    backward: Callable[[Tensor, OperandsT, Saved, SpecT, NeedsT, Choice], GradsT],
    sizes: Callable[[OperandsT], Sequence[int]],
    grad_shapes: Callable[[OperandsT], Sequence[Any]],
) -> Family:
    """Register `name` and `name` + "_backward", each with its twin for 4-bit weights.

    Args:
        call_types: of operands, other arguments, needs and gradients.
        results: the fields of `Saved` that the forward returns beside y. The mask that it draws is
            the last; the backward gets it as the operand `mask`, and the others as arguments.
        choose: the choice of a call, from operands, spec and the requested backend or None.
        forward, backward: the implementations.
        sizes: N and R.
        grad_shapes: the gradients' shapes, a list for a list of gradients.
    """
    operands_type, spec_type, needs_type, grads_type = call_types
    kept = results[:-1]
    operands_fields = operands_type, len(operands_type._fields)
    spec_fields = spec_type, len(spec_type._fields)
    needs_fields = needs_type, len(needs_type._fields)
    operands_text, spec_text = arguments_of(operands_type), arguments_of(spec_type)
    needs_text = arguments_of(needs_type, "need_")

    def run(operands: OperandsT, spec: SpecT, choice: str = "") -> tuple[Tensor, ...]:
        chosen = choose(operands, spec, selection.parse_request(choice))
        y, saved = forward(operands, spec, chosen)
        dtypes = {"p": saved.p.dtype, "z": spec.y_dtype, "mask": torch.bool}
        return y, *(_filled(getattr(saved, field), dtypes[field], y) for field in results)

    def fake(operands: OperandsT, spec: SpecT, choice: str = "") -> tuple[Tensor, ...]:
        x, (N, R) = operands.x, sizes(operands)
        M, K = x.numel() // x.shape[-1], x.shape[-1]
        has_z, draws = getattr(spec, "save_z", False), draws_mask(operands, spec)
        found = {
            "p": x.new_empty(M, R, dtype=stat_dtype(spec.dtype)),
            "z": x.new_empty((M, N) if has_z else (0,), dtype=spec.y_dtype),
            "mask": x.new_empty((M, K) if draws else (0,), dtype=torch.bool),
        }
        y = x.new_empty(*x.shape[:-1], N, dtype=spec.y_dtype)
        return y, *(found[field] for field in results)

    def run_backward(
        dy: Tensor, operands: OperandsT, saved: Saved, spec: SpecT, needs: NeedsT, choice: str = ""
    ) -> tuple[Any, ...]:
        chosen = choose(operands, spec, selection.parse_request(choice))
        grads = backward(dy, operands, saved, spec, needs, chosen)
        dtypes = _grad_dtypes(grads_type, operands, saved)
        return tuple(_filled(t, dtype, dy) for t, dtype in zip(grads, dtypes, strict=True))

    def fake_backward(
        dy: Tensor, operands: OperandsT, saved: Saved, spec: SpecT, needs: NeedsT, choice: str = ""
    ) -> tuple[Any, ...]:
        shapes, dtypes = grad_shapes(operands), _grad_dtypes(grads_type, operands, saved)
        return tuple(
            _new_grad(need, shape, dtype, operands.x)
            for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
        )

    results_text = ", ".join(f"Tensor {field}" for field in results)
    op, op_4bit = define(
        name,
        f'({operands_text}, {spec_text}, *, str choice="") -> (Tensor y, {results_text})',
        run,
        fake,
        (operands_fields, spec_fields),
        tags=(torch.Tag.nondeterministic_seeded,),  # it may draw a dropout mask
    )
    backward_op, backward_op_4bit = define(
        f"{name}_backward",
        f"(Tensor dy, {operands_text}, {arguments_of(Saved, fields=kept)}, {spec_text}, "
        f'{needs_text}, *, str choice="") -> ({results_of(grads_type)})',
        run_backward,
        fake_backward,
        (operands_fields, (Saved, len(kept)), spec_fields, needs_fields),
        before=1,
    )

    def call_op(operands: OperandsT, spec: SpecT) -> tuple[Tensor, Saved]:
        weight = operands.weight
        if isinstance(weight, Packed4bit):
            y, *rest = op_4bit(operands.x, *weight, *list(operands)[2:], *spec)
        else:
            y, *rest = op(*operands, *spec)
        saved = Saved(**dict(zip(results, rest, strict=True)))
        has_z, drew = getattr(spec, "save_z", False), draws_mask(operands, spec)
        return y, Saved(saved.p, saved.z if has_z else None, saved.mask if drew else None)

    def call_forward(ctx: Any, operands: OperandsT, spec: SpecT) -> tuple[Tensor, Saved]:
        if context.can_bypass_dispatcher(*tensors_of(operands)):
            ctx.choice = choose(operands, spec)
            return forward(operands, spec, ctx.choice)
        ctx.choice = selection.format_request()
        return call_op(operands, spec)

    def call_backward_op(
        dy: Tensor, operands: OperandsT, saved: Saved, spec: SpecT, needs: NeedsT, choice: str
    ) -> GradsT:
        context.refuse_tangent(dy)
        # As lists: Dynamo of torch 2.8 cannot slice a NamedTuple.
        weight, (_, _, *others) = operands.weight, list(operands)
        rest = *list(saved)[: len(kept)], *spec, *needs
        if isinstance(weight, Packed4bit):
            found = backward_op_4bit(dy, operands.x, *weight, *others, *rest, choice=choice)
        else:
            found = backward_op(dy, *operands, *rest, choice=choice)
        grads = (_wanted(t, need) for t, need in zip(found, needs, strict=True))
        return cast(GradsT, grads_type(*grads))

    def call_backward(
        ctx: Any,
        dy: Tensor,
        operands: OperandsT,
        saved: Saved,
        spec: SpecT,
        needs: NeedsT,
    ) -> GradsT:
        # A forward that was dispatched has chosen inside the op.
        if isinstance(ctx.choice, Choice) and context.can_bypass_dispatcher(
            dy, *tensors_of(operands), *saved
        ):
            return backward(dy, operands, saved, spec, needs, ctx.choice)
        return call_backward_op(dy, operands, saved, spec, needs, str(ctx.choice))

    return Family(call_forward, call_backward, call_backward_op)


def tensors_of(operands: Iterable[Any]) -> list[Tensor | None]:
    """Return the tensors of operands, those of a packed weight and of lists among them."""
    tensors: list[Any] = []
    for value in operands:
        if isinstance(value, Packed4bit):
            tensors += value[:PACKED4BIT_TENSORS]
        elif value is None or isinstance(value, Tensor):
            tensors.append(value)
        else:
            tensors += value
    return tensors


def _filled(t: Any, dtype: Any, like: Tensor) -> Any:
    """Return t, or an empty tensor for None, because an op cannot return optional tensors."""
    if isinstance(t, list):
        return [_filled(*each, like) for each in zip(t, dtype, strict=True)]
    return like.new_empty(0, dtype=dtype) if t is None else t


def _new_grad(need: Any, shape: Any, dtype: Any, like: Tensor) -> Any:
    if isinstance(shape, list):
        return [_new_grad(*each, like) for each in zip(need, shape, dtype, strict=True)]
    return like.new_empty(shape if need else (0,), dtype=dtype)


def _wanted(t: Any, need: Any) -> Any:
    """Return a gradient that an op has returned, or None if it is not needed."""
    if isinstance(t, Tensor):
        return t if need else None
    return [_wanted(*each) for each in zip(t, need, strict=True)]


def _grad_dtypes(grads_type: Any, operands: Any, saved: Saved) -> list[Any]:
    """Return the gradients' dtypes: x's, lora_A's and lora_B's own, and P's for the others."""
    found: list[Any] = []
    for name in grads_type._fields:
        t = getattr(operands, name) if name in ("x", "lora_A", "lora_B") else saved.p
        found.append(t.dtype if isinstance(t, Tensor) else [each.dtype for each in t])
    return found


def draws_mask(operands: Any, spec: Any) -> bool:
    """Return True if the op draws a dropout mask."""
    return bool(spec.dropout_p) and operands.rng is None and operands.mask is None


def mask_rows(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask of x's shape as rows [M, K]."""
    return None if mask is None else mask.reshape(-1, x.shape[-1])


def join_weight(tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """Return the weight that a Function's flat arguments hold: dense, a `Packed4bit`, or None.

    Args:
        tensors: the first `PACKED4BIT_TENSORS` fields of a `Packed4bit`, or one dense weight or
            None.
        numbers: its other fields; () for a weight that is not packed.
    """
    return Packed4bit(*tensors, *numbers) if numbers else tensors[0]
