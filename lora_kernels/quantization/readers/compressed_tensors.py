"""Linear layers of compressed-tensors with a weight alone quantized. Tried with 0.20.1.

`pack-quantized` (W4A16, W8A16) in int32 words, integers and float8_e4m3fn as they are, MXFP4 and
NVFP4. An nn.Linear has `weight_packed` or `weight`, `weight_scale` and, if it is asymmetric,
`weight_zero_point`, whose words are packed along the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..weight import QuantizedWeight
from .float8 import read_float8
from .form import Reading, read_integers, unpack

# What compressed-tensors adds to an nn.Linear.
PARAMETERS = (
    "weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape",
)  # fmt: skip
ATTRIBUTES = ("quantization_scheme", "quantization_status", "quantization_enabled", "forward")
_GROUPED = ("group", "tensor_group", "channel", "tensor")


def matches(layer: nn.Module) -> bool:
    """Return True for a compressed layer; its first forward would decode it."""
    scheme = vars(layer).get("quantization_scheme")
    is_compressed = vars(layer).get("quantization_status") == "compressed"
    return (
        type(layer) is nn.Linear and is_compressed and getattr(scheme, "weights", None) is not None
    )


def rounds_x(layer: Any) -> bool:
    """Return True if compressed-tensors rounds x, without a gradient, or y."""
    scheme = getattr(layer, "quantization_scheme", None)  # torch 2.8 cannot trace `vars`
    names = "input_activations", "output_activations"
    return any(getattr(scheme, name, None) is not None for name in names)


def read(layer: Any) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    if rounds_x(layer):
        return "compressed-tensors rounds its x or y too"
    args: Any = vars(layer)["quantization_scheme"].weights
    order = getattr(args.actorder, "value", args.actorder)
    if order not in (None, "weight", "static"):
        return f"its groups are of permuted columns (actorder={order!r})"
    weight = _read_4bit_float(layer, args) if _is_type(args, "float", 4) else _read(layer, args)
    return weight if isinstance(weight, str) else Reading(weight, layer._parameters.get("bias"))


def _is_type(args: Any, kind: str, *bits: int) -> bool:
    return getattr(args.type, "value", args.type) == kind and args.num_bits in bits


def _read_4bit_float(layer: nn.Module, args: Any) -> QuantizedWeight | str:
    # compressed-tensors decodes to bfloat16, whatever the model's dtype.
    packed, scale, outer = (layer._parameters.get(name) for name in PARAMETERS[:3])
    if packed is None or scale is None or not args.symmetric:
        return "4 bits of float without weight_packed and weight_scale"
    if args.group_size == 32 and outer is None:
        return QuantizedWeight.from_mxfp4(packed, scale)
    return QuantizedWeight.from_nvfp4(
        packed, scale, outer, global_op=None if outer is None else "divide"
    )


def _read(layer: nn.Module, args: Any) -> QuantizedWeight | str:
    packed, scale = (layer._parameters.get(name) for name in PARAMETERS[:2])
    weight, zero = (layer._parameters.get(name) for name in ("weight", "weight_zero_point"))
    strategy = getattr(args, "strategy", None)
    strategy = getattr(strategy, "value", strategy)
    if scale is None or (packed is None) == (weight is None) or "weight_g_idx" in layer._parameters:
        return "its parameters are not those of pack-quantized, int-quantized or float-quantized"
    if _is_type(args, "float", 8) and weight is not None:
        if weight.dtype is not torch.float8_e4m3fn or zero is not None:
            return f"its weight is {weight.dtype}: float8_e4m3fn without a zero point is read"
        N, K = weight.shape
        block = tuple(args.block_structure) if strategy == "block" else (1, args.group_size or K)
        return read_float8(weight.detach(), scale, block, scale.dtype)
    if not _is_type(args, "int", 4, 8) or strategy not in _GROUPED:
        return (
            f"{args.num_bits} bits of {args.type} by {strategy}: 4 and 8 of int by group are read"
        )
    bits, zeros = args.num_bits, None if zero is None else _rows(zero)
    if packed is not None:
        N, K = layer._parameters["weight_shape"].tolist()  # type: ignore[union-attr]
        q = unpack(packed, bits, dim=1)[:, :K].contiguous()
        if zero is not None and strategy in ("group", "channel"):
            zeros = unpack(zero, bits, dim=0)[:N].float() - (1 << bits - 1)
    elif weight is not None and weight.dtype is torch.int8 and bits == 8:
        q = weight.detach().view(torch.uint8) ^ 128
        N, K = q.shape
    else:
        return "its weight is neither packed nor int8"
    group = args.group_size if strategy in ("group", "tensor_group") else K
    middle = 1 << bits - 1  # codes and zero points are signed in the library
    zeros = middle if zeros is None else zeros.float() + middle
    return read_integers(q, bits, _rows(scale), zeros, group, scale.dtype)


def _rows(t: Tensor) -> Tensor:
    return t.detach().view(1, 1) if t.numel() == 1 else t.detach()
