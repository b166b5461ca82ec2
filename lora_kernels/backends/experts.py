"""Helpers of several backends for rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.call import ExpertsOperands, ExpertsSpec
from ..core.packed4bit import Packed4bit
from . import decode4bit


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


class Call(NamedTuple):
    """A part of a call for several tenants: the arguments of `lora_experts`."""

    operands: ExpertsOperands
    spec: ExpertsSpec


def split_tenants(operands: ExpertsOperands, spec: ExpertsSpec) -> tuple[Call, Call]:
    """Return the call of the base, grouped by expert, and that of the adapters without a base,
    grouped by expert and tenant. Each has one tenant."""
    (G, N, _), K, T = operands.lora_B.shape, operands.x.shape[1], spec.tenants
    E, spec = G // T, spec._replace(tenants=1)
    base = operands._replace(
        lora_A=operands.lora_A.new_empty(E, 0, K),
        lora_B=operands.lora_B.new_empty(E, N, 0),
        offsets=operands.offsets[T - 1 :: T],
        rng=None,
        mask=None,
    )
    adapters = operands._replace(weight=None, bias=None)
    return Call(base, spec._replace(dropout_p=0.0)), Call(adapters, spec)


def weight_of(
    operands: ExpertsOperands, spec: ExpertsSpec, expert: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the dense weight [N, K] of one expert, a 4-bit one decoded to `dtype`, or None."""
    weight = operands.weight
    if weight is None:
        return None
    if not isinstance(weight, Packed4bit):
        return weight[expert]
    (E, N, _), K = operands.lora_B.shape, operands.x.shape[1]
    rows, columns = (K, N) if spec.transposed else (N, K)
    own = slice(expert * rows, (expert + 1) * rows)
    dense = decode4bit.dense(weight, (E * rows, columns), dtype, rows=own)
    return dense.t() if spec.transposed else dense
