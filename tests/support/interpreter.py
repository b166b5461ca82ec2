"""Triton's interpreter, running the programs of a launch in any order, and watching them.

By itself it runs them in ascending order, in which a program that overwrites what a later one
stores goes unnoticed. In whatever order they run, a launch raises RuntimeError unless it stores
each element of its outputs once and nothing else, and if a program loads what another one stores,
or what it has stored itself.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lora_kernels.backends import triton

Order = Callable[[int], Sequence[int]]  # a number of programs -> which of them runs first, second …
Index = tuple[int, int, int]
Arguments = dict[str, Any]  # of a launch, by the names of the kernel's parameters

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


def set_program(number: int, patch: pytest.MonkeyPatch) -> None:
    """Give each program this number, which a grid of a test does not reach; skip on a GPU."""
    if not triton.is_interpreted():
        pytest.skip("the program's number is the interpreter's")
    import triton.language as tl
    from triton.runtime import interpreter

    late = interpreter.TensorHandle(np.array([number], dtype=np.int32), tl.int32)
    builder = interpreter.InterpreterBuilder
    patch.setattr(builder, "create_get_program_id", lambda self, axis: late)


def _sums(partials: Tensor, a: Arguments, has_ranks: bool = True) -> list[Tensor | None]:
    """Partial sums of ranks, and the two rows behind them."""
    R = a["R"]
    return [
        partials[:, :R] if has_ranks else None,
        partials[:, R] if a["SUM"] else None,
        partials[:, R + 1] if a["z_ptr"] is not None else None,
    ]


# Kernel -> what it stores.
OUTPUTS: dict[str, Callable[[Arguments], Sequence[Tensor | None]]] = {
    "fused": lambda a: [a["y_ptr"], a["z_ptr"], a["p_ptr"]],
    "shrink": lambda a: [a["partials_ptr"]],
    "outer": lambda a: _sums(a["partials_ptr"], a, a["RANKS"]),
    "reduce": lambda a: [a["grad_ptr"], a["sum_ptr"], a["sum_z_ptr"]],
    "dequantize": lambda a: [a["w_ptr"]],
    "gated": lambda a: [a["h_ptr"]],
    "gated_backward": lambda a: [a["dg_ptr"], a["du_ptr"], a["h_ptr"]],
    "gated_update": lambda a: [a["h_ptr"]],
    "gated_update_backward": lambda a: [a[f"{name}_ptr"] for name in ("dg", "du", "h", "partials")],
    "gated_gradients": lambda a: [a[f"{name}_ptr"] for name in ("dA", "dB_gate", "dB_up")],
    "cross_entropy": lambda a: [a["loss_ptr"], a["y_ptr"] if a["HAS_GRADIENT"] else None],
}


_NONE = np.zeros(0, dtype=np.int64)


class _Launch:
    """The programs of a launch: which runs next, and what each stores, and loads of the outputs."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        self.name = name.removesuffix("_kernel")
        self.grid: Index = (1, 1, 1)
        self.order: Sequence[int] = [0]
        self.stores: list[tuple[int, Any]] = []  # program, addresses
        self.loads: list[tuple[int, Any, int]] = []  # and how many stores came before
        self.outputs: Any = None  # sorted addresses, of this package's kernels
        self.bounds: list[tuple[int, int]] = []  # of each output
        self.patched: set[int] = set()  # modules
        if self.name in OUTPUTS:
            tensors = (t for t in OUTPUTS[self.name](arguments) if t is not None and t.numel())
            outputs = [_addresses(t) for t in tensors]
            self.outputs = np.sort(np.concatenate([_NONE, *outputs]))
            self.bounds = [(each.min(), each.max()) for each in outputs]

    def set_grid(self, grid: Index) -> None:
        self.grid, self.order = grid, _order(math.prod(grid))

    def index(self, x: int, y: int, z: int) -> Index:
        """Return the program that runs in place of this one."""
        return self.place(self.order[self.number((x, y, z))])

    def number(self, program: Index) -> int:
        (x, y, z), (_, ny, nz) = program, self.grid
        return (x * ny + y) * nz + z

    def place(self, number: int) -> Index:
        _, ny, nz = self.grid
        return number // (ny * nz), number // nz % ny, number % nz

    def store(self, program: Index, addresses: Any, mask: Any) -> bool:
        """Note a store; return True if it leaves other memory as it is."""
        stored = addresses[mask]
        self.stores.append((self.number(program), stored))
        return self.outputs is None or _are_in(stored, self.outputs)[1].all()

    def load(self, program: Index, addresses: Any, mask: Any) -> None:
        first, last = addresses.min(), addresses.max()
        if any(first <= high and low <= last for low, high in self.bounds):
            self.loads.append((self.number(program), addresses[mask], len(self.stores)))

    def check(self) -> None:
        """Raise RuntimeError for what the module's docstring says."""
        counts = [len(addresses) for _, addresses in self.stores]
        addresses = np.concatenate([_NONE, *(addresses for _, addresses in self.stores)])
        programs = np.repeat([program for program, _ in self.stores], counts)
        times = np.repeat(np.arange(len(self.stores)), counts)
        order = np.argsort(addresses, kind="stable")
        addresses, programs, times = addresses[order], programs[order], times[order]
        twice = addresses[1:] == addresses[:-1]
        if twice.any():
            at = int(np.argmax(twice))
            a, b = (self.place(int(program)) for program in programs[at : at + 2])
            raise RuntimeError(f"{self.name}: programs {a} and {b} store to one address")
        if self.outputs is None:
            return
        others = np.setdiff1d(addresses, self.outputs)
        missing, count = np.setdiff1d(self.outputs, addresses), len(self.outputs)
        if len(others):
            raise RuntimeError(f"{self.name}: stores {len(others)} elements outside of its outputs")
        if len(missing):
            raise RuntimeError(f"{self.name}: {len(missing)} of {count} elements not stored")
        for program, loaded, time in self.loads:
            at, are_stored = _are_in(loaded, addresses)
            if (are_stored & ((programs[at] != program) | (times[at] < time))).any():
                raise RuntimeError(
                    f"{self.name}: program {self.place(program)} loads what is stored "
                    "by another program or was stored before"
                )


