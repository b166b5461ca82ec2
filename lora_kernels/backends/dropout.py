"""What the GPU's kernels take of dropout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..core import reference


class Dropout(NamedTuple):
    """rng: None where nothing is dropped. scale: 1/(1−p)."""

    rng: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, rng: Tensor | None) -> Dropout:
        if rng is None:
            return NO_DROPOUT
        return cls(rng, reference.dropout_threshold(p), reference.dropout_scale(p))


NO_DROPOUT = Dropout(None, 0, 1.0)
