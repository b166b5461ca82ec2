"""Bytes that a call holds from its forward to its backward, and at most.

`torch.autograd.graph.saved_tensors_hooks` counts the first, each storage once and whole, without
those of parameters and buffers. They depend on versions and not on the machine, except that on a
GPU PyTorch's dropout keeps a smaller mask.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..oracle.case import dtype_name


def held(
    call: Callable[[], object], module: nn.Module | None = None, existing: Iterable[Tensor] = ()
) -> dict[str, int]:
    """Return the bytes that `call` holds for its backward, by "[shape] dtype".

    The parameters and buffers of the module do not count, nor do the tensors in `existing`.

    >>> x = torch.ones(4, 8, requires_grad=True)
    >>> held(lambda: (x * x).exp())  # x, and the result of exp
    {'[4, 8] float32': 256}
    """
    if module is not None:
        existing = [*existing, *module.parameters(), *module.buffers()]
    tensors: dict[str, int] = {}
    for t in saved(call, existing).values():
        name = f"{list(t.shape)} {dtype_name(t.dtype)}"
        tensors[name] = tensors.get(name, 0) + t.untyped_storage().nbytes()
    return dict(sorted(tensors.items(), key=lambda item: -item[1]))


def saved(call: Callable[[], object], existing: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return a tensor of each storage that autograd saves, by address, without those in `existing`.

    The graph must be alive at the end, so `call` returns its output. Tensors that a Function keeps
    as attributes of its context do not count; this package's Functions keep none.
    """
    known, tensors = set(map(_address, existing)), dict[int, Tensor]()

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().nbytes() and _address(t) not in known:
            tensors.setdefault(_address(t), t)  # alive, so that no other takes its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return tensors


def peak(call: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak bytes of tensors during `call`, without those from before it.

    On a CPU, PyTorch's profiler counts; it does not see a library's own allocations.

    >>> a = torch.ones(1000)
    >>> peak(lambda: a + (a + 1))  # two results alive
    8000
    """
    if device == "cuda":
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        result = call()
    del result
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    # Sorted by time alone, a stable sort keeps the order of simultaneous changes.
    totals = itertools.accumulate(size for _, size in sorted(changes, key=lambda c: c[0]))
    return max(totals, default=0)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence stderr, to which torch 2.15's profiler writes two lines at any KINETO_LOG_LEVEL."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