def _are_in(addresses: Any, of: Any) -> tuple[Any, Any]:
    """Return where sorted addresses may have each of these, and whether they do."""
    at = np.searchsorted(of, addresses).clip(max=len(of) - 1)
    return at, of[at] == addresses


def _addresses(t: Tensor) -> Any:
    """Return the addresses of a tensor's elements."""
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    return t.data_ptr() + t.element_size() * offsets


@functools.cache
def _install() -> None:
    """Let the interpreter ask for the order and report loads and stores, from here on."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    launch, running = executor.__call__, [_Launch("", {})]
    patch = interpreter._patch_lang

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        running.append(_Launch(self.fn.__name__, kwargs))
        try:
            launch(self, *args, **kwargs)
            running[-1].check()
        finally:
            running.pop()

    def patch_lang(fn: Any) -> Any:
        """Patch triton.language as a module sees it, once a launch: Triton does so at each call of
        a device function."""
        module = id(fn.__globals__)
        if module in running[-1].patched:
            return None
        running[-1].patched.add(module)
        return patch(fn)

    def set_grid_dim(nx: int, ny: int, nz: int) -> None:
        running[-1].set_grid((nx, ny, nz))
        set_dim(nx, ny, nz)

    def create_masked_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        running[-1].load(builder.grid_idx, ptrs.data, mask.data)
        return load(ptrs, mask, *rest)

    def create_masked_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        is_inside = running[-1].store(builder.grid_idx, ptrs.data, mask.data)
        return store(ptrs, value, mask, *rest) if is_inside else None

    executor.__call__ = run
    interpreter._patch_lang = patch_lang
    builder.set_grid_dim = set_grid_dim
    builder.set_grid_idx = lambda x, y, z: set_index(*running[-1].index(x, y, z))
    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
