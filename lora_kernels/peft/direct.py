"""The call of a fused layer in its common state, and the block of several layers, from their state.

Each call reads the state anew. The common state is one active LoRA adapter without a variant, over
a base whose call has neither hooks nor a replaced forward. For every other state `read` returns
None. `plan.plan_linear` then decides how a layer is called, and whether a block may contain it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Parameter
from transformers.pytorch_utils import Conv1D

from ..backends import library
from ..backends.eager.blocks import Layer
from ..ops import blocks, direct
from ..quantization import Weight4bit
from ..quantization.tensor4bit import Tensor4bit
from .adapters import RANK_GATE, casts_adapters, dropout_p, gate_of, operand_reason, weight_of
from .base import readable_weight
from .modules import LINEAR_FORWARD, library_forward, patched_reason
from .plan import plan_linear

_DROPOUT_FORWARDS = {cls: library_forward(cls) for cls in (Dropout, Identity)}


# The base's weight, lora_A, lora_B, the base's bias, the scaling, and this call's dropout
# probability. Building a NamedTuple instead would add a third to the time of `read`.
State = tuple[Any, Tensor, Tensor, Tensor | None, float, float]


def read(layer: Any) -> State | None:
    """Return the layer's state, or None if it is not the common state."""
    cls, attributes = type(layer), layer.__dict__
    base_class = cls.base_class
    if base_class is None or base_class.forward is not cls.base_forward:
        return None
    if cls.peft_class.forward is not cls.peft_forward or Linear.forward is not LINEAR_FORWARD:
        return None
    try:
        if (
            attributes["_disable_adapters"]
            or attributes["merged_adapters"]
            or attributes["lora_variant"]
        ):
            return None
        if "mixed_batch" in attributes and attributes["mixed_batch"] is not None:
            return None
        name = attributes["_active_adapter"]
        if type(name) is list:
            if len(name) != 1:
                return None
            (name,) = name
        modules, scaling = attributes["_modules"], attributes["scaling"][name]
        lora_A = modules["lora_A"]._modules[name]
        lora_B = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        base = modules["base_layer"]
        kind = type(dropout)
        if not (type(lora_A) is type(lora_B) is Linear and type(base) is base_class):
            return None
        if type(scaling) is not float or kind.forward is not _DROPOUT_FORWARDS.get(kind):
            return None
        base_dict, drop_dict = base.__dict__, dropout.__dict__
        A_dict, B_dict = lora_A.__dict__, lora_B.__dict__
        if (
            base_dict["_forward_hooks"] or base_dict["_forward_pre_hooks"]
            or base_dict["_backward_hooks"] or base_dict["_backward_pre_hooks"]
            or A_dict["_forward_hooks"] or A_dict["_forward_pre_hooks"]
            or A_dict["_backward_hooks"] or A_dict["_backward_pre_hooks"]
            or B_dict["_forward_hooks"] or B_dict["_forward_pre_hooks"]
            or B_dict["_backward_hooks"] or B_dict["_backward_pre_hooks"]
            or drop_dict["_forward_hooks"] or drop_dict["_forward_pre_hooks"]
            or drop_dict["_backward_hooks"] or drop_dict["_backward_pre_hooks"]
            or "forward" in base_dict or "forward" in A_dict
            or "forward" in B_dict or "forward" in drop_dict
        ):  # fmt: skip
            return None
        B_params = B_dict["_parameters"]
        if B_params["bias"] is not None:
            return None
        p = dropout.p if kind is Dropout and dropout.training else 0.0
        base_params, A = base_dict["_parameters"], A_dict["_parameters"]["weight"]
        return base_params["weight"], A, B_params["weight"], base_params["bias"], scaling, p
    except KeyError:
        return None


