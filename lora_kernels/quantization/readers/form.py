"""What readers share: words of codes taken apart, and a `QuantizedWeight` of codes and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import codebooks
from ..weight import QuantizedWeight

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 4096


class Reading(NamedTuple):
    """What a reader found in a layer.

    Args:
        weight: W [N, K].
        bias: [N] or None.
    """

    weight: QuantizedWeight
    bias: Tensor | None = None


def unpack(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Return the codes in int32 words as uint8, 32 / bits times as many along a dimension.

    order: the place of each code of a word, from the lowest bits on. None: in order.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), 4, dim=1).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    places = range(32 // bits) if order is None else order
    dim %= words.dim()
    shape = [*words.shape[: dim + 1], 32 // bits, *words.shape[dim + 1 :]]
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i, place in enumerate(places):
        codes.select(dim + 1, place).copy_(words >> i * bits & (1 << bits) - 1)
    return codes.flatten(dim, dim + 1)


def read_integers(
    q: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight (q - zero) · scale of codes 0 to 2^bits - 1.

    Args:
        q: uint8 [N, K].
        bits: up to 4, or up to 8; fewer are kept in 4 or 8.
        scale: [N, G] or [1, G], of groups of columns; a last group may be short.
        zero: as scale, or the number that all groups have. If it is the middle of the codes, the
            form has signed codes and no shift.
        group: columns that share a scale.
        dtype: of the decoded weight.

    Raises ValueError if a group has no blocks: the largest power of two that divides the group and
    K is below 16.

    >>> q, scale = torch.arange(16, dtype=torch.uint8)[None], torch.full((1, 1), 0.5)
    >>> read_integers(q, 4, scale, 1, 16, torch.float32).dequantize()[0, :4]
    tensor([-0.5000,  0.0000,  0.5000,  1.0000])
    """
    kept = 4 if bits <= 4 else 8
    middle = 1 << (kept - 1)
    if isinstance(zero, Tensor):
        zero = zero.to(torch.float32)
        if bool((zero == middle).all()):
            zero = float(middle)
    scale, shift = scale.float(), None
    is_signed = kept == 8  # rounded to bfloat16 with their scale, such codes lose half as much
    if not isinstance(zero, Tensor) and zero == middle:
        is_signed = True
    else:
        shift = ((middle if is_signed else 0) - zero) * scale
    if kept == 8:
        return build(q ^ 128, codebooks.int8(q.device), scale, shift, group, dtype)
    code = torch.arange(16.0, device=q.device) - (middle if is_signed else 0)
    return build(q, code, scale, shift, group, dtype)


def build(
    q: Tensor, code: Tensor, scale: Tensor, shift: Tensor | None, group: int, dtype: torch.dtype
) -> QuantizedWeight:
    """Return the weight code[q] · scale + shift, with scales in float16 if that is exact.

    Args:
        q: uint8 [N, K], indices of the code.
        code: float32[16] or float32[256].
        scale, shift: [N, G] or [1, G], of groups of columns; a last group may be short.
        group: columns that share a scale.
        dtype: of the decoded weight.
    """
    N, K = q.shape
    block = block_size(group, K)
    groups = torch.arange(0, K, block, device=q.device) // group
    parts = [t.float().expand(N, -1) for t in (scale, shift) if t is not None]
    absmax = torch.stack([t[:, groups].reshape(-1) for t in parts], -1)
    half = absmax.half()
    absmax = half if torch.equal(half.float(), absmax) else absmax
    return QuantizedWeight(
        packed=pack(q) if len(code) == 16 else q.reshape(-1),
        absmax=absmax if shift is not None else absmax[:, 0].contiguous(),
        code=code,
        quant_type="",
        blocksize=block,
        shape=(N, K),
        dtype=dtype,
    )


def pack(q: Tensor) -> Tensor:
    """Return 4-bit codes [N, K] as bytes, with even elements in the high nibble."""
    flat = q.reshape(-1, 2)
    return (flat[:, 0] << 4) | flat[:, 1]


def block_size(group: int, K: int) -> int:
    """Return the largest power of two, up to 4096, that divides a group and a row.

    >>> block_size(128, 576), block_size(48, 96)
    (64, 16)
    >>> block_size(24, 96)
    Traceback (most recent call last):
    ValueError: group: got groups of 24 in rows of 96, want a power of two of 16 or more in both
    """
    common = math.gcd(group, K)
    block = min(common & -common, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        raise ValueError(
            f"group: got groups of {group} in rows of {K}, want a power of two of {SMALLEST_BLOCK} "
            "or more in both"
        )
    return block
