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

from ..core.call import Operands, Spec
from ..core.dtypes import to_dtype
from ..layers.cache import DoraNormCache
from ..ops import context, in_place, linear
from ..ops.arguments import base_dtype, copies_rows, has_strides
from ..ops.blocks import can_run
from ..ops.linear import lora_linear
from ..ops.multi import multi_lora_linear
from ..quantization import Weight4bit
from . import direct
from .adapters import (
    Adapter,
    Call,
    MixedCall,
    RowNames,
    calls_for,
    cast_call,
    casts_adapters,
    dropout_p,
    lora_bias,
    weight_of,
)
from .base import readable_weight
from .eligibility import has_invalid_sequences
from .modules import LINEAR_FORWARD, has_fresh_result, is_linear4bit, library_forward
from .plan import Plan, plan_linear

if TYPE_CHECKING:
    from .groups import Group

# Keyword arguments that PEFT's variants read and that a base layer does not take.
_NOT_BASE_KWARGS = ("adapter_names", *getattr(lora_layer, "VARIANT_KWARG_KEYS", ()))


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
    _group: Group | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        cls.peft_class = bases[bases.index(Fused) + 1]
        if cls.peft_class is not nn.Module:  # else another mix-in
            cls.peft_forward = library_forward(cls.peft_class)

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
        adapters, reason, base_reason, is_dora = self.plan(x.device, x.dtype, names)
        reason = reason or self._layout_reason(x)
        if reason is not None or has_invalid_sequences(adapters, x, rows):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        if kwargs:
            self._check_forward_args(x, **kwargs)  # type: ignore[operator]  # PEFT's own
            kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_BASE_KWARGS}

        base, bias = cast(nn.Module, self._modules["base_layer"]), lora_bias(adapters)
        if is_dora:
            if args or kwargs:  # the base takes more than x
                return cast(Tensor, super().forward(x, *args, **kwargs))
            return _dora_linear(self, adapters[0], x)
        first_call, *others = self.calls(adapters, x, rows)
        if args or kwargs or base_reason is not None:
            result, is_fresh = self._call_base(base, x, *args, **kwargs)
            dtype = result.dtype
            result = add_update(result, is_fresh, x, bias, first_call)
        else:
            base_bias = base._parameters["bias"]
            if base_bias is not None:
                bias = base_bias if bias is None else base_bias + bias
            weight, compute_dtype = readable_weight(base, x)
            result = add_adapter(x, weight, bias, first_call, compute_dtype)
            dtype = result_dtype(base, x, result)
        for call in others:
            result = add_update(result, True, x, None, call)
        return to_dtype(result, dtype)

    # `explain` asks for the plan and the calls too.

    def plan(
        self, device: torch.device, x_dtype: torch.dtype, names: Sequence[str] | None = None
    ) -> Plan:
        """Plan a call. names: the adapters that the rows of x name; None for the active ones."""
        return plan_linear(self, device, x_dtype, names)

    def calls(self, adapters: Sequence[Any], x: Tensor, rows: RowNames) -> list[Any]:
        """Return the calls for x, in x's dtype if the layer rounds its adapters."""
        return self._cast(calls_for(adapters, x, rows), x)

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

    def _cast(self, calls: Sequence[Any], x: Tensor) -> list[Any]:
        """Return the calls with the adapters in x's dtype, if the layer rounds them."""
        if not casts_adapters(self, x.device.type, x.dtype, x.shape[:-1].numel()):
            return list(calls)
        return [cast_call(call, x.dtype) for call in calls]


class FusedLinear(Fused, lora.Linear):
    """PEFT's LoRA layer over `nn.Linear`, or over a base that is called as a module."""

    fits_blocks = True
    base_class, base_forward = nn.Linear, LINEAR_FORWARD


