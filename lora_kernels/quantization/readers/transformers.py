"""FP8 checkpoints in transformers' `FP8Linear`. Tried with transformers 5.24.

The forward rounds x to FP8 too. `weight` is float8_e4m3fn [N, K], and `weight_scale_inv` has a
scale for each block of rows and columns, or one for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .float8 import read_float8
from .form import Reading


def matches(layer: nn.Module) -> bool:
    """Return True for an FP8Linear, or a subclass, whose weight is not decoded."""
    weight, scale = (getattr(layer, name, None) for name in ("weight", "weight_scale_inv"))
    is_bytes = isinstance(weight, Tensor) and weight.element_size() == 1
    return is_bytes and isinstance(scale, Tensor)


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    weight, scale = layer.weight.detach(), layer.weight_scale_inv.detach()
    if (kind := type(layer).__name__) != "FP8Linear":  # FP8GroupedLinear, which splits x
        return f"{kind} may be more than a linear layer: FP8Linear is read"
    if weight.dtype is not torch.float8_e4m3fn:
        return f"FP8Linear's weight is {weight.dtype}: float8_e4m3fn is read"
    block = layer.block_size or weight.shape
    quantized = read_float8(weight, scale, tuple(block), torch.bfloat16)
    return Reading(quantized, layer.bias)
