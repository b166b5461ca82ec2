"""One call of each of the functions whose rows of x have an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import lora_experts_linear, lora_linear, multi_lora_linear

FUNCTIONS = ("lora_linear", "multi_lora_linear", "lora_experts_linear")
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def call(
    function: str,
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return y of the function: two equal adapters, or experts, share the rows of x."""
    if function == "lora_linear":
        return lora_linear(x, W, A, B, scaling, bias, **options)
    if function == "multi_lora_linear":
        index = (torch.arange(x.numel() // x.shape[-1]) % 2).view(x.shape[:-1])
        As, Bs = [A, A.clone()], [B, B.clone()]
        return multi_lora_linear(x, W, As, Bs, index, scaling, bias, **options)
    offsets = torch.tensor([len(x) // 3, len(x)])
    W, A, B = (t.expand(2, *t.shape) for t in (W, A, B))
    bias = None if bias is None else bias.expand(2, -1)
    return lora_experts_linear(x, W, A, B, offsets, scaling, bias, **options)
