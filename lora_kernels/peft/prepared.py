"""The guards of a fused layer's prepared call for one adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import Guard
from ..layers.cache import CallCache, PreparedForward
from ..ops.linear import layouts
from ..quantization import Weight4bit
from .adapters import Adapter, dropout_p, weight_of
from .modules import HOOKS, LINEAR_FORWARD, hooks_of, is_conv1d, is_linear4bit


def prepare_forward(
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

    called: tuple[nn.Module, ...] = (base, lora_A, lora_B, dropout)
    kinds = ("base_layer", "lora_A", "lora_B", "lora_dropout")
    entries: list[tuple[dict[str, Any], str]] = [
        *((modules, kind) for kind in kinds),
        *((modules[kind].__dict__, "_modules") for kind in kinds[1:]),
        # The layer may lack an active adapter now and get it later.
        *((modules["lora_A"]._modules, active) for active in layer.active_adapters),
        *((modules[kind]._modules, name) for kind in ("lora_B", "lora_dropout")),
        (layer.scaling, name),
        (layer.lora_variant, name),
        *((module.__dict__, each) for module in called for each in ("forward", "_parameters")),
        *((module.__dict__, each) for module in called for each in HOOKS),
        (base._parameters, "weight"),
        (lora_A._parameters, "weight"),
        (lora_B._parameters, "weight"),
        (lora_B._parameters, "bias"),
    ]
    codes: list[Tensor] = []
    if four_bit:
        state = stored.quant_state
        entries += [
            (base.__dict__, "compute_dtype"),
            (base.__dict__, "compute_type_is_set"),
            (stored.__dict__, "quant_state"),
            *((vars(state), each) for each in ("absmax", "code", "offset", "state2")),
            *((vars(state), each) for each in ("blocksize", "quant_type")),
        ]
        codes = [state.code]  # which a `Weight4bit` holds by views
        if state.nested:
            entries += [(vars(state.state2), each) for each in ("absmax", "code", "blocksize")]
            codes.append(state.state2.code)
    guards = [
        *(Guard(entry, key, entry.get(key)) for entry, key in entries),
        # A class changes when a parameter is parametrized.
        *(Guard(each, type, type(each)) for each in (*called, A, B, stored)),
        Guard(nn.Linear, "forward", LINEAR_FORWARD),
        Guard(layer.peft_class, "forward", type(layer).peft_forward),
        Guard(type(base), "forward", type(base).forward),
        Guard(type(dropout), "forward", type(dropout).forward),
        Guard(stored, Tensor.data_ptr, stored.data_ptr()),
        Guard(stored, "requires_grad", stored.requires_grad),
        *(Guard(each, Tensor.data_ptr, each.data_ptr()) for each in codes),
    ]
    cache, p = CallCache(), dropout_p(dropout)
    bias = base._parameters["bias"]
    cache.renew(x, bias, (weight, A, B), (scaling, compute_dtype, p))
    return PreparedForward(
        cache=cache,
        tensors=(weight, A, B),
        scaling=scaling,
        compute_dtype=compute_dtype,
        dropout=dropout if type(dropout) is nn.Dropout else None,
        parameters=base._parameters,
        x_dtype=x.dtype,
        device=None if x.is_cpu else x.device,
        layouts=layouts(A, B, bias, weight),
        attributes=(
            ("_active_adapter", copy.copy(layer._active_adapter)),
            ("_disable_adapters", False),
            ("merged_adapters", []),
            ("mixed_batch", None),
            ("_modules", modules),
            ("scaling", layer.scaling),  # rescale_adapter_scale replaces the dictionary
            ("lora_variant", layer.lora_variant),
        ),
        guards=tuple(zip(*guards, strict=True)),
        hooks=tuple(hooks for module in called for hooks in hooks_of(module)),
    )
