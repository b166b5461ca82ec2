"""AWQ's layers in the GEMM layout, of gptqmodel and AutoAWQ. Tried with gptqmodel 7.7.

`qweight` is int32 [K, N/8], whose words have the columns 0 2 4 6 1 3 5 7 from the lowest bits on;
`qzeros` int32 [G, N/8] too, and `scales` [G, N].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .form import Reading, read_integers, unpack

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def matches(layer: nn.Module) -> bool:
    """Return True for an AWQ layer in the GEMM layout."""
    found = [getattr(layer, name, None) for name in ("qweight", "qzeros", "scales")]
    if not all(isinstance(t, Tensor) and t.dim() == 2 for t in found) or _bits(layer) is None:
        return False
    qweight, qzeros, scales = cast(list[Tensor], found)
    words = scales.shape[1] * _bits(layer) // 32
    return qweight.dtype is torch.int32 and qweight.shape[1] == qzeros.shape[1] == words


def _bits(layer: Any) -> Any:
    return getattr(layer, "w_bit", getattr(layer, "bits", None))


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    bits, scales = _bits(layer), layer.scales
    if bits != 4:
        return f"AWQ in {bits} bits: 4 are read"
    group = layer.group_size if layer.group_size > 0 else layer.qweight.shape[0]
    q, zeros = (
        unpack(words, 4, dim=1, order=_ORDER).t() for words in (layer.qweight, layer.qzeros)
    )
    weight = read_integers(q.contiguous(), 4, scales.t(), zeros, group, scales.dtype)
    return Reading(weight, getattr(layer, "bias", None))
