"""Weights in float8_e4m3fn, as several libraries keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codebooks
from ..weight import QuantizedWeight
from .form import build


def read_float8(
    weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight whose blocks of rows and columns have a scale each.

    Args:
        weight: float8_e4m3fn [N, K].
        scale: [⌈N/rows⌉, ⌈K/columns⌉], or one element for all.
        block: rows and columns of a block; the last of each may be short.
        dtype: of the decoded weight.

    >>> weight = torch.ones(2, 16).to(torch.float8_e4m3fn)
    >>> read_float8(weight, torch.tensor([[2.0], [3.0]]), (1, 16), torch.float32).dequantize()[:, 0]
    tensor([2., 3.])
    """
    N, K = weight.shape
    rows, columns = block
    scale = scale.float()
    if scale.numel() == 1:
        scale, columns = scale.view(1, 1), K
    elif rows > 1:
        scale = scale.repeat_interleave(rows, 0)[:N]
    q = weight.contiguous().view(torch.uint8)
    return build(q, codebooks.e4m3(q.device), scale, None, columns, dtype)
