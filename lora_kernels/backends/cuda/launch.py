"""Launch kernels on torch's current stream, and pack their arguments."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.dtypes import DTYPE_NUMBERS
from ..launches import STREAM, Plan, Whole
from . import is_emulated, module

if TYPE_CHECKING:
    from ...core.codes import Codes

_WIDE = 16  # bytes of the widest load

# Arguments in the format of csrc/cuda/bindings.cpp, with stand-ins for addresses.
MatrixArg = tuple[Tensor, int, int, int, bool]
VectorArg = tuple[Tensor, int]


def empty(plan: Plan, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a tensor. The emulator fills it with NaN, to expose reads of unwritten memory."""
    t = plan.empty(*shape, dtype=dtype)
    if is_emulated() and dtype.is_floating_point:
        plan.call(Tensor.fill_, t, float("nan"))
    return t


def pointer(t: Tensor | None) -> Tensor | int:
    return 0 if t is None else t


def matrix(t: Tensor | None) -> MatrixArg | None:
    """Pack address, dtype, strides, and whether rows are aligned multiples of 16 bytes."""
    if t is None:
        return None
    (row, col), size = t.stride(), t.element_size()
    vectors = col == 1 and row * size % _WIDE == 0 and t.data_ptr() % _WIDE == 0
    return t, DTYPE_NUMBERS[t.dtype], row, col, vectors


def whole_rows(plan: Plan, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return t, or a copy if it has another dtype or its rows are not aligned, whole 16 bytes."""
    packed = matrix(t)
    is_ready = packed and packed[4] and t.dtype is (dtype or t.dtype)
    return t if is_ready else plan.copy(t, dtype)


def vector(t: Tensor | None) -> VectorArg | None:
    return None if t is None else (t, DTYPE_NUMBERS[t.dtype])


def codes(c: Codes | None, shape: tuple[int, int]) -> tuple[Any, ...] | None:
    """Pack a 4-bit weight. shape: the stored shape of the weight."""
    if c is None:
        return None
    scales = c.absmax, c.nested_code, c.nested_absmax, c.offset
    addresses = map(pointer, (c.packed, c.code, *scales))
    log2_block = c.blocksize.bit_length() - 1
    log2_nested = c.nested_blocksize.bit_length() - 1
    whole_rows = shape[1] % 32 == 0 and c.packed.data_ptr() % _WIDE == 0
    return *addresses, log2_block, log2_nested, *shape, whole_rows


def with_addresses(args: Any) -> Any:
    """Return packed arguments with some address for each stand-in."""
    if isinstance(args, Tensor):
        return _WIDE
    return tuple(map(with_addresses, args)) if isinstance(args, tuple) else args


def run(plan: Plan, name: str, touched: dict[str, Tensor | None], *args: Any) -> None:
    """Launch the kernel `name` in each call of the plan, on the stream and device of the call.

    touched: all tensors that the kernel reads or writes. The emulator checks accesses and counts
        bytes under their names.
    """
    if not is_emulated():
        plan.add(getattr(module(), name), args, (STREAM, plan.index))
        return
    named = {key: t for key, t in touched.items() if t is not None}
    plan.add(_emulate, name, tuple(named), args, *map(Whole, named.values()))


def _emulate(name: str, keys: tuple[str, ...], args: tuple[Any, ...], *tensors: Tensor) -> None:
    emulate(name, dict(zip(keys, tensors, strict=True)), args)


def emulate(name: str, touched: dict[str, Tensor], args: tuple[Any, ...]) -> None:
    """Run the kernel `name` in the emulator, which allows it to access these tensors alone."""
    launchers = module()
    named = ((key, t) for key, t in touched.items() if t.numel())
    launchers.allow_ranges(tuple((key, t.data_ptr(), _span(t)) for key, t in named))
    getattr(launchers, name)(args, (_stream, 0))
    if _waiting is None:
        launchers.synchronize()
        traffic.extend(launchers.read_traffic())
    else:
        _waiting.extend(touched.values())


# Of emulated launches, set by tests: their stream; while they are deferred, their tensors.
_stream = 0
_waiting: list[Tensor] | None = None
# The traffic of emulated kernels: (kernel, {name: (bytes read, bytes written)}).
traffic: deque[tuple[str, dict[str, tuple[int, int]]]] = deque(maxlen=1000)


def _span(t: Tensor) -> int:
    """Return the number of bytes from the first to the last element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def of_codes(c: Codes | None) -> dict[str, Tensor | None]:
    """Return the tensors of a 4-bit weight by name."""
    return (
        {} if c is None else {name: t for name, t in c._asdict().items() if isinstance(t, Tensor)}
    )
