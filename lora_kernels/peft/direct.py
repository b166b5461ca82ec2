"""The call of a fused layer in its common state, which is read in each call.

The common state is one active adapter of plain LoRA, over a base that does what its class says.
`read` returns None for every other state, and `plan.plan_linear` decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops import direct
from .adapters import casts_adapters
from .modules import LINEAR_FORWARD, library_forward

_FORWARDS = {cls: library_forward(cls) for cls in (nn.Dropout, nn.Identity)}


class State(NamedTuple):
    """The arguments of `ops.direct.call` that a layer holds, and the base layer's weight."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float


def read(layer: Any) -> State | None:
    """Return the layer's state, or None if it is not the common one."""
    cls, own = type(layer), layer.__dict__
    base_class = cls.base_class
    if base_class is None or base_class.forward is not cls.base_forward:
        return None
    if cls.peft_class.forward is not cls.peft_forward or nn.Linear.forward is not LINEAR_FORWARD:
        return None
    try:
        if own["_disable_adapters"] or own["merged_adapters"] or own["lora_variant"]:
            return None
        if own.get("mixed_batch") is not None:
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
        if not (type(lora_A) is type(lora_B) is nn.Linear and type(base) is base_class):
            return None
        if type(scaling) is not float or kind not in _FORWARDS:
            return None
        if kind.forward is not _FORWARDS[kind]:
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
        p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
        A, B = lora_A._parameters["weight"], lora_B._parameters["weight"]
        stored: Any = base._parameters
        return State(stored["weight"], cast(Tensor, A), cast(Tensor, B), stored["bias"], scaling, p)
    except KeyError:
        return None


def call(layer: Any, x: Tensor) -> Tensor | None:
    """Return what the layer's forward returns for x; None if the plan decides."""
    state = read(layer)
    if state is None or casts_adapters(layer, x.device.type, x.dtype):
        return None
    weight: Any = state.weight
    if weight is None or weight.requires_grad:
        return None
    dtype: torch.dtype | None = None
    if layer.reads_codes:
        found = layer.read_codes(weight, x)
        if found is None:
            return None
        weight, dtype = found
    return direct.call(x, weight, *state[1:], compute_dtype=dtype)
