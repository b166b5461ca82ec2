"""What readers share: words of codes taken apart, and a `QuantizedWeight` of codes and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import codebooks
from ..weight import QuantizedWeight

SMALLEST_BLOCK = 16


def unpack(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Return the codes in int32 words as uint8, 32 / bits times as many along a dimension.

    order: the place of each code of a word, from the lowest bits on. None: in order.

    >>> unpack(torch.tensor([[0x76543210]], dtype=torch.int32), 4, dim=1).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    count = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    if order is not None:
        shifts = shifts[torch.tensor(order, device=words.device).argsort()]
    dim %= words.dim()
    shape = [1] * (dim + 1) + [count] + [1] * (words.dim() - dim - 1)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(dim, dim + 1)


def read_groups(
    q: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor | int,
    group: int,
    dtype: torch.dtype,
) -> QuantizedWeight:
    """Return the weight (q - zero) · scale of codes 0 to 2^bits - 1.

    Args:
        q: uint8 [N, K].
        scale: [N, G], of groups of columns; a last group may be short.
        zero: [N, G], or the number that all groups have. If it is the middle of the codes, the form
            has signed codes and no shift.
        group: columns that share a scale.
        dtype: of the decoded weight.

    Raises ValueError if a group has no blocks: the largest power of two that divides the group and
    K is below 16.
    """
    N, K = q.shape
    block = block_size(group, K)
    columns = torch.arange(0, K, block, device=q.device) // group
    middle = 1 << (bits - 1)
    if isinstance(zero, Tensor) and bool((zero == middle).all()):
        zero = middle
    scale = scale.contiguous() if scale.dtype is torch.float16 else scale.float()
    if isinstance(zero, int) and zero == middle:
        absmax = scale[:, columns].reshape(-1)
        if bits == 4:
            code = torch.arange(-8.0, 8.0, device=q.device)
        else:
            q, code = q ^ 128, codebooks.int8(q.device)
    else:
        shift = -(zero * scale.float())
        if bits == 8:  # centred: rounded to bfloat16 with their scale, such codes lose half as much
            q, shift = q ^ 128, shift + middle * scale.float()
        pairs = torch.stack([scale, shift.to(scale.dtype)], -1)
        if not torch.equal(pairs[..., 1].float(), shift):
            pairs = torch.stack([scale.float(), shift], -1)
        absmax = pairs[:, columns].reshape(-1, 2)
        code = torch.arange(16.0, device=q.device) if bits == 4 else codebooks.int8(q.device)
    return QuantizedWeight(
        packed=pack(q) if bits == 4 else q.reshape(-1),
        absmax=absmax,
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
    """Return the largest power of two that divides a group and a row.

    >>> block_size(128, 576), block_size(48, 96)
    (64, 16)
    >>> block_size(24, 96)
    Traceback (most recent call last):
    ValueError: group: got groups of 24 in rows of 96, want a power of two of 16 or more in both
    """
    common = math.gcd(group, K)
    block = common & -common
    if block < SMALLEST_BLOCK:
        raise ValueError(
            f"group: got groups of {group} in rows of {K}, want a power of two of {SMALLEST_BLOCK} "
            "or more in both"
        )
    return block
