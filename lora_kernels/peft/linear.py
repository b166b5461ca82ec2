"""PEFT's LoRA layer with `lora_linear` as its forward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as lora_layer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import dropout

from ..core.call import Operands, Spec
from ..core.dtypes import to_dtype
from ..core.record import Record
from ..layers.cache import DoraNormCache
from ..ops import context, in_place, linear
from ..ops.arguments import base_dtype, copies_rows, has_strides
from ..ops.blocks import can_run
from ..ops.linear import lora_linear
from ..ops.multi import multi_lora_linear
from ..quantization import QuantizedWeight
from . import direct
from .adapters import (
    Call,
    RowNames,
    add_bias,
    calls_for,
    cast_adapters,
    casts_adapters,
    has_invalid_sequences,
    lora_bias,
    stack_records,
)
from .base import readable_weight
from .modules import LINEAR_FORWARD, has_fresh_result, is_linear4bit, original_forward
from .read import read_adapter, read_call

if TYPE_CHECKING:
    from .groups import Group

# Keyword arguments that PEFT's layers of LoRA read, and that a base layer does not take.
_ADAPTER_KWARGS = ("adapter_names", *getattr(lora_layer, "VARIANT_KWARG_KEYS", ()))


class Fused(nn.Module):
    """The mix-in by which `fuse` overrides a PEFT layer's forward with `lora_linear`.

    x [..., K] -> [..., N] in the dtype that PEFT's own forward returns. Active adapters without
    dropout are stacked along the rank and share one call. In training each adapter with dropout
    has its own call, because PEFT draws a mask for each. An aLoRA has its own call of
    `multi_lora_linear`, unless it is active in every row.
    """

    # PEFT's target_modules="all-linear" recognizes its own layers by "Linear" in the class name, so
    # the names of subclasses contain it.

    # The distinct adapter_names of the last call, for `explain`. No call reads its adapters here,
    # because threads may name different ones. If it is set, `direct.read` returns None, and the
    # general way clears it.
    mixed_batch: tuple[str, ...] | None = None
    peft_class: Any  # the class of PEFT that a subclass overrides
    peft_forward: Any  # that class's forward; None if it was replaced before
    casts_adapters = False  # `fuse`'s argument
    layer_name = ""  # in the model that `fuse` was given, for errors
    fits_blocks = False  # whether a `Group` or a gated MLP may compute the layer
    # The class and forward of the bases whose weight `direct.call` reads; None if it reads none.
    base_class: Any = None
    base_forward: Any = None
    reads_codes = False  # whether the weight is 4-bit, and `read_codes` reads it
    read_adapter = read_adapter  # reads the operands of one adapter
    # Keyword arguments that a base layer does not take.
    adapter_kwargs = _ADAPTER_KWARGS
    _group: Group | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        cls.peft_class = bases[bases.index(Fused) + 1]
        if cls.peft_class is not nn.Module:  # else another mix-in
            cls.peft_forward = original_forward(cls.peft_class)

    # The copy of a layer has its place in the copy of its group.

    def __getstate__(self) -> dict[str, Any]:
        group = self._group
        places = [i for i, layer in enumerate(group.layers) if layer is self] if group else []
        return vars(self) | ({"_group": (group, *places)} if places else {"_group": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        place = state.get("_group")
        others = {name: value for name, value in state.items() if name != "_group"}
        super().__setstate__(others)  # type: ignore[no-untyped-call]
        if place is not None:
            group, index = place
            if group.layers[index] is None:  # copy.copy does not copy the group
                self.__dict__["_group"], group.layers[index] = group, self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs or is_compiling()):
            group = self._group
            y = None if group is None else group.call(self, x)
            if y is None:
                y = direct.call(self, x)
            if y is not None:
                return y
        rows = RowNames(kwargs.get("adapter_names"), kwargs.get("alora_offsets"))
        names = None if rows.names is None else tuple(dict.fromkeys(rows.names))
        if names is not None or self.mixed_batch is not None:
            self.mixed_batch = names
        records = read_call(self, x.device, x.dtype, names)
        if (
            isinstance(records, str)
            or self._layout_reason(x) is not None
            or has_invalid_sequences(records, x, rows)
        ):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        calls_base = bool(args) or any([name not in self.adapter_kwargs for name in kwargs])
        first = records[0]
        if calls_base and (first.magnitude is not None or first.column_scale is not None):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        if kwargs:
            self._check_forward_args(x, **kwargs)  # type: ignore[operator]  # PEFT's own
            kwargs = {name: t for name, t in kwargs.items() if name not in self.adapter_kwargs}
        base, bias = cast(nn.Module, self._modules["base_layer"]), lora_bias(records)
        if calls_base or first.called is not None:
            first_call, *others = self.calls(records, x, rows)
            result, is_fresh = self._call_base(base, x, *args, **kwargs)
            dtype = result.dtype
            result = add_update(result, is_fresh, x, bias, first_call)
        else:
            weight, compute_dtype = readable_weight(base, x)
            if first.magnitude is not None:
                records = [_scale_columns(self, first, weight)]
            first_call, *others = self.calls(records, x, rows)
            add_base = compute if first.magnitude is None else _compute_dora
            result = add_base(x, weight, add_bias(first.bias, bias), first_call, compute_dtype)
            dtype = result_dtype(base, x, result)
        for call in others:
            result = add_update(result, True, x, None, call)
        return to_dtype(result, dtype)

    # `explain` asks for the calls too.

    def calls(self, records: Sequence[Record], x: Tensor, rows: RowNames) -> list[Call]:
        """Return the calls for x, in x's dtype if the layer rounds its adapters."""
        if casts_adapters(self, x.device.type, x.dtype, x.shape[:-1].numel()):
            records = cast_adapters(records, x.dtype)
        return calls_for(records, x, rows)

    def _layout_reason(self, x: Tensor) -> str | None:
        """Return why PEFT's forward computes an x without strides, and warn; None for other x."""
        if has_strides(x):
            return None
        name, kind = self.layer_name or "a fused layer", "nested" if x.is_nested else x.layout
        reason = f"{name}: x has the layout {kind}: PEFT's forward computes the call"
        warnings.warn(reason, stacklevel=3)
        return reason

    def _call_base(
        self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, bool]:
        """Call the base layer as a module. Return its result, and whether nothing else holds it.

        Raises RuntimeError if x needs a gradient and the result has no graph, because dx would lack
        the base's part. PEFT's forward drops that part silently.
        """
        result: Tensor = base(x, *args, **kwargs)
        if x.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise RuntimeError(
                f"{self.layer_name or 'a fused layer'}: its base layer {type(base).__name__} got "
                "an x that requires a gradient, and returned a result without a graph. Gradients "
                "of the layers before it would lack the base's part: load the base in a format "
                "whose forward is differentiable, or decode it"
            )
        return result, not is_compiling() and has_fresh_result(base)


