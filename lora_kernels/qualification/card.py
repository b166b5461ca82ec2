"""A worker's access to the card: streams, CUDA graphs and clocks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import cuda
from ..choice import choose as selection
from ..choice import verdicts
from ..choice.verdicts import Group
from .plan import Claim

FREE = 2 << 30  # bytes that the claims may need: the timed weights, several times
# Cycles that a stream sleeps: while a graph and two events are launched, 0.16 ms or more at up to
# 3 GHz; and while Python launches calls, 1 ms or more.
FILL, BUSY = 500_000, 3_000_000
CLOCK = 3e9  # cycles a second, above those of any GPU, so that a sleep is never too short


class Clocks(NamedTuple):
    """Two clocks of the same calls, in seconds of all of them.

    Args:
        device: from the first kernel to the last, without waiting for launches.
        host: of the Python code that launches them.
        is_captured: whether `device` replays a CUDA graph.
    """

    device: Callable[[], float]
    host: Callable[[], float]
    is_captured: bool


def capture(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of the call, and the call's result, which a replay overwrites.

    Before, on the same stream, the call allocates what it keeps and records its launches. The
    context `torch.cuda.graph` would empty the allocator's cache and, before torch 2.9, collect
    garbage each time, which takes longer than all the rest.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            found = call()
        finally:
            graph.capture_end()
    return graph, found


def device_seconds(launch: Callable[[], object], cycles: int) -> float:
    """Return the device's seconds of what `launch` launches, which takes the host fewer cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


class Card:
    """The worker's access to the first CUDA device. A subclass stands for one in tests.

    Attributes:
        device: of the tensors.
        many: M, N and K of a call with several times the blocks that fit the card.
        whole: N and K of calls with whole rows of 16 bytes. K is split in both directions, as it
            is in the timed calls.
        repeats: how often "memory" and "two streams" compare a call's bits.
        cold_bytes: of weights that calls read in turn, so that none is in a cache.
    """

    device = "cuda"
    many = (304, 33792, 576)
    whole = (528, 576)
    repeats = 10

    def __init__(self) -> None:
        torch.empty(1, device="cuda")  # the context: fails if the card accepts no other
        if cuda.unavailable_reason() is None:
            why = cuda.unsupported_device_reason("cuda", 0)
            if why is not None:  # an old card, or a driver older than the kernels' CUDA
                raise RuntimeError(why)
        free, _ = torch.cuda.mem_get_info()
        if free < FREE:
            raise RuntimeError(
                f"{free >> 20} MiB of the card's memory are free, want {FREE >> 20} MiB: "
                "end what else runs on it"
            )
        self.cold_bytes = 2 * int(torch.cuda.get_device_properties(0).L2_cache_size)

    def key(self) -> dict[str, str]:
        """Return the facts that the parent compares with its own."""
        return verdicts.key(0)

    def engine(self, group: Group) -> AbstractContextManager[Any]:
        """Force the group's backend and strategy."""
        return selection.backend(group.backend, group.strategy)

    def before(self, claim: Claim) -> None:
        """Is called when a claim begins."""

    def free_memory(self) -> None:
        """Return the memory of graphs that are no longer there to the device."""
        torch.cuda.empty_cache()

    @functools.cached_property
    def aside(self) -> torch.cuda.Stream:
        """The stream on which calls are captured: each stream keeps memory of its own."""
        return torch.cuda.Stream()

    def synchronize(self) -> None:
        """Wait for the device; raises RuntimeError if it is broken."""
        torch.cuda.synchronize()

    def concurrently(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the results of calls on streams of their own, whose kernels run at once.

        All streams wait for one that sleeps until everything is launched: Python takes longer for
        a call than its kernels do.
        """
        torch.cuda.synchronize()
        gate, start = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(gate):
            torch.cuda._sleep(BUSY)
            start.record()
        found = []
        for call in calls:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                found.append(call())
        torch.cuda.synchronize()
        return found

    def replays(self, call: Callable[[], Tensor], count: int) -> Iterator[Tensor]:
        """Capture the call in a graph, and yield its result after each replay."""
        graph, y = capture(call, self.aside)
        for _ in range(count):
            graph.replay()
            torch.cuda.synchronize()
            yield y

    def clocks(self, name: str, call: Callable[[int], object], count: int) -> Clocks:
        """Return clocks of `call(0)` to `call(count - 1)`, which are warmed up and captured here.

        name: of the engine that is forced.
        """

        def calls() -> None:
            for number in range(count):
                call(number)

        def host() -> float:
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY)
            begun = time.perf_counter()
            calls()
            return time.perf_counter() - begun

        try:
            graph, _ = capture(calls, self.aside)
        except RuntimeError:  # what cannot be captured: a call that synchronizes, for one
            torch.cuda.synchronize()
            host()
            cycles = BUSY + int(2 * CLOCK * host())
            return Clocks(functools.partial(device_seconds, calls, cycles), host, False)
        return Clocks(functools.partial(device_seconds, graph.replay, FILL), host, True)
