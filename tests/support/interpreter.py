"""Triton's interpreter, running the programs of a launch in any order.

By itself it runs them in ascending order, in which a program that overwrites what a later one
stores goes unnoticed. A launch in which two programs store to one address raises RuntimeError, in
whatever order they run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Order = Callable[[int], Sequence[int]]  # a number of programs -> which of them runs first, second …
Index = tuple[int, int, int]

_order: Order = range


def reversed_order(count: int) -> Sequence[int]:
    """Run the last program first."""
    return range(count)[::-1]


def shuffled_order(seed: int) -> Order:
    """Return an order that draws each launch's from the seed."""
    generator = random.Random(seed)
    return lambda count: generator.sample(range(count), count)


@contextlib.contextmanager
def programs_run_in(order: Order) -> Iterator[None]:
    """Run the programs of each launch inside the context in this order."""
    global _order
    _install()
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


class _Launch:
    """The programs of a launch: which runs next, and what each stores."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.grid: Index = (1, 1, 1)
        self.order: Sequence[int] = [0]
        self.stores: list[tuple[int, Any]] = []  # program, addresses

    def set_grid(self, grid: Index) -> None:
        self.grid, self.order = grid, _order(math.prod(grid))

    def index(self, x: int, y: int, z: int) -> Index:
        """Return the program that runs in place of this one."""
        _, ny, nz = self.grid
        return self.place(self.order[(x * ny + y) * nz + z])

    def place(self, program: int) -> Index:
        _, ny, nz = self.grid
        return program // (ny * nz), program // nz % ny, program % nz

    def store(self, program: Index, addresses: Any, mask: Any) -> None:
        (x, y, z), (_, ny, nz) = program, self.grid
        self.stores.append(((x * ny + y) * nz + z, addresses[mask]))

    def require_one_store_each(self) -> None:
        """Raise RuntimeError if two programs stored to one address."""
        if not self.stores:
            return
        addresses = np.concatenate([addresses for _, addresses in self.stores])
        counts = [len(addresses) for _, addresses in self.stores]
        programs = np.repeat([program for program, _ in self.stores], counts)
        order = np.argsort(addresses, kind="stable")
        addresses, programs = addresses[order], programs[order]
        twice = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])
        if twice.any():
            at = int(np.argmax(twice))
            a, b = (self.place(int(program)) for program in programs[at : at + 2])
            raise RuntimeError(f"{self.name}: programs {a} and {b} store to one address")


@functools.cache
def _install() -> None:
    """Let the interpreter ask for the order and report its stores, from here on."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_dim, set_index, store = (
        builder.set_grid_dim,
        builder.set_grid_idx,
        builder.create_masked_store,
    )
    launch, running = executor.__call__, [_Launch("")]

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        running.append(_Launch(self.fn.__name__))
        try:
            launch(self, *args, **kwargs)
            running[-1].require_one_store_each()
        finally:
            running.pop()

    def set_grid_dim(nx: int, ny: int, nz: int) -> None:
        running[-1].set_grid((nx, ny, nz))
        set_dim(nx, ny, nz)

    def create_masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].store(builder.grid_idx, ptrs.data, mask.data)
        return store(ptrs, value, mask, *rest)

    executor.__call__ = run
    builder.set_grid_dim = set_grid_dim
    builder.set_grid_idx = lambda x, y, z: set_index(*running[-1].index(x, y, z))
    builder.create_masked_store = create_masked_store
