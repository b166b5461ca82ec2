"""Plans: the launches of a call, found once, and repeated with the addresses of each later call.

A planner is a function of a `Plan` and of a call's arguments, in which meta tensors stand for the
tensors. It allocates with `plan.empty`, adds each launch of a compiled kernel with `plan.add`, and
returns stand-ins. The plan allocates the memory, launches with its addresses, and returns tensors.
`planned` keeps a plan for each key: shapes, strides, dtypes, device and alignment modulo 16 of the
tensors, and the other arguments. Tested by tests/launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import workspace

MAX_PLANS = 4096  # of one function; the rows of training batches may vary without end
ALIGNMENT = 16  # bytes, modulo which kernels are compiled for an address
STREAM = object()  # the current stream among the arguments of a launch

Values = list[Any]
_caches: list[dict[tuple[Any, ...], Plan]] = []


class Whole(NamedTuple):
    """A tensor that a step gets as it is; otherwise a step gets its address."""

    tensor: Tensor


# A fake driver replaces these three, so that calls on CPU tensors are planned as a GPU's.


def is_on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def is_current_device(index: int) -> bool:
    return torch.cuda.current_device() == index


def current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def planned(
    planner: Callable[..., Any], is_kept: Callable[[], bool] = lambda: True
) -> Callable[..., Any]:
    """Return the function that a planner plans. Its first argument is a tensor, or begins with one.

    No plan is kept on a CPU, where an emulator or Triton's interpreter runs the kernels.

    is_kept: whether a plan is made of what holds in later calls too.
    """
    plans: dict[tuple[Any, ...], Plan] = {}
    _caches.append(plans)

    @functools.wraps(planner)
    def call(*args: Any) -> Any:
        tensors: list[Tensor] = []
        parts: list[Any] = []
        _read(args, parts, tensors)
        x = tensors[0]
        if not is_on_gpu(x):
            return Plan(planner, args, tensors).run(tensors, 0)
        index = x.get_device()
        if not is_current_device(index):
            with torch.cuda.device(index):
                return call(*args)
        if not is_kept():
            return Plan(planner, args, tensors).run(tensors, current_stream(index))
        parts.append(index)
        key = tuple(parts)
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            plan = plans[key] = Plan(planner, args, tensors)
        return plan.run(tensors, current_stream(index))

    return call


def forget() -> None:
    """Delete all plans; the next calls choose their kernels and tiles again."""
    for plans in _caches:
        plans.clear()


def _read(args: Iterable[Any], key: list[Any], tensors: list[Tensor]) -> None:
    """Append what decides the launches of a call to `key`, and its tensors to `tensors`."""
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            key += arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % ALIGNMENT
        elif isinstance(arg, tuple):
            key.append(type(arg))
            _read(arg, key, tensors)
        else:
            key.append(arg)


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors in nested tuples."""
    tensors: list[Tensor] = []
    _read(args, [], tensors)
    return tensors


