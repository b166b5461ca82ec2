"""The base layer of a PEFT layer: its kind and its weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..quantization import QuantizedWeight
from ..quantization.tensor import QuantizedTensor, read_tensor
from .modules import is_conv1d, is_linear4bit


def missing_layers(model: nn.Module, remedy: str) -> ValueError:
    """Return the error for a model without LoRA layers. It names a PEFT model's method."""
    configs = getattr(model, "peft_config", None)
    methods = sorted({config.peft_type.value for config in configs.values()}) if configs else []
    if methods:
        got, want = (
            f"a PEFT model of {' and '.join(methods)} without LoRA layers",
            "LORA or ADALORA",
        )
    else:
        got, want = f"{type(model).__name__} without LoRA layers", f"a PEFT model: {remedy}"
    return ValueError(f"model: got {got}, want {want}")


def base_weight(base: nn.Module) -> Tensor:
    """Return a view of the base's weight as W [N, K]."""
    weight = cast(Tensor, base._parameters["weight"])
    return weight.t() if is_conv1d(base) else weight


def readable_weight(
    base: nn.Module, x: Tensor
) -> tuple[Tensor | QuantizedWeight, torch.dtype | None]:
    """Return W of a base that can be read, and the dtype to compute in if W is 4-bit."""
    if is_linear4bit(base):
        from .base4bit import (
            readable_quantized_weight,  # imports bitsandbytes, hence not at the top
        )

        return readable_quantized_weight(base, x)
    weight = base_weight(base)
    if isinstance(weight, QuantizedTensor):
        # No kernel decodes to float64.
        return weight.dequantize() if x.dtype is torch.float64 else read_tensor(weight), None
    return weight, None
