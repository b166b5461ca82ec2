"""The weight of bitsandbytes' 4-bit linear; imported where there is one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from torch import Tensor, nn

from ..quantization import Weight4bit


class _Known(NamedTuple):
    """A weight and the tensors that it was made of. Not copied or pickled with its state."""

    key: tuple[object, ...]
    weight: Weight4bit

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class MergeLoss(NamedTuple):
    """‖W̃' − (W̃ + ΔW)‖ of a 4-bit weight W̃ into which ΔW was merged, which made it W̃'."""

    of_weight: float  # over ‖W̃ + ΔW‖
    of_adapter: float  # over ‖ΔW‖

    def __str__(self) -> str:
        return (
            f"rounding to 4 bits again moved the weight by {self.of_weight:.1%}, "
            f"{self.of_adapter:.2g} times what the adapter changes"
        )


def prepared(linear: Any, x: Tensor) -> tuple[Tensor | Weight4bit, torch.dtype | None]:
    """The base's weight, and the dtype in which its own forward would multiply this x.

    Dense for an x in float64, beside which no codes are decoded.

    The bytes are read where they are and stay as they are: bitsandbytes' forward, which in eval
    mode on a CPU repacks them for its kernel and loses their scales, is not called.
    """
    if not linear.compute_type_is_set:  # as its own forward would
        linear.set_compute_type(x)
        linear.compute_type_is_set = True
    if x.dtype is torch.float64:
        return weight4bit(linear).dequantize(x.dtype), None
    return weight4bit(linear), linear.compute_dtype


def weight4bit(linear: Any) -> Weight4bit:
    """The base's weight, made once for as long as the tensor and its state are the same."""
    weight, state = linear._parameters["weight"], quant_state(linear)
    if torch.compiler.is_compiling():  # which compares no addresses, and makes it once itself
        return Weight4bit.from_bitsandbytes((weight, state))
    key = (weight.data_ptr(), state.absmax.data_ptr(), state.absmax.dtype)
    known: _Known | None = getattr(state, "_lora_kernels", None)
    if known is None or known.key != key:
        with torch.inference_mode(False):  # whose views could not be saved for a backward
            known = _Known(key, Weight4bit.from_bitsandbytes((weight, state)))
        state._lora_kernels = known
    return known.weight


def quant_state(linear: Any) -> Any:
    """The weight's, or the module's own where FSDP2 hands the codes over as a plain parameter, as
    bitsandbytes' own forward has it; None where there is none."""
    weight = linear._parameters["weight"]
    return linear.quant_state if type(weight) is nn.Parameter else weight.quant_state


def unreadable_4bit(linear: Any, device: torch.device) -> str | None:
    """Why the weight of a `Linear4bit` cannot be read; None where it can."""
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
        weight4bit(linear)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
