"""HQQ's layers. Tried with hqq 0.2.8.

`W_q` has groups as rows; below 8 bits a byte has codes of several parts of the rows, the first in
the highest bits. The zero is a fraction, so that the shift is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .form import Reading, read_integers

_BITS = (8, 4, 2, 1)


def matches(layer: nn.Module) -> bool:
    """Return True for an HQQLinear that holds its codes."""
    has_codes = isinstance(getattr(layer, "W_q", None), Tensor)
    return has_codes and isinstance(getattr(layer, "meta", None), dict)


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    packed, meta = layer.W_q, layer.meta
    bits, (N, K) = meta["nbits"], meta["shape"]
    if bits not in _BITS:
        return f"HQQ in {bits} bits: 1, 2, 4 and 8 are read"
    if meta["axis"] != 1:
        return "HQQ's axis=0: its groups go down the columns. Quantize with axis=1"
    if meta.get("view_as_float"):
        packed = packed.view(meta["unpack_view_dtype"])
    dtype = meta.get("compute_dtype", torch.float16)
    scale, zero = (_parameter(meta, name).view(N, -1) for name in ("scale", "zero"))
    q = _codes(packed, bits).view(N, K)
    group = meta["group_size"] or K
    return Reading(read_integers(q, bits, scale, zero, group, dtype), getattr(layer, "bias", None))


def _codes(packed: Tensor, bits: int) -> Tensor:
    shifts, mask = range(8 - bits, -1, -bits), (1 << bits) - 1
    return torch.cat([packed >> shift & mask for shift in shifts]).to(torch.uint8)


def _parameter(meta: dict[str, Any], name: str) -> Tensor:
    """Return scales or zeros, which may be quantized themselves, or stored together."""
    if "zero_scale" in meta:
        found: Tensor = meta["zero_scale"][0 if name == "zero" else 1]
    else:
        found = meta[f"{name}_q"] if meta.get(f"quant_{name}") else meta[name]
    if not meta.get(f"quant_{name}"):
        return found
    of = meta[f"meta_{name}"]
    codes = _codes(found, of["nbits"]) if of["packing"] else found
    decoded: Tensor = (codes.float() - of["zero"].float()) * of["scale"].float()
    return decoded.view(*of["shape"])
