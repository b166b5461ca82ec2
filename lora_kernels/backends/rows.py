"""Rows of x: those of y again in x's dimensions, and which of them belong to which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def set_leading_dims_(y: Tensor, leading: Sequence[int]) -> Tensor:
    """Give y [M, N], just allocated, leading dimensions in place, and return it.

    A view would not do: autograd lets no one change a view that a Function returns.
    """
    return y if len(leading) == 1 else y.contiguous().resize_(*leading, y.shape[1])


class Rows(NamedTuple):
    """An order of x's rows in which an adapter's lie together, and where.

    order: int64 [M]; None if they lie together already.
    runs: adapter, its first row in that order, one past its last; rows of no adapter in none.
    """

    order: Tensor | None
    runs: list[tuple[int, int, int]]

    def each(self) -> Iterator[tuple[int, slice | Tensor]]:
        """An adapter, and what its rows are indexed by, for each that has any."""
        for e, start, stop in self.runs:
            yield e, slice(start, stop) if self.order is None else self.order[start:stop]


def rows_of(index: Tensor, adapters: int) -> Rows:
    """index: integers [M], -1 for no adapter; ValueError for one that there is not.

    >>> rows_of(torch.tensor([1, 1, -1, 0]), 2)
    Rows(order=None, runs=[(1, 0, 2), (0, 3, 4)])
    >>> rows_of(torch.tensor([1, 0, 1]), 2)
    Rows(order=tensor([1, 0, 2]), runs=[(0, 0, 1), (1, 1, 3)])
    """
    order, (names, sizes) = None, _runs(index)
    for name in names:
        if not -1 <= name < adapters:
            raise ValueError(
                f"index: got {name}, want 0 to {adapters - 1} for one of {adapters} adapters, or "
                "-1 for none"
            )
    some = [name for name in names if name >= 0]
    if len(set(some)) < len(some):
        order = torch.argsort(index, stable=True)
        names, sizes = _runs(index[order])
    runs, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        if name >= 0:
            runs.append((name, start, start + size))
        start += size
    return Rows(order, runs)


def _runs(index: Tensor) -> tuple[list[int], list[int]]:
    names, sizes = torch.unique_consecutive(index, return_counts=True)
    return names.tolist(), sizes.tolist()
