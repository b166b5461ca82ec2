"""PEFT's LoRA layer over bitsandbytes' 4-bit linear; imported where there is one."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from ..quantization import Weight4bit
from .linear import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's LoRA layer of a model that transformers has loaded in 4 bits."""


def prepared(linear: Any, x: Tensor) -> tuple[Weight4bit, torch.dtype | None]:
    """The base's weight, and the dtype in which its own forward would multiply this x.

    The bytes are read where they are and stay as they are: bitsandbytes' forward, which in eval
    mode on a CPU repacks them for its kernel and loses their scales, is not called.
    """
    if not linear.compute_type_is_set:  # as its own forward would
        linear.set_compute_type(x)
        linear.compute_type_is_set = True
    return weight4bit(linear), linear.compute_dtype


def weight4bit(linear: Any) -> Weight4bit:
    """The base's weight, made once for as long as the tensor and its state are the same."""
    weight = linear._parameters["weight"]
    state = weight.quant_state
    key = (weight.data_ptr(), state.absmax.data_ptr())
    known: tuple[Any, Any, Weight4bit] | None = getattr(state, "_lora_kernels", None)
    if known is None or known[:2] != (key, state.absmax.dtype):
        known = key, state.absmax.dtype, Weight4bit.from_bitsandbytes((weight, state))
        state._lora_kernels = known
    return known[2]


def unreadable_4bit(linear: Any, device: torch.device) -> str | None:
    """Why the weight of a `Linear4bit` cannot be read; None where it can."""
    weight = linear._parameters.get("weight")
    if type(weight) is not Params4bit:
        return f"its weight is a {type(weight).__name__}"
    if weight.device != device:
        return f"its weight is on {weight.device}, x on {device}"
    if weight.quant_state is None:
        return "its weight is not quantized yet"
    try:
        weight4bit(linear)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