class FusedLinear(Fused, lora.Linear):
    """PEFT's LoRA layer over `nn.Linear`, or over a base that is called as a module."""

    fits_blocks = True
    base_class, base_forward = nn.Linear, LINEAR_FORWARD


def _scale_columns(layer: Any, record: Record, weight: Tensor | QuantizedWeight) -> Record:
    """Return DoRA's record with the column scale magnitude ⊘ ‖W + scaling·B·A‖."""
    cache = layer.__dict__.setdefault("_norm", DoraNormCache())
    norm = cache(weight, record.lora_A, record.lora_B, record.scaling)
    return record._replace(magnitude=None, column_scale=record.magnitude / norm)


def _compute_dora(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    call: Call,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """Return y = c ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias, with dropout as PEFT's DoRA applies it.

    PEFT drops x for the scaled base GEMM too, and adds the base output of the complement:
    y = c ⊙ (D(x)·Wᵀ + s·D(x)·Aᵀ·Bᵀ) + (x − D(x))·Wᵀ + bias.
    """
    (record,) = call.records
    if not record.dropout_p:
        return compute(x, weight, bias, call, compute_dtype)
    dropped, A, B = dropout(x, record.dropout_p), record.lora_A, record.lora_B
    scaled = record._replace(dropout_p=0.0)
    base = Record(weight, A.detach(), B.detach(), scaling=0.0)
    # The complement first: no backward reads it, so that it is freed before the second call.
    y = compute(x - dropped, weight, bias, Call([base]), compute_dtype)
    return y + compute(dropped, weight, None, Call([scaled]), compute_dtype)


def result_dtype(base: nn.Module, x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype of the layer's result y; bitsandbytes' is x's dtype, even under autocast."""
    return x.dtype if is_linear4bit(base) else y.dtype


def compute(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    bias: Tensor | None,
    call: Call,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the result of the call for x, added to x·Wᵀ if a weight is given."""
    records, row_index = call
    if row_index is not None:
        A, B = [r.lora_A for r in records], [r.lora_B for r in records]
        scaling, p = [cast(float, r.scaling) for r in records], records[0].dropout_p
        kwargs: dict[str, Any] = {"dropout_p": p, "compute_dtype": compute_dtype}
        return multi_lora_linear(x, weight, A, B, row_index, scaling, bias, **kwargs)
    record = stack_records(records)
    return lora_linear(
        x,
        weight,
        record.lora_A,
        record.lora_B,
        cast(float, record.scaling),
        bias,
        rank_gate=record.rank_gate,
        column_scale=record.column_scale,
        dropout_p=record.dropout_p,
        compute_dtype=compute_dtype,
    )


def add_update(y: Tensor, is_fresh: bool, x: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Return y, the result of a base layer, plus the result of the call for x.

    is_fresh: whether only the caller holds y. y is then overwritten if possible.
    """
    is_fresh = is_fresh and in_place.can_overwrite(y)
    record = stack_records(call.records) if call.row_index is None else None
    if record is None or not _can_add_in_place(y, x, record):
        update = compute(x, None, bias, call if record is None else Call([record]))
        # Autograd forbids in-place changes of a view that a Function returned.
        return y.add_(update) if is_fresh and not y._is_view() else y + update
    if not is_fresh:
        y = y.clone(memory_format=torch.contiguous_format)
    return in_place.add_lora_linear_(y, x, bias, record)


def _can_add_in_place(y: Any, x: Tensor, record: Record) -> bool:
    """Return True if the eager backend computes the update for y on a GPU, in y's dtype."""
    if type(y) is not Tensor or y.device != x.device:
        return False
    if not can_run(x) or (record.dropout_p and copies_rows(x)):
        return False
    dtype = base_dtype(context.device_of(x)[0], x.dtype)
    if y.dtype is not dtype or y.shape != (*x.shape[:-1], record.lora_B.shape[0]):
        return False
    operands = Operands(x, None, record.lora_A, record.lora_B, record.rank_gate)
    spec = Spec(cast(float, record.scaling), record.dropout_p, dtype, dtype)
    return linear.choose(operands, spec).is_eager


def peft_class(layer: Any) -> Any:
    """Return the class that PEFT gave the layer."""
    return layer.peft_class if isinstance(layer, Fused) else type(layer)


def set_class(layer: Any, cls: Any) -> None:
    """Set the layer's class, and rebind its forward if accelerate has wrapped it."""
    # accelerate stores the forward that it wraps, which is a method of the layer's former class.
    for name in ("forward", "_old_forward"):
        if getattr(vars(layer).get(name), "__func__", None) is type(layer).forward:
            vars(layer)[name] = MethodType(cls.forward, layer)
    layer.__class__ = cls
