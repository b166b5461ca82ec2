"""LLM.int8() layers of bitsandbytes. Tried with bitsandbytes 0.50.

The forward rounds x to 8 bits too, but for columns with outliers. The weight is int8 [N, K] with
the largest magnitude of each row, which stands for 127.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .form import Reading, read_integers


def _parts(layer: Any) -> tuple[Any, Any]:
    """Return the codes and the rows' magnitudes, which the first forward moves to `state`."""
    holder = layer.weight if getattr(layer.weight, "SCB", None) is not None else layer.state
    return holder.CB, holder.SCB


def matches(layer: nn.Module) -> bool:
    """Return True for a Linear8bitLt that is quantized."""
    if not hasattr(layer, "state") or not hasattr(getattr(layer, "weight", None), "SCB"):
        return False
    return all(isinstance(t, Tensor) for t in _parts(layer))


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    codes, magnitude = _parts(layer)
    q, scale = codes.view(torch.uint8) ^ 128, magnitude.float().view(-1, 1) / 127
    weight = read_integers(q, 8, scale, 128, q.shape[1], torch.float16)
    return Reading(weight, layer.bias)
