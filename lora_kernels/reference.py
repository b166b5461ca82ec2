"""The oracle: the equation in plain PyTorch, any dtype up to float64, written to be read.

    z = x·W̃ᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ          y = c ⊙ z + bias

Everything else in this package is checked against these few lines and their derivatives as
`torch.autograd` computes them. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for unsigned 32-bit values held in int64."""
    hi = (b * (a >> 16) + ((b * (a & 0xFFFF)) >> 16)) >> 16
    return hi & _MASK32, (a * b) & _MASK32


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC'11): four 32-bit words per counter.

    counter: four int64 tensors of 32-bit values (broadcastable); key: two. Returns four.
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
    """A 32-bit word keeps its element where word >= this; p = 1 drops all through scale 0."""
    return min(round(p * 2**32), _MASK32)


def dropout_scale(p: float) -> float:
    """1/(1−p), and 0 for p = 1, as `torch.nn.Dropout` has it."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout_mask(rng: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask that every backend applies to x of shape [M, K], True where x is kept.

    rng: int64[2], seed and offset. Philox4x32-10 with key = seed and
    counter = (k >> 2, m, offset_lo, offset_hi); element (m, k) takes word k & 3 and is kept where
    word >= round(p·2³²). Returns bool[M, K] on rng's device.

    >>> mask = dropout_mask(torch.tensor([1, 2]), 64, 64, p=0.25)
    >>> mask.shape, 0.7 < mask.double().mean().item() < 0.8
    (torch.Size([64, 64]), True)
    """
    seed, offset = rng[0], rng[1]
    groups = torch.arange((K + 3) // 4, device=rng.device)[None, :]
    rows = torch.arange(M, device=rng.device)[:, None]
    counter = [
        groups.expand(M, -1),
        rows.expand(-1, groups.shape[1]),
        (offset & _MASK32).expand(M, groups.shape[1]),
        ((offset >> 32) & _MASK32).expand(M, groups.shape[1]),
    ]
    words = torch.stack(philox4x32(counter, [seed & _MASK32, (seed >> 32) & _MASK32]), dim=-1)
    return words.flatten(1)[:, :K] >= dropout_threshold(p)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    rank_gate: Tensor | None = None,
    column_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y = c ⊙ (x·W̃ᵀ + ((D(x)·Aᵀ) ⊙ g)·Bᵀ) + bias, g = scaling · rank_gate.

    x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N], rank_gate [R],
    column_scale [N]; all of one dtype. Differentiable in every argument by autograd.

    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> lora_linear(x, W, A, B, scaling=0.5)
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    """
    dropped = x
    if dropout_p > 0:
        assert rng is not None
        K = x.shape[-1]
        mask = dropout_mask(rng, x.numel() // K, K, dropout_p).view(x.shape)
        dropped = x * mask.to(x.dtype) * dropout_scale(dropout_p)
    gate = scaling if rank_gate is None else scaling * rank_gate
    z = x @ weight.T + ((dropped @ lora_A.T) * gate) @ lora_B.T
    y = z if column_scale is None else z * column_scale
    return y if bias is None else y + bias
