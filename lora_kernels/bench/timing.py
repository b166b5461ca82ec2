"""Times of calls that take turns in one process, and what this machine can reach at best."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu import native
from ..core.dtypes import DTYPE_NUMBERS

COLD_BYTES = 64 << 20  # twice the L3 cache that a core reaches on AMD's Zen, 32 MiB
FEWEST = 5  # rounds, however long one takes


@dataclass(frozen=True)
class Machine:
    """The rates that bound a call.

    Args:
        bandwidth: bytes a second.
        peaks: operations a second (two a multiply-add) by dtype.
    """

    bandwidth: float
    peaks: Mapping[torch.dtype, float]


@dataclass(frozen=True)
class Times:
    """Seconds: the minimum, the median, and the quintiles around it."""

    minimum: float
    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> Times:
        """Build from the rounds of one call.

        >>> Times.from_seconds([2.0, 4.0, 6.0]).p50
        4.0
        """
        return cls(min(seconds), *_quintiles(seconds), len(seconds))


def _quintiles(values: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


Timeable = Callable[[], object]


class Parts(NamedTuple):
    """A call of two parts, timed as one and each by itself: the second takes what the first
    returned."""

    first: Timeable
    second: Callable[[Any], object]

    def __call__(self) -> object:
        return self.second(self.first())


Clock = Callable[[Timeable | Parts, int], tuple[float, float]]


def interleave(calls: Mapping[str, Timeable | Parts], **options: Any) -> dict[str, Times]:
    """Time the calls in turns, each leading in turn, so that drift hits all of them alike.

    options: of `interleave_parts`; by default about 3 seconds.

    >>> list(interleave({"a": lambda: 1, "b": lambda: 2}, seconds=0.0))
    ['a', 'b']
    """
    return interleave_parts(calls, **{"seconds": 3.0, **options})[0]


def interleave_parts(
    calls: Mapping[str, Timeable | Parts],
    *,
    seconds: float,
    min_rounds: int = 9,
    max_rounds: int = 201,
    repeat: int = 1,
    device: str = "cpu",
    clock: Clock | None = None,
) -> tuple[dict[str, Times], dict[str, Times], dict[str, Times]]:
    """Time as `interleave` does, and also the first and second parts of calls that are `Parts`.

    Warm: the same arguments every round, after one round that is not counted. Rounds go on for
    about `seconds` in all, at least `min_rounds` of them, or FEWEST if those would take longer than
    twice that, and at most `max_rounds`. `repeat` calls are timed as one, for those too short for
    the clock. On a GPU its events are read. A given clock makes `repeat` calls, and returns the
    seconds of all, and of their second parts.

    >>> parts = {"a": Parts(lambda: 1, lambda one: one + 1)}
    >>> whole, first, second = interleave_parts(parts, seconds=0.0)
    >>> whole["a"].p50 > max(first["a"].p50, second["a"].p50)
    True
    """
    names = list(calls)
    whole: dict[str, list[float]] = {name: [] for name in names}
    in_parts = [name for name, call in calls.items() if isinstance(call, Parts)]
    first: dict[str, list[float]] = {name: [] for name in in_parts}
    second: dict[str, list[float]] = {name: [] for name in in_parts}
    clock = clock or (_on_gpu if device == "cuda" else _on_cpu)
    begun, spent, round_ = time.perf_counter(), 0.0, -1
    while round_ < max_rounds and (
        spent < seconds or round_ < (min_rounds if spent < 2 * seconds else min(min_rounds, FEWEST))
    ):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed, second_elapsed = clock(calls[name], repeat)
            if round_ >= 0:
                whole[name].append(elapsed / repeat)
            if round_ >= 0 and name in second:
                first[name].append((elapsed - second_elapsed) / repeat)
                second[name].append(second_elapsed / repeat)
        round_ += 1
        if round_ == 0:
            begun = time.perf_counter()  # the first may have compiled something
        spent = time.perf_counter() - begun
    return _times(whole), _times(first), _times(second)


def _times(rounds: dict[str, list[float]]) -> dict[str, Times]:
    return {name: Times.from_seconds(seconds) for name, seconds in rounds.items()}


def _on_cpu(call: Timeable | Parts, repeat: int) -> tuple[float, float]:
    """Seconds of the whole, and of the second part."""
    second_elapsed = 0.0
    start = time.perf_counter()
    for _ in range(repeat):
        if isinstance(call, Parts):
            result = call.first()
            middle = time.perf_counter()
            call.second(result)
            second_elapsed += time.perf_counter() - middle
        else:
            call()
    return time.perf_counter() - start, second_elapsed


def _on_gpu(call: Timeable | Parts, repeat: int) -> tuple[float, float]:
    """Seconds between two events, once the device has done all that came before."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    second_marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeat):
        if isinstance(call, Parts):
            marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            result = call.first()
            marks[0].record()
            call.second(result)
            marks[1].record()
            second_marks.append(marks)
        else:
            call()
    end.record()
    end.synchronize()
    second_ms = sum(float(a.elapsed_time(b)) for a, b in second_marks)
    return float(begin.elapsed_time(end)) / 1e3, second_ms / 1e3


