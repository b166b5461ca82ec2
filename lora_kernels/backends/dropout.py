"""The dropout arguments of GPU kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..core import reference


class Dropout(NamedTuple):
    """The state of a dropout mask, and the numbers that kernels derive from its probability p.

    Args:
        rng: int64 [2], seed and offset; None without dropout.
        threshold: the smallest 32-bit word that keeps its element.
        scale: 1/(1−p).
    """

    rng: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def from_rng(cls, p: float, rng: Tensor | None) -> Dropout:
        if rng is None:
            return NO_DROPOUT
        return cls(rng, reference.dropout_threshold(p), reference.dropout_scale(p))


NO_DROPOUT = Dropout(None, 0, 1.0)
