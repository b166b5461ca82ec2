"""GPTQ's layers of gptqmodel and AutoGPTQ. Tried with gptqmodel 7.7.

`qweight` is int32 [K·bits/32, N], `scales` [G, N], `qzeros` int32 [G, N·bits/32], and `g_idx` the
group of each column. Files of version 1 store zero - 1; `qzero_format()` says what is in memory.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .form import Reading, read_integers, unpack


def matches(layer: nn.Module) -> bool:
    """Return True for a GPTQ layer."""
    found = (getattr(layer, name, None) for name in ("qweight", "qzeros", "scales"))
    if not all(isinstance(t, Tensor) for t in found) or not hasattr(layer, "bits"):
        return False
    qweight, scales = cast(Tensor, layer.qweight), cast(Tensor, layer.scales)
    return qweight.dtype is torch.int32 and qweight.shape[-1] == scales.shape[-1]


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    bits, g_idx = layer.bits, getattr(layer, "g_idx", None)
    if bits not in (4, 8):
        return f"GPTQ in {bits} bits: 4 and 8 are read"
    K, N = layer.qweight.shape[0] * 32 // bits, layer.qweight.shape[1]
    group = layer.group_size if layer.group_size > 0 else K
    columns = torch.arange(K, device=layer.scales.device) // group
    if g_idx is not None and g_idx.numel() and not torch.equal(g_idx.to(columns.dtype), columns):
        return "GPTQ with act order (desc_act): its groups are of permuted columns"
    zeros = unpack(layer.qzeros, bits, dim=1)[:, :N]
    version = layer.qzero_format() if hasattr(layer, "qzero_format") else 1
    if version == 1:
        zeros = zeros + 1 & (1 << bits) - 1
    q = unpack(layer.qweight, bits, dim=0).t().contiguous()
    scales = layer.scales
    weight = read_integers(q, bits, scales.t(), zeros.t(), group, scales.dtype)
    return Reading(weight, getattr(layer, "bias", None))
