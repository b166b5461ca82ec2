"""Dropout's arguments to GPU kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..core import reference


class Dropout(NamedTuple):
    """rng: None if nothing is dropped. scale: 1/(1−p)."""

    rng: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def from_rng(cls, p: float, rng: Tensor | None) -> Dropout:
        if rng is None:
            return NO_DROPOUT
        return cls(rng, reference.dropout_threshold(p), reference.dropout_scale(p))


NO_DROPOUT = Dropout(None, 0, 1.0)
