"""Predicted times of a layer's calls, and the M at which their strategy changes, for `explain`.

Times come from the cost models: `costs` for GPUs, `cpu_costs` for CPUs. If `lora-kernels tune` has
measured the shape on this GPU, the time is from the tuning table. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .. import costs, cpu_costs, device
from ..backends import decode4bit
from ..backends.triton import measured
from ..choice import choose as selection
from ..core.problem import MANY_ROWS, Choice, Layout, Problem, Strategy
from ..cpu_costs import Machine, Sizes
from ..device import DeviceInfo

MAX_ROWS = 1 << 17  # the largest M of `choose_by_rows`
EVERY_ROW = 256  # `choose_by_rows` tries each M up to here, and then steps by an eighth


class Part(NamedTuple):
    """One call that a layer makes, at any M. R = 0: PyTorch's base GEMM alone."""

    device: torch.device
    x_dtype: torch.dtype
    dtype: torch.dtype  # of the base GEMM
    N: int
    K: int
    R: int = 0
    a_dtype: torch.dtype = torch.float32
    b_dtype: torch.dtype = torch.float32
    four_bit: bool = False
    base: bool = True  # whether the call includes the base GEMM
    dropout: bool = False
    mixed: bool = False  # `multi_lora_linear`
    ours: bool = True  # False: PyTorch's own GEMMs, whatever `selection` would choose
    norm: bool = False  # whether DoRA's norm of each weight row is computed first
    frozen: bool = True  # whether the base weight gets no gradient
    layout: Layout | None = None  # of the base weight, for the CUDA kernels

    def problem(self, rows: int) -> Problem:
        """Return the selection problem of the call with `rows` rows."""
        return Problem(
            self.device.type,
            self.x_dtype,
            self.a_dtype,
            self.b_dtype,
            self.dtype,
            self.R,
            rows,
            self.four_bit,
            self.N,
            self.K,
            self.dropout and not self.mixed,
            self.device.index,
            self.layout,
            self.mixed,
        )

    def choose(self, rows: int) -> Choice:
        """Return `selection`'s choice; RuntimeError if a forced backend cannot run."""
        if not (self.ours and self.R):
            return Choice("torch", Strategy.LIBRARY, "")
        return selection.choose(self.problem(rows))

    def describe(self, rows: int | None) -> Description:
        """Return the choice for `rows` rows in words, or the strategies of all M if None."""
        if rows is not None:
            choice = self.choose(rows)
            return Description(choice.backend, choice.strategy, choice.reason)
        found = regions(self)
        last = max((region.rows for region in found if region.backend != "none"), default=1)
        choice = self.choose(max(last, MANY_ROWS) if found[-1].rows == last else last)
        ends = [region.rows - 1 for region in found[1:]] + [None]
        ways = [
            f"{region.way(choice.backend)} {_span(region.rows, end)}"
            for region, end in zip(found, ends, strict=True)
            if region.backend != "none"
        ]
        strategies = choice.strategy if len(ways) == 1 else ", ".join(ways)
        return Description(choice.backend, strategies, choice.reason)


class Description(NamedTuple):
    """A choice in words."""

    backend: str
    strategy: str
    reason: str


class Time(NamedTuple):
    """Seconds, and their source in words: a cost model or a measurement."""

    seconds: float
    source: str
    measured: bool = False


