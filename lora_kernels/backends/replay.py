"""Record the launches of a call, and replay them without the Python that chose them.

A GPU backend's function allocates tensors and launches kernels. Its kernels, tiles and sizes follow
from the signature of the call: the shapes, strides, dtypes and alignments of its tensors, and its
other arguments. The second call with a signature is recorded. From the third call on, the outputs
and one workspace are allocated, and the compiled kernels are launched with the new addresses.

A call with other work, such as a matrix product of PyTorch or part of an operand, runs as written
every time; the logger "lora_kernels" tells the reason at level INFO. Tested by tests/replay.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import workspace

F = TypeVar("F", bound=Callable[..., Any])

MAX_SIGNATURES = 4096  # of one function; the rows of training batches may vary without end
ALIGNMENT = 256  # bytes, of temporaries in the workspace; kernels are compiled for multiples of 16
STREAM = object()  # the current stream among the arguments of a recorded launch

_logger = logging.getLogger("lora_kernels")
_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default)
_SEEN = "called once"
_caches: list[dict[tuple[Any, ...], Replay | str]] = []
_thread = threading.local()  # autograd runs the backward in a thread of its own


def replayed(function: F, has_hooks: Callable[[], bool] = lambda: False) -> F:
    """Decorate a backend's function, whose first argument is a tensor or begins with x.

    has_hooks: returns True while a profiler wants the tensors of each launch.
    """
    cache: dict[tuple[Any, ...], Replay | str] = {}
    _caches.append(cache)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if not is_on_gpu(x) or has_hooks():
            return function(*args)
        tensors: list[Tensor] = []
        read: list[Any] = [x.get_device()]
        _read_signature(args, read, tensors)
        signature = tuple(read)
        known = cache.get(signature)
        if isinstance(known, Replay):
            return known(tensors)
        if known is None:
            if len(cache) >= MAX_SIGNATURES:
                cache.clear()
            cache[signature] = _SEEN
        elif known is _SEEN and not workspace.is_capturing(x.device):
            recorder = _thread.recorder = Recorder(tensors)
            try:
                with recorder:
                    result = function(*args)
            finally:
                _thread.recorder = None
            cache[signature] = found = recorder.finish(result)
            if isinstance(found, str):
                _logger.info("%s is not replayed: %s", function.__name__, found)
            return result
        return function(*args)

    return call  # type: ignore[return-value]


def forget() -> None:
    """Delete all recorded launches; the next calls choose their kernels and tiles again."""
    for cache in _caches:
        cache.clear()


def current_recorder() -> Recorder | None:
    """Return the recorder of this thread's call, to which launchers add each launch."""
    return getattr(_thread, "recorder", None)


def _read_signature(args: Iterable[Any], signature: list[Any], tensors: list[Tensor]) -> None:
    """Append what decides the launches of a call to `signature`, and its tensors to `tensors`."""
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
            signature += arg.shape, arg.stride(), arg.dtype, arg.data_ptr() & 15
        elif isinstance(arg, tuple):
            signature.append(type(arg))
            _read_signature(arg, signature, tensors)
        else:
            signature.append(arg)


# A fake driver replaces these three, so that calls on CPU tensors are replayed.


def is_on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def is_current_device(index: int) -> bool:
    return torch.cuda.current_device() == index


def current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


