"""The weight of bitsandbytes' 4-bit linear. Imports bitsandbytes, so it is imported on demand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from torch import Tensor, nn

from ..quantization import QuantizedWeight
from ..quantization.bitsandbytes import cached_weight
from .modules import original_forward

_FORWARD = original_forward(Linear4bit)


class MergeLoss(NamedTuple):
    """The relative error ‖W̃' − (W̃ + ΔW)‖ of merging ΔW into a 4-bit weight W̃, giving W̃'."""

    relative_to_weight: float  # error / ‖W̃ + ΔW‖
    relative_to_adapter: float  # error / ‖ΔW‖

    def __str__(self) -> str:
        return (
            f"rounding to 4 bits again moved the weight by {self.relative_to_weight:.1%}, "
            f"{self.relative_to_adapter:.2g} times what the adapter changes"
        )


def readable_quantized_weight(
    linear: Any, x: Tensor
) -> tuple[Tensor | QuantizedWeight, torch.dtype | None]:
    """Return the base's weight, and the dtype in which the base's forward would multiply this x.

    The weight is decoded to a dense tensor if x is float64, because no kernel decodes to float64.

    The packed codes are read in place. bitsandbytes' forward is not called, because in eval mode on
    a CPU it repacks the codes for its kernel and loses their scales.
    """
    if not linear.compute_type_is_set:  # bitsandbytes' forward sets it too
        linear.set_compute_type(x)
        linear.compute_type_is_set = True
    if x.dtype is torch.float64:
        return quantized_weight(linear).dequantize(x.dtype), None
    return quantized_weight(linear), linear.compute_dtype


def quantized_weight(linear: Any) -> QuantizedWeight:
    """Return the base's weight, cached until its tensor or quantization state changes."""
    return cached_weight(linear._parameters["weight"], quant_state(linear))


def quant_state(linear: Any) -> Any:
    """Return the quantization state of the weight; None if the weight is not quantized.

    If FSDP2 has replaced the weight by a plain parameter, the state is the module's, as in
    bitsandbytes' forward.
    """
    weight = linear._parameters["weight"]
    return linear.quant_state if type(weight) is nn.Parameter else weight.quant_state


def unreadable_4bit(linear: Any, device: torch.device) -> str | None:
    """Return why the weight of a `Linear4bit` cannot be read; None if it can."""
    if type(linear).forward is not _FORWARD:
        return f"{type(linear).__name__}.forward was replaced"
    weight = linear._parameters.get("weight")
    if type(weight) is not Params4bit and type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.device != device:
        return f"its weight is on {weight.device}, x on {device}"
    if quant_state(linear) is None:
        return "its weight is not quantized yet"
    if linear.compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return f"its compute_dtype is {linear.compute_dtype}"
    try:
        quantized_weight(linear)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
