"""The least that a `lora_linear` call does on a CPU: FLOPs, and bytes that it moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CODE_BYTES = 0.5 + 1 / 64  # a code, and its share of a scale of 8 bits


@dataclass(frozen=True)
class Sizes:
    """A call: y [M, N] of x [M, K] and R ranks."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype  # of the product
    adapter_itemsize: int = 4
    four_bit: bool = False


def flops(sizes: Sizes, step: bool = False) -> float:
    """Operations of a forward, or of forward and backward with x's gradient.

    >>> flops(Sizes(M=1, N=10, K=20, R=2, dtype=torch.float32))
    520.0
    """
    base = 2.0 * sizes.M * sizes.N * sizes.K
    thin = 2.0 * sizes.M * sizes.R * (sizes.N + sizes.K)  # the backward has four: dS, dB, dx and dA
    return (1 + step) * base + (1 + 2 * step) * thin


def moved(sizes: Sizes, step: bool = False) -> float:
    """Bytes that must move: each operand once a direction, nothing between.

    Forward: x, W, y and the adapter. Backward: dY, W, dx, x again, the adapter and its gradients.
    """
    x = sizes.M * sizes.K * sizes.dtype.itemsize
    y = sizes.M * sizes.N * sizes.dtype.itemsize
    weight = sizes.N * sizes.K * (CODE_BYTES if sizes.four_bit else sizes.dtype.itemsize)
    adapter = (sizes.N + sizes.K) * sizes.R * sizes.adapter_itemsize
    return x + y + weight + adapter + step * (2 * x + y + weight + 2 * adapter)
