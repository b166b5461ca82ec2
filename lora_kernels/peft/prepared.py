"""A fused layer's prepared call for one adapter, with guards on the state it depends on."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu import native
from ..core.call import Guard
from ..layers.cache import CallCache, unchanged
from ..ops import context
from ..ops.arguments import autocast_dtype
from ..ops.linear import CheckedCall, lora_linear
from ..quantization import Weight4bit
from .adapters import Adapter, dropout_p, weight_of
from .modules import LINEAR_FORWARD, hooks_of, is_conv1d, is_linear4bit


@dataclasses.dataclass(eq=False)
class PreparedForward:
    """The prepared call of a layer with one adapter, and its guards.

    Each call checks all guards. No attribute refers to the layer, which would be a reference cycle.
    """

    x_dtype: torch.dtype
    device: torch.device | None  # None: the CPU, because x.is_cpu is faster than x.device
    weight: Tensor | Weight4bit
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    compute_dtype: torch.dtype | None
    active: str | list[str]
    dropout: nn.Dropout | None
    scalings: dict[str, float]
    base_parameters: dict[str, Any]
    adapter_dtypes: tuple[torch.dtype, torch.dtype]
    modules: dict[str, Any]
    guards: tuple[tuple[Any, ...], ...]  # objects, keys, expected values
    hooks: tuple[dict[int, Any], ...]  # of the modules, all empty
    cache: CallCache
    checked: CheckedCall | None

    @classmethod
    def build(
        cls,
        layer: Any,
        adapter: Adapter,
        x: Tensor,
        weight: Tensor | Weight4bit,
        compute_dtype: torch.dtype | None,
    ) -> PreparedForward | None:
        """Prepare the call for a layer whose forward has just called `lora_linear`.

        Returns None if the guards do not cover the layer's state.
        """
        name, lora_A, lora_B, scaling, dropout, diag, is_alora = adapter
        modules = layer._modules
        base = modules["base_layer"]
        stored, four_bit = base._parameters["weight"], isinstance(weight, Weight4bit)
        if isinstance(scaling, Tensor) or is_conv1d(base):
            return None
        if diag is not None or is_alora:
            return None  # a gate, or rows that the arguments of a call name
        if is_linear4bit(base) and (not four_bit or type(stored) is nn.Parameter):
            return None  # decoded for float64, or gathered by FSDP2 for this call alone
        if lora_B._parameters["bias"] is not None:
            return None
        A, B = weight_of(lora_A), weight_of(lora_B)
        if not (A.is_leaf and B.is_leaf):
            return None  # from functional_call: holding them would keep their graph alive

        called = (base, lora_A, lora_B, dropout)
        entries: list[tuple[dict[str, Any], str]] = [
            *((modules, kind) for kind in ("base_layer", "lora_A", "lora_B", "lora_dropout")),
            # The layer may lack an active adapter now and get it later.
            *((modules["lora_A"]._modules, active) for active in layer.active_adapters),
            *((modules[kind]._modules, name) for kind in ("lora_B", "lora_dropout")),
            (layer.scaling, name),
            (layer.lora_variant, name),
            *((module.__dict__, "forward") for module in called),
            (base._parameters, "weight"),
            (lora_A._parameters, "weight"),
            (lora_B._parameters, "weight"),
            (lora_B._parameters, "bias"),
        ]
        if four_bit:
            entries += [
                (base.__dict__, "compute_dtype"),
                (base.__dict__, "compute_type_is_set"),
                (stored.__dict__, "quant_state"),
                (stored.quant_state.__dict__, "absmax"),
            ]
        guards = [
            *(Guard(entry, key, entry.get(key)) for entry, key in entries),
            Guard(base, type, type(base)),  # changes when its bias is parametrized
            Guard(nn.Linear, "forward", LINEAR_FORWARD),
            Guard(layer.peft_class, "forward", type(layer).peft_forward),
            Guard(type(dropout), "forward", type(dropout).forward),
            Guard(stored, _weight_state, _weight_state(stored)),
        ]
        cache, p = CallCache(), dropout_p(dropout)
        cache.renew(x, (weight, A, B), (scaling, compute_dtype, p))
        checked = None
        if autocast_dtype(x.device.type, x.dtype) is None:
            bias = base._parameters["bias"]
            checked = CheckedCall.build(x, weight, A, B, scaling, bias, compute_dtype, p)
        return cls(
            x_dtype=x.dtype,
            device=None if x.is_cpu else x.device,
            weight=weight,
            lora_A=A,
            lora_B=B,
            scaling=scaling,
            compute_dtype=compute_dtype,
            active=copy.copy(layer._active_adapter),
            dropout=dropout if type(dropout) is nn.Dropout else None,
            scalings=layer.scaling,
            base_parameters=base._parameters,
            adapter_dtypes=(A.dtype, B.dtype),
            modules=modules,
            guards=tuple(zip(*guards, strict=True)),
            hooks=tuple(hooks for module in called for hooks in hooks_of(module)),
            cache=cache,
            checked=checked,
        )

    def _is_valid(self, layer: Any) -> bool:
        """Return True if no guard has changed. `__call__` checks x and the adapter's dtypes."""
        check: Any = unchanged if native.module is None else native.module.unchanged
        return (
            layer._active_adapter == self.active
            and not (layer._disable_adapters or layer.merged_adapters or layer.mixed_batch)
            and layer._modules is self.modules
            and layer.scaling is self.scalings  # rescale_adapter_scale replaces the dictionary
            and check(*self.guards, self.hooks)
        )

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return y, or None if a guard fails and `forward` must run."""
        if not self._is_valid(layer):
            return None
        bias, dropout = self.base_parameters["bias"], self.dropout
        has_grad = torch.is_grad_enabled()
        p = dropout.p if dropout is not None and dropout.training else 0.0
        tensors, numbers = (
            (self.weight, self.lora_A, self.lora_B),
            (self.scaling, self.compute_dtype, p),
        )
        # It guards x and the adapter's tensors.
        y = None if has_grad else self.cache.call(x, bias, tensors, numbers)
        if y is not None:
            return y
        if (
            context.unfused_context() is not None
            or x.dtype is not self.x_dtype
            or not (x.is_cpu if self.device is None else x.device == self.device)
            or (self.lora_A.dtype, self.lora_B.dtype) != self.adapter_dtypes
        ):
            return None
        checked = self.checked
        if checked and checked.bias is bias and checked.options.spec.dropout_p == p:
            y = checked(x)
        if y is None:
            y = lora_linear(
                x, *tensors, self.scaling, bias, dropout_p=p, compute_dtype=self.compute_dtype
            )
        if not has_grad:
            self.cache.renew(x, tensors, numbers)
        # bitsandbytes returns x's dtype, under autocast too.
        return y.to(x.dtype) if isinstance(self.weight, Weight4bit) else y

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # not copied or pickled with a layer
        return type(None), ()


def _weight_state(weight: Tensor) -> tuple[int, bool]:
    """Return the address and requires_grad, which a guard compares."""
    return weight.data_ptr(), weight.requires_grad
