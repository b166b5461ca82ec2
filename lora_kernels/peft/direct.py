"""The call of a fused layer in its common state, and the block of several layers, from their state.

Each call reads the state anew. The common state is one active LoRA adapter without a variant, over
a base whose call has neither hooks nor a replaced forward. A hook by which accelerate would move
tensors to the device that they are on is none. For every other state `read` returns
None, and the general reader of `read.py` reads the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Parameter

from ..backends import library
from ..core.record import PLAIN, CodePath, Record, path_reason
from ..ops import blocks, direct
from ..quantization import QuantizedWeight
from ..quantization.tensor import QuantizedTensor
from . import read as reader
from .adapters import add_bias, casts_adapters, gate_of, lora_bias
from .base import readable_weight
from .modules import LINEAR_FORWARD, keeps_forward, original_forward, patched_reason

_DROPOUT_FORWARDS = {cls: original_forward(cls) for cls in (Dropout, Identity)}


# The first six fields of a `Record`: the base's weight, lora_A, lora_B, the base's bias, the
# scaling, and this call's dropout probability. A `Record` would add a third to the time of `read`.
State = tuple[Any, Tensor, Tensor, Tensor | None, float, float]
# The operands that a block of PEFT's layers takes: `make_block` computes a bias and a gate of them.
BLOCK = CodePath("a block", (blocks.BLOCK.taken[0] | {"scaling", "lora_bias", "ranknum"},))


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
        ):  # fmt: skip
            return None
        if (
            "forward" in base_dict or "forward" in A_dict
            or "forward" in B_dict or "forward" in drop_dict
        ) and not _keep_forwards(base, lora_A, lora_B, dropout):  # fmt: skip
            return None
        B_params = B_dict["_parameters"]
        if B_params["bias"] is not None:
            return None
        p = dropout.p if kind is Dropout and dropout.training else 0.0
        base_params, A = base_dict["_parameters"], A_dict["_parameters"]["weight"]
        return base_params["weight"], A, B_params["weight"], base_params["bias"], scaling, p
    except KeyError:
        return None


def _keep_forwards(base: Any, lora_A: Any, lora_B: Any, dropout: Any) -> bool:
    """Return True if the modules compute their classes' forwards for an x on their one device."""
    weight, A, B = (module._parameters["weight"] for module in (base, lora_A, lora_B))
    if weight is None or not weight.device == A.device == B.device:
        return False
    return all([keeps_forward(m, A.device) for m in (base, lora_A, lora_B, dropout)])


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
    elif type(weight) is QuantizedTensor:
        if x.dtype is torch.float64:
            return None
        weight = weight.quantized.codes
    if x.is_cpu and not library.emulates_gpu:
        return direct.call(x, weight, lora_A, lora_B, bias, scaling, p, dtype)
    casts = layer.casts_adapters and casts_adapters(layer, x.device.type, x.dtype, _rows(x))
    record = Record(weight, lora_A, lora_B, bias, scaling, p)
    return blocks.call_linear(x, record, dtype, casts, True)


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

    activation: of a gated MLP, whose layers are gate, up and down; "" for other layers.
    """
    states: list[tuple[Any, ...]] = []
    records: list[Record] = []
    compute_dtypes: list[torch.dtype | None] = []
    casts, is_plain, dtype = False, True, x.dtype
    for layer in layers:
        state = read(layer)
        gate = compute_dtype = None
        if state is not None:
            weight, lora_A, lora_B, bias, scaling, p = state
            if p:
                return None
            if (
                is_plain
                and type(weight) is type(lora_A) is type(lora_B) is Parameter
                and weight.dtype is lora_A.dtype is lora_B.dtype is dtype
                and not (weight.requires_grad or (bias is not None and bias.requires_grad))
                and not (layer.casts_adapters or lora_A.is_inference())
            ):  # Skips the checks below, a sixth of an MLP's Python opcodes here (counted).
                states.append(state)
                records.append(Record(*state))
                compute_dtypes.append(None)
                continue
            if weight is None:
                return None
            if layer.reads_codes:
                codes = layer.read_codes(weight, x)
                if codes is None:
                    return None
                weight, compute_dtype = codes
            elif type(weight) is QuantizedTensor:
                weight = weight.quantized.codes
            states.append(state)
        else:
            record = read_in_block(layer, x.device, x.dtype)
            if isinstance(record, str):
                return None
            _, lora_A, lora_B, bias, factor, _ = record[:PLAIN]
            bias, scaling = add_bias(bias, lora_bias((record,))), 1.0
            if record.rank_gate is not None or isinstance(factor, Tensor):
                gate = gate_of(record)
            else:
                scaling = factor
            weight, compute_dtype = readable_weight(layer.base_layer, x)
            weight = weight.codes if isinstance(weight, QuantizedWeight) else weight
            states.append(record)
        is_plain = False
        if lora_A.is_inference():
            return None
        if layer.casts_adapters and casts_adapters(layer, x.device.type, x.dtype, _rows(x)):
            if len(states) > 1 and not casts:
                return None
            casts = True
        elif casts:
            return None
        records.append(Record(weight, lora_A, lora_B, bias, scaling, rank_gate=gate))
        compute_dtypes.append(compute_dtype)
    block = blocks.plain_block(x, records, activation) if is_plain else None
    if block is None:
        block = blocks.make_block(x, records, compute_dtypes, casts, True, activation)
    return None if block is None else (block, states)


def read_state(layer: Any, x: Tensor) -> tuple[Any, ...] | None:
    """Return the state of a layer in a block: a `State`, else a `Record`; None if no block may
    compute the layer."""
    state = read(layer)
    if state is not None:
        return None if state[5] else state
    record = read_in_block(layer, x.device, x.dtype)
    return None if isinstance(record, str) else record


def member_reason(layer: Any) -> str | None:
    """Return why a block may not replace the layer's own call, whatever its state."""
    if not getattr(type(layer), "fits_blocks", False):  # wrappers pass on the instance's attributes
        return f"it is a {type(layer).__name__}"
    return (patched_reason(layer) or "a hook sits on it") if is_hooked(layer) else None


def read_in_block(layer: Any, device: torch.device, x_dtype: torch.dtype) -> Record | str:
    """Return a layer's record, or the reason (a string) why no block may compute the layer."""
    if (reason := member_reason(layer)) is not None:
        return reason
    if layer.mixed_batch is not None:
        return "its last call named its adapters"
    records = reader.read(layer, device, x_dtype)
    if isinstance(records, str):
        return records
    return path_reason(records, BLOCK) or records[0]
