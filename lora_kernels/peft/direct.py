"""The call of a fused layer in its common state, which is read in each call.

The common state is one active adapter of plain LoRA, over a base that does what its class says.
`read` returns None for every other state, and `plan.plan_linear` decides.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn import Dropout, Identity, Linear

from ..ops import direct
from .adapters import casts_adapters
from .modules import LINEAR_FORWARD, library_forward

_FORWARDS = {cls: library_forward(cls) for cls in (Dropout, Identity)}


# The base's weight, lora_A, lora_B, the base's bias, the scaling, and the probability of dropout in
# this call. A tuple, because a NamedTuple takes a third of the reading's time to make.
State = tuple[Any, Tensor, Tensor, Tensor | None, float, float]


def read(layer: Any) -> State | None:
    """Return the layer's state, or None if it is not the common one."""
    cls, own = type(layer), layer.__dict__
    base_class = cls.base_class
    if base_class is None or base_class.forward is not cls.base_forward:
        return None
    if cls.peft_class.forward is not cls.peft_forward or Linear.forward is not LINEAR_FORWARD:
        return None
    try:
        if own["_disable_adapters"] or own["merged_adapters"] or own["lora_variant"]:
            return None
        if "mixed_batch" in own and own["mixed_batch"] is not None:
            return None
        name = own["_active_adapter"]
        if type(name) is list:
            if len(name) != 1:
                return None
            (name,) = name
        modules, scaling = own["_modules"], own["scaling"][name]
        lora_A = modules["lora_A"]._modules[name]
        lora_B = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        base = modules["base_layer"]
        kind = type(dropout)
        if not (type(lora_A) is type(lora_B) is Linear and type(base) is base_class):
            return None
        if type(scaling) is not float or kind.forward is not _FORWARDS.get(kind):
            return None
        for module in (base, lora_A, lora_B, dropout):
            of = module.__dict__
            if (
                of["_forward_pre_hooks"]
                or of["_forward_hooks"]
                or of["_backward_pre_hooks"]
                or of["_backward_hooks"]
                or "forward" in of
            ):
                return None
        if lora_B._parameters["bias"] is not None:
            return None
        p = dropout.p if kind is Dropout and dropout.training else 0.0
        stored, A, B = base._parameters, lora_A._parameters["weight"], lora_B._parameters["weight"]
        return stored["weight"], cast(Tensor, A), cast(Tensor, B), stored["bias"], scaling, p
    except KeyError:
        return None


def call(layer: Any, x: Tensor) -> Tensor | None:
    """Return what the layer's forward returns for x; None if the plan decides."""
    state = read(layer)
    if state is None:
        return None
    weight, lora_A, lora_B, bias, scaling, p = state
    if weight is None or weight.requires_grad:
        return None
    if layer.casts_adapters and casts_adapters(layer, x.device.type, x.dtype):
        return None
    if not layer.reads_codes:
        return direct.call(x, weight, lora_A, lora_B, bias, scaling, p)
    found = layer.read_codes(weight, x)
    if found is None:
        return None
    codes, dtype = found
    return direct.call(x, codes, lora_A, lora_B, bias, scaling, p, dtype)