class TokenClock:
    """A `streamer` for `generate` that records the time of each token.

    shown: another streamer, which gets the tokens too.
    """

    def __init__(self, shown: Any = None) -> None:
        self.shown, self.times = shown, list[float]()
        self.start = time.perf_counter()

    def put(self, tokens: Tensor) -> None:  # the first call has the prompt
        self.times.append(time.perf_counter() - self.start)
        if self.shown:
            self.shown.put(tokens)

    def end(self) -> None:
        if self.shown:
            self.shown.end()

    @property
    def steps(self) -> list[float]:
        """The seconds of each token after the first; the first token took times[1]."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def cold_bytes(device: str) -> int:
    """Return the bytes of weights that calls go through in turn, so that none is in the last-level
    cache: twice a GPU's L2 cache, if that is more than COLD_BYTES."""
    if device == "cpu":
        return COLD_BYTES
    return max(COLD_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes read and written a second by a plain copy that no cache holds.

    The rates of a machine are told by the fast quintile: by the median, whatever else ran on it
    meanwhile would be taken for the machine's own.
    """
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, seconds=1.0, device=device)
    return 2 * source.numel() / times["copy"].p20


def product_peak(dtype: torch.dtype, n: int = 2048, device: str = "cpu") -> float:
    """Operations a second (two a multiply-add) of the library GEMM of two [n, n]."""
    a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
    times = interleave({"mm": lambda: torch.mm(a, b)}, seconds=1.0, min_rounds=5, device=device)
    return float(2 * n**3 / times["mm"].p20)


def read_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes read a second by a sum that no cache holds: more than of a copy, which also writes."""
    source = torch.zeros(megabytes << 18, dtype=torch.float32, device=device)
    times = interleave({"sum": source.sum}, seconds=1.0, device=device)
    return (megabytes << 20) / times["sum"].p20


def peak(dtype: torch.dtype, reached: float) -> float | None:
    """Return the operations a second (two a multiply-add) that this CPU's instructions allow.

    The native kernels multiply and add in registers, on torch's threads: by FMA, for bfloat16 by
    dot products or AMX tiles too. A float32 product may be six of bfloat16 on tiles. A GEMM of
    torch may use instructions that these kernels lack (float16's), or that LORA_KERNELS_CPU_ISA
    turned off: the peak is at least what it reached. None without the native kernels.

    Args:
        reached: operations a second of a GEMM in this dtype.
    """
    if native.module is None:
        return None
    peaks = [reached, _register_peak(torch.float32)]
    if dtype is torch.bfloat16:  # dot products may be slower than FMA: half as fast on Intel's
        peaks.append(_register_peak(dtype))
    elif dtype is torch.float32 and native.isa == "amxbf16":
        peaks.append(_register_peak(torch.bfloat16) / 6)
    return max(peaks)


def _register_peak(dtype: torch.dtype) -> float:
    assert native.module is not None
    arguments = DTYPE_NUMBERS[dtype], 1 << 20, torch.get_num_threads()  # milliseconds
    flops: float = native.module.multiply_add(*arguments)
    run = functools.partial(native.module.multiply_add, *arguments)
    return flops / interleave({"run": run}, seconds=0.5)["run"].p20
