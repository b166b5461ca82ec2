"""Rows of x: those of y again in x's dimensions, and which of them belong to which adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.call import Rows


def set_leading_dims_(y: Tensor, leading: Sequence[int]) -> Tensor:
    """Give y [M, N], just allocated, leading dimensions in place, and return it.

    A view would not do: autograd lets no one change a view that a Function returns.
    """
    return y if len(leading) == 1 else y.contiguous().resize_(*leading, y.shape[1])


def rows_of(index: Tensor | Rows, adapters: int, x: Tensor | None = None) -> Rows:
    """Return the rows of x that each adapter has.

    Args:
        index: integers [I], -1 for no adapter. Each is the adapter of M / I rows. An index on a GPU
            is read, for which the host waits; one on the CPU is not. `Rows` are returned as given.
        adapters: the number of adapters.
        x: [M, K]; None for one row for each integer, on the index's device.

    Raises:
        ValueError: an integer is the number of no adapter.

    >>> rows_of(torch.tensor([1, 1, -1, 0]), 2)
    Rows(order=None, runs=[(1, 0, 2), (0, 3, 4)])
    >>> rows_of(torch.tensor([1, 0, 1]), 2)
    Rows(order=tensor([1, 0, 2]), runs=[(0, 0, 1), (1, 1, 3)])
    >>> rows_of(torch.tensor([1, 0, 1]), 2, torch.ones(6, 8))
    Rows(order=tensor([2, 3, 0, 1, 4, 5]), runs=[(0, 0, 2), (1, 2, 6)])
    """
    if isinstance(index, Rows):
        return index
    M, device = (index.numel(), index.device) if x is None else (x.shape[0], x.device)
    if not M:
        return Rows(None, [])
    length = M // index.numel()
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
        order = order.to(device, non_blocking=True)
        if length > 1:
            order = (order[:, None] * length + torch.arange(length, device=device)).flatten()
    runs, start = [], 0
    for name, size in zip(names, sizes, strict=True):
        stop = start + size * length
        if name >= 0:
            runs.append((name, start, stop))
        start = stop
    return Rows(order, runs)


def _runs(index: Tensor) -> tuple[list[int], list[int]]:
    names, sizes = torch.unique_consecutive(index, return_counts=True)
    return names.tolist(), sizes.tolist()
