"""Helpers of several backends for rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.call import ExpertsOperands, ExpertsSpec
from ..core.codes import Codes
from . import decoder


def runs(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and its rows of x. Waits for a GPU.

    >>> list(runs(torch.tensor([2, 2, 5])))
    [(0, slice(0, 2, None)), (2, slice(2, 5, None))]
    """
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield e, slice(start, stop)
            start = stop


def largest_rank(lora_A: Sequence[Tensor]) -> int:
    """Return the number of P's columns. lora_A: [E, R, K] of each tenant."""
    return max(A.shape[1] for A in lora_A)


def expert_offsets(operands: ExpertsOperands) -> Tensor:
    """Return one past the last row of each expert [E], from the offsets of its tenants."""
    tenants = len(operands.lora_A)
    return operands.offsets[tenants - 1 :: tenants]


def weight_of(
    operands: ExpertsOperands, spec: ExpertsSpec, expert: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the dense weight [N, K] of one expert, a 4-bit one decoded to `dtype`, or None."""
    weight = operands.weight
    if weight is None:
        return None
    if not isinstance(weight, Codes):
        return weight[expert]
    (E, N, _), K = operands.lora_B[0].shape, operands.x.shape[1]
    rows, columns = (K, N) if spec.transposed else (N, K)
    expert_rows = slice(expert * rows, (expert + 1) * rows)
    dense = decoder.dense(weight, (E * rows, columns), dtype, rows=expert_rows)
    return dense.t() if spec.transposed else dense
