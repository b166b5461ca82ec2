"""Linear layers of compressed-tensors and torchao in MXFP4 and NVFP4, read as `QuantizedWeight`.

The libraries are not imported, because attributes identify a layer. Both pack the even element in
the low nibble, and torchao swizzles scales, so each weight is repacked once. The former tensors are
freed. The formats were read in compressed-tensors 0.20 and torchao 0.18.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..quantization import QuantizedWeight
from ..quantization.packed_state import build_parameter, register_state_hooks
from .mergeable import refuse_merges
from .modules import hooks_of, is_compressed_forward

# The parameters and instance attributes that compressed-tensors adds to an nn.Linear.
_PARAMETERS = ("weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point")
_ATTRIBUTES = ("quantization_scheme", "quantization_status", "quantization_enabled", "forward")
_TORCHAO = "torchao.prototype.mx_formats."
Model = TypeVar("Model", bound=nn.Module)


def keep_packed(model: Model) -> Model:
    """Let adapters train over linear layers of compressed-tensors or torchao in MXFP4 and NVFP4.

    Call it on the loaded model, before PEFT and before the first forward. PEFT needs a `weight`.
    compressed-tensors' layers have a `weight` only after the model's first forward, which decodes
    the whole model. Here each layer becomes an `nn.Linear` whose weight is a `QuantizedTensor`. The
    weights are repacked one by one, and not decoded. Other code that reads a weight gets a
    temporary decoded copy; fused layers read the 4 bits in the kernels. Layers that round x too do
    not change. PEFT's merges into these layers raise, with `fuse` or without, before they change
    the first layer.

    Returns the model. Raises ValueError if it has no such layer.

    >>> from lora_kernels.peft import keep_packed
    >>> keep_packed(nn.Sequential(nn.Linear(32, 32)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: model: got no linear layer in MXFP4 or NVFP4 of compressed-tensors or torchao, ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    if not sum([pack_base(module) for module in model.modules()]):
        raise ValueError(
            "model: got no linear layer in MXFP4 or NVFP4 of compressed-tensors or torchao, want "
            "one that does not round x, before a forward has decoded it"
        )
    for module in model.modules():
        hook = vars(module).get("ct_decompress_hook")
        if hook is None or any("quantization_scheme" in vars(child) for child in module.modules()):
            continue
        # No layer is left to decode, and the hook would give every module an offloading forward.
        hook.remove()
        del module.ct_decompress_hook
    return model


def pack_base(base: Any) -> bool:
    """Give a 4-bit nn.Linear of compressed-tensors or torchao a `QuantizedTensor`.

    Returns True if it did. Layers that quantize x too are skipped, because their result differs,
    and so are layers with hooks. compressed-tensors decodes skipped layers in the first forward.
    """
    if type(base) is not nn.Linear or any(hooks_of(base)):
        return False
    weight = _read_compressed(base)
    if weight is not None:
        for name in _PARAMETERS:
            base._parameters.pop(name, None)
        for name in _ATTRIBUTES:
            vars(base).pop(name, None)
    else:
        weight = _read_torchao(base)
    if weight is None:
        return False
    base._parameters["weight"] = build_parameter(weight)
    register_state_hooks(base)
    refuse_merges()
    return True


def quantizes_input(base: Any) -> bool:
    """Return True if compressed-tensors rounds x, without a gradient, or y of a linear layer."""
    scheme = getattr(base, "quantization_scheme", None)  # torch 2.8 cannot trace `vars`
    names = "input_activations", "output_activations"
    return any(getattr(scheme, name, None) is not None for name in names)


def _read_compressed(base: nn.Linear) -> QuantizedWeight | None:
    packed, scale = (base._parameters.get(name) for name in _PARAMETERS[:2])
    global_scale = base._parameters.get("weight_global_scale")
    format = getattr(vars(base).get("quantization_scheme"), "weights", None)
    if packed is None or scale is None or format is None or quantizes_input(base):
        return None
    scheme = format.num_bits, format.type, format.symmetric, format.actorder
    if scheme != (4, "float", True, None) or vars(base).get("quantization_status") != "compressed":
        return None
    if "forward" in vars(base) and not is_compressed_forward(vars(base)["forward"]):
        return None
    try:  # compressed-tensors decodes to bfloat16, whatever the model's dtype
        if format.group_size == 32 and global_scale is None:
            return QuantizedWeight.from_mxfp4(packed, scale)
        return QuantizedWeight.from_nvfp4(
            packed, scale, global_scale, global_op=None if global_scale is None else "divide"
        )
    except (TypeError, ValueError):  # another layout
        return None


def _read_torchao(base: nn.Linear) -> QuantizedWeight | None:
    weight: Any = base._parameters.get("weight")
    cls = type(weight)
    if not cls.__module__.startswith(_TORCHAO) or cls.__name__ not in ("MXTensor", "NVFP4Tensor"):
        return None
    if weight.act_quant_kwargs is not None or not weight.qdata.is_contiguous():
        return None
    scale: Tensor = weight.scale.detach()
    if weight.is_swizzled_scales:
        scale = unswizzle(scale, weight.shape[0], weight.shape[1] // weight.block_size)
    try:
        if cls.__name__ == "MXTensor":
            is_fp4 = str(weight.elem_dtype) == "torch.float4_e2m1fn_x2"
            return (
                QuantizedWeight.from_mxfp4(weight.qdata, scale, weight.orig_dtype)
                if is_fp4
                else None
            )
        return QuantizedWeight.from_nvfp4(
            weight.qdata,
            scale,
            weight.per_tensor_scale,
            global_op=None if weight.per_tensor_scale is None else "multiply",
            # Older releases multiply both scales in the weight's dtype.
            scale_dtype=weight.get_hp_scales().dtype,
            dtype=weight.orig_dtype,
        )
    except (TypeError, ValueError):  # another layout
        return None


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