def call(layer: Any, x: Tensor) -> Tensor | None:
    """Return the result of the layer's forward for x; None if the general way must compute it."""
    state = read(layer)
    if state is None:
        return None
    weight, lora_A, lora_B, bias, scaling, p = state
    if weight is None or weight.requires_grad:
        return None
    dtype = None
    if layer.reads_codes:
        codes = layer.read_codes(weight, x)
        if codes is None:
            return None
        weight, dtype = codes
    elif type(weight) is Tensor4bit:
        if x.dtype is torch.float64:
            return None
        weight = weight.weight4bit.codes
    if x.is_cpu and not library.emulates_gpu:
        return direct.call(x, weight, lora_A, lora_B, bias, scaling, p, dtype)
    casts = layer.casts_adapters and casts_adapters(layer, x.device.type, x.dtype, _rows(x))
    operands = Layer(weight, lora_A, lora_B, bias, scaling)
    return blocks.call_linear(x, operands, dtype, p, casts, True)


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def is_hooked(module: Any) -> bool:
    """Return True if the module has hooks or a replaced forward."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_pre_hooks"]
        or attributes["_forward_hooks"]
        or attributes["_backward_pre_hooks"]
        or attributes["_backward_hooks"]
        or ("forward" in attributes and patched_reason(module) is not None)
    )


def make_block(
    layers: Sequence[Any], x: Tensor, activation: str = ""
) -> tuple[blocks.Block, list[tuple[Any, ...]]] | None:
    """Return the block that computes the layers for x, and the layers' states; None if none can.

    The loop takes plain layers alone, in few Python calls. `_make_any_block` takes all others.

    activation: of a gated MLP, whose layers are gate, up and down; "" for other layers.
    """
    dtype, states, operands = x.dtype, [], []
    for layer in layers:
        state = read(layer)
        if state is None:
            break
        weight, lora_A, lora_B, bias, scaling, p = state
        if (
            p
            or not (type(weight) is type(lora_A) is type(lora_B) is Parameter)
            or not (weight.dtype is lora_A.dtype is lora_B.dtype is dtype)
            or weight.requires_grad
            or not (bias is None or (bias.dtype is dtype and not bias.requires_grad))
            or layer.casts_adapters
        ):
            break
        states.append(state)
        operands.append(Layer(weight, lora_A, lora_B, bias, scaling))
    else:
        block = blocks.plain_block(x, operands, activation)
        if block is not None:
            return block, states
    return _make_any_block(layers, x, activation)


def read_state(layer: Any, x: Tensor) -> tuple[Any, ...] | None:
    """Return the `State` of a layer with one adapter; None if no block may compute the layer.

    If `read` returns None, the state is that of `planned_state`. It has two elements more: lora_B's
    bias, and KaSA's factors.
    """
    state = read(layer)
    if state is not None:
        return None if state[5] else state
    planned = planned_state(layer, x.device, x.dtype)
    return None if isinstance(planned, str) else planned


def planned_state(layer: Any, device: torch.device, x_dtype: torch.dtype) -> tuple[Any, ...] | str:
    """Return a layer's state by its plan, or the reason (a string) why no block may compute it."""
    if not getattr(type(layer), "fits_blocks", False):  # wrappers pass on the instance's attributes
        return f"it is a {type(layer).__name__}"
    if is_hooked(layer):
        return patched_reason(layer) or "a hook sits on it"
    if layer.mixed_batch is not None:
        return "its last call named its adapters"
    adapters, reason, base_reason, _ = plan_linear(layer, device, x_dtype)
    reason = reason or base_reason or operand_reason(layer, adapters, (RANK_GATE,), "a block")
    if reason is not None:
        return reason
    if len(adapters) > 1:
        return "several adapters are active"
    _, lora_A, lora_B, scaling, dropout, diag, _ = adapters[0]
    if p := dropout_p(dropout):
        return f"its dropout {p} is active"
    if type(layer.base_layer) is Conv1D:
        return "its weight is stored as [K, N]"
    A, B, base = weight_of(lora_A), weight_of(lora_B), layer.base_layer._parameters
    return base["weight"], A, B, base["bias"], scaling, 0.0, lora_B._parameters["bias"], diag


def _make_any_block(
    layers: Sequence[Any], x: Tensor, activation: str
) -> tuple[blocks.Block, list[tuple[Any, ...]]] | None:
    """Return what `make_block` does, for layers in any state."""
    states, operands, compute_dtypes = [], [], []
    for layer in layers:
        state = read_state(layer, x)
        if state is None:
            return None
        weight, lora_A, lora_B, bias, scaling, _, *others = state
        compute_dtype, gate = None, None
        if weight is None or lora_A.is_inference():
            return None
        if others:
            lora_bias, diag = others
            if lora_bias is not None:
                scaled_bias = scaling * lora_bias
                bias = scaled_bias if bias is None else bias + scaled_bias
            if isinstance(scaling, Tensor) or diag is not None:
                gate, scaling = gate_of(lora_A, scaling, diag), 1.0
            weight, compute_dtype = readable_weight(layer.base_layer, x)
            weight = weight.codes if isinstance(weight, Weight4bit) else weight
        elif layer.reads_codes:
            codes = layer.read_codes(weight, x)
            if codes is None:
                return None
            weight, compute_dtype = codes
        elif type(weight) is Tensor4bit:
            weight = weight.weight4bit.codes
        states.append(state)
        operands.append(Layer(weight, lora_A, lora_B, bias, scaling, gate))
        compute_dtypes.append(compute_dtype)
    casts = [casts_adapters(layer, x.device.type, x.dtype, _rows(x)) for layer in layers]
    if any(casts) is not all(casts):
        return None
    block = blocks.make_block(x, operands, compute_dtypes, casts[0], True, 0.0, activation)
    return None if block is None else (block, states)
