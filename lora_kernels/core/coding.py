"""Quantized weights by definition: codes, scales and shifts of blocks, and scales in 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-38  # the smallest divisor of a block


def _scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return float32[n] divided by its block's absmax, in [-1, 1], and the absmax, float32[blocks].

    The results are bitwise equal to bitsandbytes' default backend, which treats a short last block
    differently. Full blocks are multiplied by the reciprocal, and absmax is 0 for zeros. A short
    block is divided, and its absmax is at least `SMALLEST_SCALE`.
    """
    count = values.numel() // blocksize
    full, tail = values[: count * blocksize].view(count, blocksize), values[count * blocksize :]
    absmax = full.abs().amax(dim=1)
    scaled = (full * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).flatten()
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    return scaled.clamp(-1, 1), absmax


def quantize_4bit(
    weight: Tensor, thresholds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 4-bit codes and one scale per block, as bitsandbytes does.

    Blocks divide the flattened weight, and the last block may be short.

    Args:
        weight: float32, bfloat16 or float16, finite, of any shape with n elements.
        thresholds, order: float32[15] and uint8[16] from `quantization.codebooks`.
        blocksize: the number of elements per block.

    Returns:
        packed uint8[⌈n/2⌉], with even elements in the high nibble, and absmax
        float32[⌈n/blocksize⌉]. If n is odd, the last low nibble is the code of 0.

    >>> packed, absmax = quantize_4bit(torch.tensor([[1.0, -2.0, 0.5]]),
    ...     torch.linspace(-0.9375, 0.9375, 15), torch.arange(16, dtype=torch.uint8), 32)
    >>> packed.tolist(), absmax.tolist()  # codes 11, 0, 9, and 7 for nothing
    ([176, 151], [2.0])
    """
    scaled, absmax = _scale_blocks(weight.flatten().float(), blocksize)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    codes = order[torch.bucketize(scaled, thresholds)]
    return (codes[::2] << 4) | codes[1::2], absmax


def dequantize(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a weight: code × scale, + shift, each rounded to float32, and rounded to `dtype`.

    Args:
        packed: uint8 [⌈n/2⌉] for 4 bits and n elements in shape, [n] for 8.
        scales: float32 [⌈n/blocksize⌉], or [⌈n/blocksize⌉, 2] for scales and shifts.
        code: float32 [16] for 4 bits, [256] for 8.

    >>> packed, scales = torch.tensor([0x21, 0x30], dtype=torch.uint8), torch.tensor([0.5])
    >>> dequantize(packed, scales, torch.arange(16.0), 32, (1, 3), torch.float32)
    tensor([[1.0000, 0.5000, 1.5000]])
    >>> pairs, code = torch.tensor([[0.5, -1.0]]), torch.arange(256.0)  # 8 bits, and a shift
    >>> dequantize(packed, pairs, code, 32, (2,), torch.float32)
    tensor([15.5000, 23.0000])
    """
    n = math.prod(shape)
    if code.numel() == 16:
        packed = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    values = code[packed[:n].long()]
    blocks = scales.repeat_interleave(blocksize, dim=0)[:n]
    if scales.dim() == 1:
        return (values * blocks).view(shape).to(dtype)
    return (values * blocks[:, 0] + blocks[:, 1]).view(shape).to(dtype)


def quantize_scales(
    absmax: Tensor, nested_code: Tensor, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales minus their mean to 8 bits, with nested scales (double quantization).

    absmax float32[blocks], nested_code float32[256] ascending. Returns codes uint8[blocks],
    nested_absmax float32[⌈blocks/nested_blocksize⌉] and the mean, float32[]. PyTorch computes the
    mean, in an order that depends on the thread count for very large weights.

    >>> codes, nested_absmax, offset = quantize_scales(
    ...     torch.tensor([1.0, 2.0, 3.0]), torch.linspace(-1, 1, 256), 256)
    >>> codes.tolist(), nested_absmax.tolist(), offset.item()
    ([0, 127, 255], [1.0], 2.0)
    """
    offset = absmax.mean()
    scaled, nested_absmax = _scale_blocks(absmax - offset, nested_blocksize)
    thresholds = (nested_code[:-1] + nested_code[1:]) / 2
    return torch.bucketize(scaled, thresholds).to(torch.uint8), nested_absmax, offset


def dequantize_scales(
    codes: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """Decode scales in 8 bits, float32 [blocks], or pairs of scales and shifts, [blocks, 2].

    A scale is code × nested scale, rounded, and + offset, rounded. Without nested scales it is a
    value of nested_code, float32 [256], or [E, 256] for the scales of E experts. Nested scales of
    pairs are pairs, [⌈blocks/nested_blocksize⌉, 2].

    >>> dequantize_scales(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([4.0]),
    ...     torch.linspace(-1, 1, 256), torch.tensor(5.0), 256)
    tensor([1., 9.])
    """
    if nested_absmax is None:
        index, count = codes.int(), nested_code.numel() // 256
        if count > 1:
            tables = torch.arange(count, dtype=torch.int32, device=codes.device) * 256
            index = (index.view(count, -1) + tables[:, None]).view(index.shape)
        return nested_code.view(-1).index_select(0, index.view(-1)).view(index.shape)
    nested_scales = nested_absmax.repeat_interleave(nested_blocksize, dim=0)[: codes.shape[0]]
    product = nested_code[codes.long()] * nested_scales
    return product if offset is None else product + offset
