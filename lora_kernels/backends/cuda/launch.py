"""Launch kernels on torch's current stream, and pack their arguments."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.dtypes import DTYPE_NUMBERS
from .. import replay
from . import is_emulated, module

if TYPE_CHECKING:
    from ...core.packed4bit import Packed4bit

_WIDE = 16  # bytes of the widest load

MatrixArg = tuple[int, int, int, int, bool]
VectorArg = tuple[int, int]


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a tensor. The emulator fills it with NaN, to expose reads of unwritten memory."""
    if is_emulated() and dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=like.device)
    return torch.empty(shape, dtype=dtype, device=like.device)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


# Arguments in the format of csrc/cuda/bindings.cpp.


def matrix(t: Tensor | None) -> MatrixArg | None:
    """Pack address, dtype, strides, and whether rows are aligned multiples of 16 bytes."""
    if t is None:
        return None
    (row, col), address, size = t.stride(), t.data_ptr(), t.element_size()
    vectors = col == 1 and row * size % _WIDE == 0 and address % _WIDE == 0
    return address, DTYPE_NUMBERS[t.dtype], row, col, vectors


def whole_rows(t: Tensor) -> Tensor:
    """Return t, or a copy if its rows are not aligned multiples of 16 bytes."""
    packed = matrix(t)
    return t if packed and packed[4] else t.clone(memory_format=torch.contiguous_format)


def vector(t: Tensor | None) -> VectorArg | None:
    return None if t is None else (t.data_ptr(), DTYPE_NUMBERS[t.dtype])


def codes(c: Packed4bit | None, shape: tuple[int, int]) -> tuple[Any, ...] | None:
    """Pack a 4-bit weight. shape: the stored shape of the weight."""
    if c is None:
        return None
    scales = c.absmax, c.nested_code, c.nested_absmax, c.offset
    addresses = map(pointer, (c.packed, c.code, *scales))
    log2_block = c.blocksize.bit_length() - 1
    log2_nested = 0 if c.nested_absmax is None else c.nested_blocksize.bit_length() - 1
    whole_rows = shape[1] % 32 == 0 and c.packed.data_ptr() % _WIDE == 0
    return *addresses, log2_block, log2_nested, *shape, whole_rows


def run(name: str, on: Tensor, touched: dict[str, Tensor | None], *args: Any) -> Any:
    """Launch the kernel `name` on the device and current stream of the tensor `on`.

    touched: all tensors that the kernel reads or writes. The emulator checks accesses and counts
        bytes under their names.
    """
    launchers = module()
    call = getattr(launchers, name)
    if not is_emulated():
        index = on.get_device()
        if (recorder := replay.current_recorder()) is not None:
            tensors = (t for t in touched.values() if t is not None)
            recorder.add(call, (args, (replay.STREAM, index)), tensors)
        return call(args, (replay.current_stream(index), index))
    named = ((key, t) for key, t in touched.items() if t is not None and t.numel())
    launchers.allow_ranges(tuple((key, t.data_ptr(), _span(t)) for key, t in named))
    out = call(args, (_stream, 0))
    if _waiting is None:
        launchers.synchronize()
        traffic.extend(launchers.read_traffic())
    else:
        _waiting.extend(touched.values())
    return out


# Of emulated launches, set by tests: their stream; while they are deferred, their tensors.
_stream = 0
_waiting: list[Tensor | None] | None = None
# The traffic of emulated kernels: (kernel, {name: (bytes read, bytes written)}).
traffic: deque[tuple[str, dict[str, tuple[int, int]]]] = deque(maxlen=1000)


def _span(t: Tensor) -> int:
    """Return the number of bytes from the first to the last element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def of_codes(c: Packed4bit | None) -> dict[str, Tensor | None]:
    """Return the tensors of a 4-bit weight by name."""
    return (
        {} if c is None else {name: t for name, t in c._asdict().items() if isinstance(t, Tensor)}
    )