def _dora_linear(layer: Any, adapter: Adapter, x: Tensor) -> Tensor:
    """Return y = magnitude ⊘ norm ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias.

    PEFT applies dropout before the scaled base GEMM too, and adds the base output of the
    complement: y = magnitude ⊘ norm ⊙ (D(x)·Wᵀ + s·D(x)·Aᵀ·Bᵀ) + (x − D(x))·Wᵀ + bias.
    """
    base, A, B = layer.base_layer, weight_of(adapter.lora_A), weight_of(adapter.lora_B)
    weight, compute_dtype = readable_weight(base, x)
    bias, scaling = base._parameters["bias"], cast(float, adapter.scaling)
    norm = layer.__dict__.setdefault("_norm", DoraNormCache())(weight, A, B, scaling)
    scale = layer.lora_magnitude_vector[adapter.name].weight / norm
    if casts_adapters(layer, x.device.type, x.dtype, x.shape[:-1].numel()):
        A, B = A.to(x.dtype), B.to(x.dtype)
    if not dropout_p(adapter.dropout):
        y = lora_linear(
            x, weight, A, B, scaling, bias, column_scale=scale, compute_dtype=compute_dtype
        )
    else:
        dropped = adapter.dropout(x)
        complement, no_adapter = x - dropped, (A.detach(), B.detach(), 0.0)
        y = lora_linear(
            dropped, weight, A, B, scaling, column_scale=scale, compute_dtype=compute_dtype
        ) + lora_linear(complement, weight, *no_adapter, bias, compute_dtype=compute_dtype)
    return to_dtype(y, result_dtype(base, x, y))


def result_dtype(base: nn.Module, x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype of the layer's result y; bitsandbytes' is x's dtype, even under autocast."""
    return x.dtype if is_linear4bit(base) else y.dtype


def add_adapter(
    x: Tensor,
    weight: Tensor | Weight4bit | None,
    bias: Tensor | None,
    call: Call | MixedCall,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the result of the call for x, added to x·Wᵀ if a weight is given."""
    if isinstance(call, MixedCall):
        A, B, row_index, scaling, p = call
        kwargs: dict[str, Any] = {"dropout_p": p, "compute_dtype": compute_dtype}
        return multi_lora_linear(x, weight, A, B, row_index, scaling, bias, **kwargs)
    lora_A, lora_B, factor, gate, p = call
    kwargs = {"rank_gate": gate, "dropout_p": p, "compute_dtype": compute_dtype}
    return lora_linear(x, weight, lora_A, lora_B, factor, bias, **kwargs)


def add_update(
    y: Tensor, is_fresh: bool, x: Tensor, bias: Tensor | None, call: Call | MixedCall
) -> Tensor:
    """Return y, the result of a base layer, plus the result of the call for x.

    is_fresh: whether only the caller holds y. y is then overwritten if possible.
    """
    is_fresh = is_fresh and in_place.can_overwrite(y)
    if isinstance(call, MixedCall) or not _can_add_in_place(y, x, call):
        update = add_adapter(x, None, bias, call)
        # Autograd forbids in-place changes of a view that a Function returned.
        return y.add_(update) if is_fresh and not y._is_view() else y + update
    lora_A, lora_B, scaling, gate, p = call
    if not is_fresh:
        y = y.clone(memory_format=torch.contiguous_format)
    return in_place.add_lora_linear_(y, x, lora_A, lora_B, scaling, bias, gate, p)


def _can_add_in_place(y: Any, x: Tensor, call: Call) -> bool:
    """Return True if the eager backend computes the update for y on a GPU, in y's dtype."""
    if type(y) is not Tensor or y.device != x.device:
        return False
    if not can_run(x) or (call.dropout_p and copies_rows(x)):
        return False
    dtype = base_dtype(context.device_of(x)[0], x.dtype)
    if y.dtype is not dtype or y.shape != (*x.shape[:-1], call.lora_B.shape[0]):
        return False
    operands = Operands(x, None, call.lora_A, call.lora_B, call.rank_gate)
    return linear.choose(operands, Spec(call.scaling, call.dropout_p, dtype, dtype)).is_eager


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
