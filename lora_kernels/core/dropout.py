"""The dropout mask of a state, which the CPU's kernels apply."""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a·b, for unsigned 32-bit values in int64."""
    hi = (b * (a >> 16) + ((b * (a & 0xFFFF)) >> 16)) >> 16
    return hi & _MASK32, (a * b) & _MASK32  # a·b wraps modulo 2⁶⁴, which keeps its low 32 bits


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Generate four 32-bit words per counter by Philox4x32 (Salmon et al., SC'11).

    Args:
        counter: four broadcastable int64 tensors of 32-bit values.
        key: two such tensors.
        rounds: the number of rounds.

    Returns four int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
        hi0, lo0 = _mul_hi_lo(_PHILOX_M[0], c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """Return the smallest 32-bit word that keeps its element.

    For p = 1 one word in 2³² still keeps it, and `dropout_scale` is 0.
    """
    return min(round(p * 2**32), _MASK32)


def dropout_scale(p: float) -> float:
    """Return 1/(1−p), or 0 for p = 1, as in `torch.nn.Dropout`."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout_mask(rng: Tensor, M: int, K: int, p: float, rows: Tensor | None = None) -> Tensor:
    """Return the dropout mask that every backend applies to x [M, K], True for kept elements.

    The words are those of Philox4x32-10 with key = seed and
    counter = (k >> 2, m, offset_lo, offset_hi). Element (m, k) has word k & 3, and is kept if
    word >= dropout_threshold(p). Returns bool[M, K] on rng's device.

    rng: int64[2], seed and offset.
    rows: int64[M], the mask's rows to return; None for rows 0 to M - 1.

    >>> mask = dropout_mask(torch.tensor([1, 2]), 64, 64, p=0.25)
    >>> mask.shape, 0.7 < mask.double().mean().item() < 0.8
    (torch.Size([64, 64]), True)
    """
    seed, offset = rng[0], rng[1]
    groups = torch.arange((K + 3) // 4, device=rng.device)[None, :]
    if rows is None:
        rows = torch.arange(M, device=rng.device)
    counter = [
        groups.expand(M, -1),
        rows[:, None].expand(-1, groups.shape[1]),
        (offset & _MASK32).expand(M, groups.shape[1]),
        ((offset >> 32) & _MASK32).expand(M, groups.shape[1]),
    ]
    words = torch.stack(philox4x32(counter, [seed & _MASK32, (seed >> 32) & _MASK32]), dim=-1)
    return words.flatten(1)[:, :K] >= dropout_threshold(p)
