"""The base layer of a PEFT layer: its kind and its weight."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..quantization import Weight4bit


def is_linear4bit(module: nn.Module) -> bool:
    """Return True for bitsandbytes' 4-bit linear, without importing bitsandbytes."""
    cls = type(module)
    names = ("Linear4bit", "LinearNF4", "LinearFP4")
    return cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in names


def is_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, GPT-2's linear layer, whose weight is [K, N]."""
    cls = type(module)
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"


def base_weight(base: nn.Module) -> Tensor:
    """Return a view of the base's weight as W [N, K]."""
    weight = cast(Tensor, base._parameters["weight"])
    return weight.t() if is_conv1d(base) else weight


def readable_weight(base: nn.Module, x: Tensor) -> tuple[Tensor | Weight4bit, torch.dtype | None]:
    """Return W of a base that can be read, and the dtype to compute in if W is 4-bit."""
    if is_linear4bit(base):
        from .base4bit import readable_weight4bit  # imports bitsandbytes, hence not at the top

        return readable_weight4bit(base, x)
    return base_weight(base), None