class Region(NamedTuple):
    """The backend and strategy from `rows` rows up to the next region."""

    rows: int
    backend: str
    strategy: str

    def way(self, backend: str) -> str:
        """Return the strategy, after the region's backend if that differs from `backend`."""
        return self.strategy if self.backend == backend else f"{self.backend} {self.strategy}"


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one layer at the requested number of rows.

    Attributes:
        seconds: of a step (forward and backward) if the model trains, else of the forward. None if
            nothing is known of the base layer or of the GPU.
        share: the layer's fraction of the time of all layers that are predicted.
        regions: the strategies of the layer's first call, by number of rows.
    """

    seconds: float | None
    source: str | None
    measured: bool
    share: float | None
    regions: tuple[Region, ...]

    def changes(self, rows: int) -> str:
        """Return the strategies of other M in words; empty if all M have the same strategy.

        >>> few, many = Region(1, "cpu", "library"), Region(64, "cpu", "fused")
        >>> Prediction(None, None, False, None, (few, many)).changes(512)
        'up to 63 rows: library'
        """
        found: dict[str, list[str]] = {}
        here = next(r for r in reversed(self.regions) if r.rows <= rows)
        ends = [region.rows - 1 for region in self.regions[1:]] + [None]
        for region, last in zip(self.regions, ends, strict=True):
            if region is here:
                continue
            found.setdefault(region.way(here.backend), []).append(_span(region.rows, last))
        return "; ".join(f"{' and '.join(spans)}: {way}" for way, spans in found.items())

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"regions": [region._asdict() for region in self.regions]}


def _span(first: int, last: int | None) -> str:
    if last is None:
        return f"from {first} rows on"
    if first == last:
        return f"at {last} row{'s' * (last > 1)}"
    return f"up to {last} rows" if first == 1 else f"{first} to {last} rows"


def choose_by_rows(problem: Problem) -> tuple[tuple[int, Choice | None], ...]:
    """Return pairs (M, choice): the choice from M rows up to the next pair's M.

    Tries M from one row to MAX_ROWS. A choice is None if a forced backend cannot run.
    """

    def choose(rows: int) -> Choice | None:
        try:
            return selection.choose(problem._replace(rows=rows))
        except RuntimeError:
            return None

    def is_change(a: Choice | None, b: Choice | None) -> bool:
        if a is None or b is None:
            return a is not b
        return (a.backend, a.strategy) != (b.backend, b.strategy)

    grid = [*range(1, EVERY_ROW + 1)]
    while grid[-1] < MAX_ROWS:
        grid.append(min(MAX_ROWS, grid[-1] * 9 // 8))
    found = [(1, choose(1))]
    for low, high in pairwise(grid):
        while is_change(choose(high), found[-1][1]):
            before, first = max(low, found[-1][0]), high  # bisect for the first M that differs
            while first - before > 1:
                middle = (before + first) // 2
                if is_change(choose(middle), found[-1][1]):
                    first = middle
                else:
                    before = middle
            found.append((first, choose(first)))
    return tuple(found)


def regions(part: Part) -> tuple[Region, ...]:
    """Return the regions of M with one backend and strategy each, from one row on."""
    if not (part.ours and part.R):
        return (Region(1, "torch", Strategy.LIBRARY),)
    return tuple(
        Region(rows, "none", "raises")
        if choice is None
        else Region(rows, choice.backend, choice.strategy)
        for rows, choice in choose_by_rows(part.problem(1))
    )


def time(part: Part, rows: int, machine: Machine | None, step: bool) -> Time | None:
    """Return the time of one call with `rows` rows.

    None if the GPU is unknown, or if an interpreter or emulator replaces it.

    machine: the CPU's bandwidth and peaks.
    """
    if part.device.type == "cpu" and machine is not None:
        if part.choose(rows).backend in ("triton", "cuda"):
            return None
        return Time(_predict_on_cpu(part, rows, machine, step), "the cost model")
    if part.device.type == "cuda":
        known = _find_tuned_time(part, rows) if step else None
        if known is not None:
            return known
        gpu = device.gpu(part.device.index)
        if costs.is_known(gpu):
            return Time(_predict_on_gpu(part, rows, gpu, step), f"the cost model for {gpu.name}")
    return None


def _predict_on_cpu(part: Part, rows: int, machine: Machine, step: bool) -> float:
    itemsize = max(part.a_dtype.itemsize, part.b_dtype.itemsize)
    sizes = Sizes(rows, part.N, part.K, part.R, part.dtype, itemsize, part.four_bit, base=part.base)
    strategy = part.choose(rows).strategy
    seconds = cpu_costs.predict(machine, sizes, strategy)
    if step:
        seconds += cpu_costs.predict(machine, sizes, strategy, backward=True)
    if step and not part.frozen:
        seconds += sizes.base_flops / machine.peaks.get(part.dtype, machine.peaks[torch.float32])
    if part.norm:
        flops = 2.0 * part.N * part.K * part.R
        fp32 = machine.peaks[torch.float32]
        seconds += max(sizes.weight_bytes / machine.bandwidth, flops / fp32)
    return seconds


def _predict_on_gpu(part: Part, rows: int, gpu: DeviceInfo, step: bool) -> float:
    """Return the predicted seconds on a GPU.

    The GEMM for dx is a forward with N and K exchanged. dA and dB read x and dY once more.
    """
    bandwidth = gpu.bandwidth * costs.BANDWIDTH_SHARE
    x, y = (rows * n * part.dtype.itemsize for n in (part.K, part.N))
    launches = (2 if part.ours and part.R else 5) * costs.LAUNCH
    if not part.base:
        return (1 + 2 * step) * ((x + 2 * y) / bandwidth + launches)
    choice = part.choose(rows)

    def predict_gemm(N: int, K: int) -> float:
        call = part._replace(N=N, K=K).problem(rows)._replace(dropout=part.dropout)
        bitsandbytes = part.four_bit and decode4bit.bitsandbytes_reason(part.device) is None
        predicted = costs.predict(gpu, call, bitsandbytes)
        backend = choice.backend if choice.backend in ("triton", "cuda") else "eager"
        same = [cost for cost in predicted if cost.backend == backend]
        exact = [cost for cost in same if cost.strategy == choice.strategy]
        return (exact or same)[0].seconds

    seconds = predict_gemm(part.N, part.K)
    if step:
        seconds += predict_gemm(part.K, part.N) + bool(part.R) * ((x + y) / bandwidth + launches)
    if step and not part.frozen:
        seconds += 2.0 * rows * part.N * part.K / (gpu.tensor_flops * costs.LIBRARY_SHARE)
    if part.norm:
        seconds += part.N * part.K * part.dtype.itemsize / bandwidth + costs.LAUNCH
    return seconds


def _find_tuned_time(part: Part, rows: int) -> Time | None:
    """Return the time that `lora-kernels tune` measured, if selection chooses that strategy."""
    choice = part.choose(rows)
    if choice.backend != "triton" or part.mixed or part.dropout or not part.base:
        return None
    target = device.gpu(part.device.index)
    sizes = rows, part.N, part.K, part.R
    known = measured.find(measured.shape(target, *sizes, part.dtype, part.a_dtype, part.four_bit))
    if known is None or known.microseconds is None or known.strategy != choice.strategy:
        return None
    return Time(known.microseconds * 1e-6, known.source, measured=True)


def total(times: Iterator[Time | None]) -> Time | None:
    """Return the sum of a layer's call times; None if one is unknown."""
    found = list(times)
    known = [time for time in found if time is not None]
    if not found or len(known) < len(found):
        return None
    sources = "; ".join(dict.fromkeys(time.source for time in known))
    return Time(sum(t.seconds for t in known), sources, all(t.measured for t in known))