@dataclass(frozen=True)
class Replay:
    """The launches of a signature. They get the addresses of operands, outputs, temporaries, flags.

    Args:
        outputs: size, stride and dtype of each.
        temporaries: where each begins in the workspace, in bytes.
        size: of the workspace, in bytes.
        has_flags: whether a launch is cooperative.
        launches: functions of the list of addresses and the stream.
        result: a function of the list of operands and outputs.
    """

    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    temporaries: list[int]
    size: int
    has_flags: bool
    launches: list[Callable[[list[int], int], Any]]
    result: Callable[[list[Tensor], None], Any]

    def __call__(self, tensors: list[Tensor]) -> Any:
        x = tensors[0]
        index = x.get_device()
        if not is_current_device(index):
            with torch.cuda.device(index):
                return self(tensors)
        for size, stride, dtype in self.outputs:
            tensors.append(x.new_empty_strided(size, stride, dtype=dtype))
        addresses = [t.data_ptr() for t in tensors]
        if self.size:
            memory = x.new_empty(self.size, dtype=torch.uint8)
            start = memory.data_ptr()
            addresses += [start + offset for offset in self.temporaries]
        if self.has_flags:
            addresses.append(workspace.flags(x.device).data_ptr())
        stream = current_stream(index)
        for launch in self.launches:
            launch(addresses, stream)
        return self.result(tensors, None)


class Recorder(TorchDispatchMode):
    """Note what a call allocates and launches, and whether that is all it does."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands, self.flags = operands, workspace.flags(operands[0].device)
        self.allocated: dict[int, Tensor] = {}  # by address; kept, so that no two have the same
        self.launches: list[tuple[Any, tuple[Any, ...], list[Tensor]]] = []
        self.reason = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated[out.data_ptr()] = out
        elif not (func.is_view or func is _aten.promote_types.default):
            self.reason = f"it calls {func}"
        return out

    def add(self, launch: Any, args: tuple[Any, ...], tensors: Iterable[Tensor]) -> None:
        """Note launch(*args).

        Args:
            args: nested tuples of numbers, tensors or their addresses, and STREAM.
            tensors: every tensor that the kernel reads or writes.
        """
        self.launches.append((launch, args, list(tensors)))

    def finish(self, result: Any) -> Replay | str:
        """Return the replay, or the reason why there is none."""
        places = {t.data_ptr(): i for i, t in enumerate(self.operands)}
        if 0 in places or len(places) < len(self.operands):
            return "operands share memory or are empty"
        outputs, offsets, size = [], [], 0
        for t in tensors_of(result):
            made = self.allocated.pop(t.data_ptr(), None)
            if made is None or made.untyped_storage().nbytes() != t.nbytes:
                return self.reason or "a result is part of another tensor"
            places[t.data_ptr()] = len(places)
            outputs.append((tuple(t.shape), t.stride(), t.dtype))
        used = {t.data_ptr() for _, _, tensors in self.launches for t in tensors}
        for address, t in self.allocated.items():
            if address in used:
                places[address] = len(places)
                offsets.append(size)
                size += -(-t.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        if has_flags := self.flags.data_ptr() in used:
            places[self.flags.data_ptr()] = len(places)
        if self.reason or not self.launches or not used <= places.keys():
            return self.reason or "a kernel gets part of an operand, or there is none"
        launches = [_function(launch, args, places) for launch, args, _ in self.launches]
        return Replay(outputs, offsets, size, has_flags, launches, _function(None, result, places))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


def _function(
    launch: Any, value: Any, places: Mapping[int, int]
) -> Callable[[list[Any], Any], Any]:
    """Return a function of a list v that returns the value, or launch(*value) if given.

    Tensors and addresses in the value become v[places[address]], and STREAM the second argument.
    Compiled source builds nested tuples several times faster than a walk through them.
    """
    names: dict[str, Any] = {"launch": launch}

    def source(item: Any) -> str:
        address = item.data_ptr() if isinstance(item, Tensor) else item
        if item is STREAM:
            return "stream"
        if type(address) is int and address in places:  # sizes are smaller than addresses
            return f"v[{places[address]}]"
        if isinstance(item, tuple):
            items = "".join(f"{source(i)}, " for i in item)
            if launch is not None or type(item) is tuple:  # kernels take a tuple for a NamedTuple
                return f"({items})"
            item, call = type(item), f"({items})"
        else:
            call = ""
        name = f"c{len(names)}"
        names[name] = item
        return name + call

    function = "launch" if launch is not None else ""
    return eval(f"lambda v, stream: {function}{source(value)}", names)  # type: ignore[no-any-return]
