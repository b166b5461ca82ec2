"""Quantize and decode 4-bit weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ...core import reference
from . import configs, launch
from .arguments import Codes
from .format_4bit import dequantize_kernel, quantize_kernel

if TYPE_CHECKING:
    from ...core.packed4bit import Packed4bit


def dequantize(codes: Packed4bit, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Decode the weight [N, K], rounded once to `dtype`."""
    (N, K), config = shape, configs.DEQUANTIZE
    grid = (triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k))
    w = torch.empty(shape, dtype=dtype, device=codes.packed.device)
    meta = {
        "FORMAT": launch.format_4bit(codes, K, launch.target(w)),
        "WIDE": N * K >= 1 << 31,
        **config.blocks,
    }
    args = Codes.from_weight(codes), w, N, K
    launch.run(dequantize_kernel, config, *args, grid=grid, device=w.device, **meta)
    return w


def quantize(
    weight: Tensor, thresholds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Quantize as `reference.quantize_4bit`: packed uint8[⌈n/2⌉], absmax float32[⌈n/blocksize⌉]."""
    weight, n, config = weight.contiguous(), weight.numel(), configs.quantize(blocksize)
    blocks = triton.cdiv(n, blocksize)
    packed = torch.empty(triton.cdiv(n, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    meta = {"WIDE": n >= 1 << 31, "BLOCKSIZE": blocksize, "BLOCKS": config.block_n}
    args, grid = (thresholds, order, packed, absmax, n), (triton.cdiv(blocks, config.block_n),)
    smallest, device = reference.SMALLEST_SCALE, weight.device
    launch.run(quantize_kernel, config, weight, *args, smallest, grid=grid, device=device, **meta)
    return packed, absmax
