"""Linear layers whose weight is a tensor of torchao. Tried with torchao 0.18.

`Int8Tensor`, `Float8Tensor`, `IntxUnpackedToInt8Tensor`, MXFP4's and NVFP4's; `Int4Tensor` by its
layout. A tensor that quantizes x too says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..weight import QuantizedWeight
from .float8 import read_float8
from .form import Reading, build, read_integers


def matches(layer: nn.Module) -> bool:
    """Return True for an nn.Linear with such a weight."""
    cls = type(layer._parameters.get("weight"))
    is_known = cls.__module__.startswith("torchao.") and cls.__name__ in _READERS
    return is_known and type(layer) is nn.Linear


def read(layer: nn.Module) -> Reading | str:
    """Return the weight, or why it cannot be read."""
    weight: Any = layer._parameters["weight"]
    if any(getattr(weight, name, None) is not None for name in _ROUNDING):
        return f"its {type(weight).__name__} rounds or scales x too"
    if weight.dim() != 2:
        return f"its {type(weight).__name__} has {weight.dim()} dimensions"
    found = _READERS[type(weight).__name__](weight)
    return found if isinstance(found, str) else Reading(found, layer._parameters.get("bias"))


def is_4bit_float(layer: nn.Module) -> bool:
    """Return True for a weight in MXFP4 or NVFP4, into which PEFT cannot merge."""
    return type(layer._parameters.get("weight")).__name__ in ("MXTensor", "NVFP4Tensor")


_ROUNDING = ("act_quant_kwargs", "activation_quantization", "act_pre_scale", "act_quant_scale")


def _block(weight: Any) -> tuple[int, int]:
    rows, columns = weight.block_size or weight.shape
    return min(rows, weight.shape[0]), min(columns, weight.shape[1])


def _read_int8(weight: Any) -> QuantizedWeight | str:
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    kept = 4 if bits <= 4 else 8
    middle = 1 << (kept - 1)
    (rows, columns), zero = _block(weight), weight.zero_point
    if rows not in (1, len(weight.qdata)):
        return f"its blocks have {rows} rows"
    scale = weight.scale.view(-1, weight.shape[1] // columns)
    zero = middle if zero is None else zero.float().view_as(scale) + middle
    if kept == 4:
        q = (weight.qdata + middle).view(torch.uint8)
    else:
        q = weight.qdata.view(torch.uint8) ^ 128
    return read_integers(q, kept, scale, zero, columns, weight.dtype)


def _read_float8(weight: Any) -> QuantizedWeight | str:
    if weight.qdata.dtype is not torch.float8_e4m3fn:
        return f"its Float8Tensor is of {weight.qdata.dtype}: float8_e4m3fn is read"
    return read_float8(weight.qdata, weight.scale, _block(weight), weight.dtype)


def _read_int4(weight: Any) -> QuantizedWeight | str:
    """Signed codes, the even element in the low nibble; zero_point is the shift."""
    q = weight.qdata.view(torch.uint8)
    q = torch.stack([q & 15, q >> 4], -1).flatten(1) ^ 8
    code = torch.arange(-8.0, 8.0, device=q.device)
    scale, shift = weight.scale.t(), weight.zero_point.t()
    return build(q, code, scale, shift, weight.block_size[-1], weight.dtype)


def _scales(weight: Any) -> Tensor:
    scale: Tensor = weight.scale.detach()
    if weight.is_swizzled_scales:
        return unswizzle(scale, weight.shape[0], weight.shape[1] // weight.block_size)
    return scale


def _read_mx(weight: Any) -> QuantizedWeight | str:
    if str(weight.elem_dtype) != "torch.float4_e2m1fn_x2":
        return f"its MXTensor is of {weight.elem_dtype}: float4_e2m1fn_x2 is read"
    return QuantizedWeight.from_mxfp4(weight.qdata, _scales(weight), weight.orig_dtype)


def _read_nvfp4(weight: Any) -> QuantizedWeight | str:
    return QuantizedWeight.from_nvfp4(
        weight.qdata,
        _scales(weight),
        weight.per_tensor_scale,
        global_op=None if weight.per_tensor_scale is None else "multiply",
        # Older releases multiply both scales in the weight's dtype.
        scale_dtype=weight.get_hp_scales().dtype,
        dtype=weight.orig_dtype,
    )


_READERS: dict[str, Callable[[Any], QuantizedWeight | str]] = {
    "Int8Tensor": _read_int8,
    "IntxUnpackedToInt8Tensor": _read_int8,
    "Int4Tensor": _read_int4,
    "Float8Tensor": _read_float8,
    "MXTensor": _read_mx,
    "NVFP4Tensor": _read_nvfp4,
}


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return scales [rows, columns] from blocks of 128 × 4, the layout that tensor cores read.

    In a block, row 32·i + j is 4 bytes at offset 16·j + 4·i. The last blocks are padded.

    >>> unswizzle(torch.arange(512).to(torch.uint8), 128, 4)[[0, 1, 32], 0].tolist()
    [0, 16, 4]
    """
    row_blocks, column_blocks = -(-rows // 128), -(-columns // 4)
    blocks = scales.reshape(-1).view(torch.uint8).view(row_blocks, column_blocks, 32, 4, 4)
    padded = blocks.permute(0, 3, 2, 1, 4).reshape(row_blocks * 128, column_blocks * 4)
    return padded[:rows, :columns].contiguous().view(scales.dtype)
