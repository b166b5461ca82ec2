"""MXFP4 and NVFP4: how their files hold E2M1 codes and scales, and the rules that quantize to them.

MXFP4 (OCP Microscaling Formats 1.0) has a power of two, E8M0, for 32 elements. NVFP4 has an E4M3
scale for 16 elements, and a float32 scale for the weight, or for each expert of a stack.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import codebooks

LARGEST = 6.0  # of E2M1
_E4M3_LARGEST, _E4M3_SMALLEST = 448.0, 2.0**-6  # the smallest that is not subnormal
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbouring magnitudes
_SWIZZLED = "(swizzled scales must be put back in the order of rows first)"
_PIECE = 1 << 24  # bytes of codes that are rearranged at a time


class Blocks(NamedTuple):
    """Codes and scales as `QuantizedWeight` holds them.

    Args:
        packed: uint8[n/2], with even elements in the high nibble.
        scales: uint8[n/blocksize].
        table: of the scales' values, float32[256], or [E, 256] for E experts.
        shape: (N, K), or (E, N, K).
    """

    packed: Tensor
    scales: Tensor
    table: Tensor
    shape: tuple[int, ...]


def read_mxfp4(blocks: Tensor, scales: Tensor) -> Blocks:
    """Return the weight of a file; see `QuantizedWeight.from_mxfp4`."""
    _check_bytes("blocks", blocks, "float4_e2m1fn_x2")
    _check_bytes("scales", scales, "float8_e8m0fnu")
    if blocks.dim() == scales.dim() + 1 and blocks.shape[-1:] == (16,):  # gpt-oss
        blocks = blocks.flatten(-2)
    _check_shapes("blocks", blocks, "scales", scales, 32)
    packed = swap_nibbles(blocks)
    table = codebooks.e8m0(packed.device)
    return Blocks(packed, _flat_bytes(scales), table, (*blocks.shape[:-1], 2 * blocks.shape[-1]))


def read_nvfp4(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    global_op: str | None,
    scale_dtype: torch.dtype,
) -> Blocks:
    """Return the weight of a file; see `QuantizedWeight.from_nvfp4`."""
    _check_bytes("packed", packed, "float4_e2m1fn_x2")
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale: got {type(scale).__name__}, want a tensor")
    if scale.dtype is not torch.float8_e4m3fn:
        raise TypeError(f"scale: got {scale.dtype}, want float8_e4m3fn")
    _check_shapes("packed", packed, "scale", scale, 16)
    table = codebooks.e4m3(packed.device)
    if global_op not in (None, "divide", "multiply"):
        raise ValueError(f"global_op: got {global_op!r}, want 'divide' or 'multiply'")
    if (global_scale is None) != (global_op is None):
        raise ValueError(
            f"global_op: got {global_op!r} {'without' if global_scale is None else 'beside'} a "
            "global_scale, want 'divide' (compressed-tensors) or 'multiply' (torchao) beside one "
            "alone"
        )
    if global_scale is not None:
        experts = packed.shape[0] if packed.dim() == 3 else 1
        _check_global_scale(global_scale, experts)
        factor = global_scale.detach().to(table.device, scale_dtype).reshape(-1)
        factor = factor[:, None] if factor.numel() > 1 else factor
        table = table.to(scale_dtype)
        table = (table / factor if global_op == "divide" else table * factor).float()
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    return Blocks(swap_nibbles(packed), _flat_bytes(scale), table, shape)


def _check_global_scale(scale: Any, experts: int) -> None:
    if not isinstance(scale, Tensor) or scale.dtype is not torch.float32:
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"global_scale: got {got}, want a tensor of float32")
    if scale.numel() not in (1, experts) or scale.dim() > 3:
        want = "one element" if experts == 1 else f"one element, or {experts} for as many experts"
        raise ValueError(f"global_scale: got shape {list(scale.shape)}, want {want}")
    if not scale.is_meta and not ((scale > 0) & scale.isfinite()).all():
        raise ValueError(
            f"global_scale: got {scale.flatten().tolist()}, want positive and finite values"
        )


def swap_nibbles(packed: Tensor) -> Tensor:
    """Return a copy with the halves of each byte swapped, uint8[n].

    >>> swap_nibbles(torch.tensor([[0x12, 0xF0]], dtype=torch.uint8)).tolist()
    [33, 15]
    """
    flat = _flat_bytes(packed)
    swapped = torch.empty_like(flat)
    for source, target in zip(flat.split(_PIECE), swapped.split(_PIECE), strict=True):
        torch.bitwise_left_shift(source, 4, out=target)
        target |= source >> 4
    return swapped


def quantize_mxfp4(weight: Tensor) -> Blocks:
    """Quantize by OCP's rule: the scale is 2^(⌊log2 of the block's absmax⌋ - 2), at least 2^-127.

    weight: float32, bfloat16 or float16, [N, K] or [E, N, K]; K is a multiple of 32. Elements
    beyond ±6 times the scale become ±6. NaN and infinity give the scale's byte 255.
    """
    blocks = weight.float().reshape(-1, 32)
    absmax = blocks.abs().amax(dim=1)
    exponent = torch.frexp(absmax).exponent - 1 - 2  # absmax is in [0.5, 1) · 2^exponent
    exponent = exponent.clamp(-127, 127).where(absmax > 0, -127)
    scales = (exponent + 127).to(torch.uint8).where(absmax.isfinite(), 255)
    scaled = blocks * torch.exp2(-exponent.double()).float()[:, None]
    table = codebooks.e8m0(weight.device)
    return Blocks(_pack(scaled), scales, table, tuple(weight.shape))


def quantize_nvfp4(weight: Tensor) -> Blocks:
    """Quantize in two levels, bit for bit torchao's `nvfp4_quantize`.

    The global scale is absmax / (448 · 6) of the weight, or of each expert. A block's scale is its
    absmax / 6 / the global scale, rounded to E4M3, and not less than 2^-6.

    weight: float32, bfloat16 or float16, [N, K] or [E, N, K]; K is a multiple of 16.
    """
    experts = weight.shape[0] if weight.dim() == 3 else 1
    blocks = weight.float().reshape(experts, -1, 16)
    absmax = blocks.abs().amax(dim=2)
    largest = absmax.amax(dim=1, keepdim=True)
    outer = (largest / (_E4M3_LARGEST * LARGEST)).where(largest > 0, 1.0)
    scales = (absmax / LARGEST / outer).clamp(_E4M3_SMALLEST, _E4M3_LARGEST)
    scales = scales.to(torch.float8_e4m3fn)
    scaled = blocks * ((1.0 / outer) / scales.float())[:, :, None]
    table = codebooks.e4m3(weight.device) * (outer if experts > 1 else outer[0])
    return Blocks(_pack(scaled), _flat_bytes(scales), table, tuple(weight.shape))


def _pack(scaled: Tensor) -> Tensor:
    """Round to E2M1, to nearest even, and pack with even elements in the high nibble."""
    thresholds = torch.tensor(_MIDDLES, dtype=torch.float32)
    # A value above a threshold goes up. One halfway goes to the even code, which every other
    # threshold has above it.
    thresholds[1::2] = thresholds[1::2].nextafter(torch.zeros(3))
    thresholds = thresholds.to(scaled.device)
    scaled = scaled.reshape(-1)
    codes = torch.bucketize(scaled.abs(), thresholds, out_int32=True).to(torch.uint8)
    codes |= scaled.signbit().to(torch.uint8) << 3
    return (codes[::2] << 4) | codes[1::2]


def _flat_bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8).view(-1)


def _check_bytes(name: str, t: Any, dtype: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a tensor")
    if t.dtype is not torch.uint8 and str(t.dtype) != f"torch.{dtype}":
        raise TypeError(f"{name}: got {t.dtype}, want uint8 or {dtype}")


def _check_shapes(name: str, packed: Tensor, of: str, scales: Tensor, blocksize: int) -> None:
    """Raise ValueError unless the codes are [N, K/2] or [E, N, K/2], and have one scale a block."""
    *rows, half = packed.shape or (0,)
    if len(rows) not in (1, 2) or packed.numel() == 0 or 2 * half % blocksize:
        alternative = ", or [..., K/32, 16]" if blocksize == 32 else ""
        raise ValueError(
            f"{name}: got shape {list(packed.shape)}, want [N, K/2] or [E, N, K/2]{alternative}, "
            f"with K a multiple of {blocksize}"
        )
    if list(scales.shape) != (want := [*rows, 2 * half // blocksize]):
        raise ValueError(
            f"{of}: got shape {list(scales.shape)}, want {want} for {name} of "
            f"{list(packed.shape)} {_SWIZZLED}"
        )
    if scales.device != packed.device:
        raise ValueError(f"{of}: got {scales.device}, want {packed.device}, as {name}")