class Plan:
    """The launches of a call, and its memory.

    `run` fills a list of values: tensors, their addresses, the stream, constants, and what is made
    of values before, such as a struct of arguments. A step gets some of them, by their places.
    """

    def __init__(
        self, planner: Callable[..., Any], args: tuple[Any, ...], tensors: Sequence[Tensor]
    ) -> None:
        self.device, self.index = tensors[0].device, tensors[0].get_device()
        self._standins = [_stand_in(t) for t in tensors]
        # Of a stand-in's storage: -1 for flags, which are the last one.
        self._places = {_storage(t): place for place, t in enumerate(self._standins)}
        self._operands, self._flags = len(tensors), list[Tensor]()
        self._added: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        result = planner(self, *_replace(args, iter(self._standins)))
        self._number(result)

    # What a planner calls.

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate contiguous memory in each call; return its stand-in."""
        t = torch.empty(size, dtype=dtype, device="meta")
        self._places[_storage(t)] = len(self._standins)
        self._standins.append(t)
        return t

    def flags(self) -> Tensor:
        """Return the stand-in for the flags of a call's stream (`workspace.flags`)."""
        flags = torch.empty(2 + workspace.MAX_BLOCKS, dtype=torch.int32, device="meta")
        self._places[_storage(flags)] = -1
        self._flags = [flags]
        return flags

    def add(self, function: Callable[..., Any], *args: Any) -> None:
        """Call function(*args) in each call, with a tensor's address in place of a stand-in."""
        self._added.append((function, args))

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call function(*args) in each call, with a tensor in place of a stand-in."""
        self.add(function, *(Whole(arg) if isinstance(arg, Tensor) else arg for arg in args))

    def copy(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a tensor in each call; return the stand-in for the copy, which is contiguous."""
        out = self.empty(*t.shape, dtype=dtype or t.dtype)
        self.call(Tensor.copy_, out, t)
        return out

    # What a call does.

    def run(self, tensors: list[Tensor], stream: int) -> Any:
        """Allocate, launch on the stream, and return the result. tensors: the operands'; grows."""
        x = tensors[0]
        for size, stride, dtype in self._memory:
            tensors.append(x.new_empty_strided(size, stride, dtype=dtype))
        if self._flags:
            tensors.append(workspace.flags(self.device))
        values: Values = tensors + [t.data_ptr() for t in tensors]
        values.append(stream)
        values += self._constants
        for make, get in self._made:
            values.append(get(values) if make is None else make(*get(values)))
        for function, get in self._steps:
            function(*get(values))
        return values[self._result]

    def _number(self, result: Any) -> None:
        """Give each argument of the steps and the result its place among the values."""
        memory = self._standins[self._operands :]
        self._memory = [(tuple(t.shape), t.stride(), t.dtype) for t in memory]
        self._constants: list[Any] = []
        made: list[tuple[Callable[..., Any] | None, list[int]]] = []
        standins = [*self._standins, *self._flags]
        count = len(standins)
        first = 2 * count + 1  # of the constants; what is made is numbered from -1 downwards

        def constant(value: Any) -> int:
            self._constants.append(value)
            return first + len(self._constants) - 1

        def make(function: Callable[..., Any] | None, items: Iterable[Any]) -> int:
            made.append((function, [place(item) for item in items]))
            return -len(made)

        def tensor(t: Tensor) -> int:
            at = self._places[_storage(t)] % count
            base = standins[at]
            offset = t.storage_offset() - base.storage_offset()
            if (t.shape, t.stride(), offset) == (base.shape, base.stride(), 0):
                return at
            assert at >= self._operands or not offset
            layout = _Constant(t.shape), _Constant(t.stride()), _Constant(offset or None)
            return make(Tensor.as_strided, (Whole(base), *layout))

        def address(t: Tensor) -> int:
            at = self._places[_storage(t)] % count
            base = standins[at]
            assert t.storage_offset() == base.storage_offset(), "a launch gets part of a tensor"
            return count + at

        def place(item: Any) -> int:
            if isinstance(item, Whole):
                return tensor(item.tensor)
            if isinstance(item, Tensor):
                return address(item)
            if item is STREAM:
                return 2 * count
            if isinstance(item, _Constant):
                return constant(item.value)
            if isinstance(item, tuple) and _has_tensor(item):
                return make(type(item) if hasattr(item, "_fields") else None, item)
            return constant(item)

        steps = [(function, [place(arg) for arg in args]) for function, args in self._added]
        self._result = place(_wholes(result))
        last = first + len(self._constants)

        def numbered(places: list[int]) -> Callable[[Values], tuple[Any, ...]]:
            at = [last - number - 1 if number < 0 else number for number in places]
            if len(at) > 1:
                return itemgetter(*at)
            return lambda values: tuple(values[i] for i in at)

        self._made = [(function, numbered(places)) for function, places in made]
        self._steps = [(function, numbered(places)) for function, places in steps]
        if self._result < 0:
            self._result = last - self._result - 1
        del self._standins, self._places, self._added


class _Constant(NamedTuple):
    value: Any


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _stand_in(t: Tensor) -> Tensor:
    """Return a meta tensor with the tensor's layout, and its address modulo ALIGNMENT."""
    shift = t.data_ptr() % ALIGNMENT // t.element_size() if t.numel() else 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    whole = torch.empty(shift + last + 1, dtype=t.dtype, device="meta")
    return whole.as_strided(t.shape, t.stride(), shift)


def _replace(value: Any, standins: Iterator[Tensor]) -> Any:
    """Return nested tuples with the next stand-in in place of each tensor."""
    if isinstance(value, Tensor):
        return next(standins)
    if isinstance(value, tuple):
        items = [_replace(item, standins) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _wholes(value: Any) -> Any:
    """Return a result whose tensors are returned as they are."""
    if isinstance(value, Tensor):
        return Whole(value)
    if isinstance(value, tuple):
        items = [_wholes(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _has_tensor(value: tuple[Any, ...]) -> bool:
    """Return True if nested tuples have a value of each call."""
    return any(
        isinstance(item, (Tensor, Whole))
        or item is STREAM
        or (isinstance(item, tuple) and _has_tensor(item))
        for item in value
    )


# Steps that several planners have.


def contiguous(plan: Plan, t: Tensor | None) -> Tensor | None:
    """Return t, or a copy that is contiguous."""
    return t if t is None or t.is_contiguous() else plan.copy(t)


def sum_products(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Write scale · Σ a ⊙ b over the rows to out."""
    torch.sum(a * b, 0, out=out).mul_(scale)
