"""The table of `bench` and its one runner.

An entry has the calls of one case: ours and the baselines. `run` checks each of them against the
oracle, then times them in turns and counts their memory. A suite yields entries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..oracle import tolerance
from . import memory, timing
from .baselines import cycle_through
from .functions import one_line
from .results import Facts, Result, Row, is_ours, provenance, summary
from .timing import Parts, Times

Forward = Callable[[], Any]
STEP = ("forward", "backward", "step")  # forward and backward are the parts of steps


class Verdict(NamedTuple):
    """The rms error of y beside float64, and what misses the tolerance, or "" if nothing does."""

    error: float | None = None
    miss: str = ""


@dataclass(kw_only=True)
class Call:
    """One of an entry's calls.

    Args:
        forwards: compute y; several over copies of the weight, which a cold cache needs.
        leaves: x and what trains, for the gradients of a step. Empty if the call has no step.
        dy: the gradient of y.
        there: a module or tensors whose memory is not the call's.
        check: compares the results with the oracle; None for a bound such as the frozen layer.
    """

    forwards: Sequence[Forward]
    leaves: Sequence[Tensor] = ()
    dy: Any = None
    there: Iterable[Tensor] = ()
    check: Callable[[], Verdict] | None = None

    def forward(self, cache: str) -> Forward:
        """Return a forward: of the first weights, or of all in turn with a cold cache."""
        return cycle_through(self.forwards) if cache == "cold" else self.forwards[0]

    def step(self, cache: str) -> Parts:
        """Return forward and backward."""
        backward = partial(torch.autograd.grad, inputs=self.leaves, grad_outputs=self.dy)
        return Parts(self.forward(cache), backward)


@dataclass(kw_only=True)
class Entry:
    """Calls that compute the same.

    Args:
        key: the fields that name the rows.
        calls: by name.
        modes: what is timed, each with a warm or a cold cache. Those of STEP are timed in one run;
            all others are forwards without gradients.
        goals: further fields of a row, from mode and cache.
        foreign: calls of the user's, which may raise.
        device: where the calls run.
        most: rounds at most.
    """

    key: Row
    calls: dict[str, Call]
    modes: Sequence[tuple[str, str]]
    goals: Callable[[str, str], Mapping[str, Any]] = lambda mode, cache: {}
    foreign: Sequence[str] = ()
    device: str = "cpu"
    most: int = 201


def run(entry: Entry, seconds: float) -> Iterator[Row]:
    """Check the calls, then yield a row for each mode. A call of ours that misses has no time.

    seconds: to spend on what is timed in turns.
    """
    verdicts, calls = {}, {}
    for name, call in entry.calls.items():
        try:
            verdicts[name] = call.check() if call.check else Verdict()
        except Exception as error:  # whatever a function of the user's raises
            if name not in entry.foreign:
                raise
            verdicts[name] = Verdict(miss=one_line(error))
            continue
        if not (is_ours(name) and verdicts[name].miss):
            calls[name] = call
    found = dict(_time(entry, calls, seconds))
    for mode, cache in entry.modes:
        here = {n: v for n, v in verdicts.items() if mode not in STEP or entry.calls[n].leaves}
        fields: dict[str, Any] = {
            "errors": {name: v.error for name, v in here.items() if v.error is not None},
            "misses": {name: v.miss for name, v in here.items() if v.miss},
            "judged": [name for name in here if entry.calls[name].check],
            **entry.goals(mode, cache),
        }
        row = replace(entry.key, mode=mode, cache=cache, seconds=found[mode, cache], **fields)
        if mode == "step":
            _count_memory(entry, calls, row)
        yield row


def _count_memory(entry: Entry, calls: dict[str, Call], row: Row) -> None:
    """Count the bytes that a step holds for its backward, and at most."""
    held, peaks = dict[str, int](), dict[str, int]()
    for name, call in calls.items():
        if call.leaves and name != "torch.compile":  # whose buffers no profiler sees
            step = call.step("warm")
            held[name] = sum(memory.held(step.first, there=call.there).values())
            peaks[name] = memory.peak(step.__call__, entry.device)
    row.bytes, row.peak_bytes = held, peaks


def _time(
    entry: Entry, calls: dict[str, Call], seconds: float
) -> Iterator[tuple[tuple[str, str], dict[str, Times]]]:
    """Yield the times of each mode and cache."""
    timed: Any = partial(
        timing.interleave_parts, seconds=seconds, device=entry.device, most=entry.most
    )
    for cache in {cache: None for mode, cache in entry.modes if mode in STEP}:
        steps = {name: call.step(cache) for name, call in calls.items() if call.leaves}
        whole, forward, backward = timed(steps)
        yield from zip(((m, cache) for m in STEP), (forward, backward, whole), strict=True)
    for mode, cache in entry.modes:
        if mode not in STEP:
            with torch.no_grad():
                for call in calls.values():  # the first prepares others, and bitsandbytes' codes
                    for forward in call.forwards[: None if cache == "cold" else 1]:
                        forward()
                yield (mode, cache), timed({n: c.forward(cache) for n, c in calls.items()})[0]


@dataclass(frozen=True)
class Tolerance:
    """The limit of the errors of y, from those of plain PyTorch.

    Args:
        eager: the rms error of plain PyTorch.
        dtype: to which results are rounded.
        sums: as in `tolerance.rms_limit`.
    """

    eager: float
    dtype: torch.dtype
    sums: Sequence[int]

    def check(self, forward: Forward, want: Tensor) -> Verdict:
        """Compare y with float64; results of a group stand side by side.

        The first call may prepare others, and is not looked at.
        """
        with torch.no_grad():
            forward()
            errors = [tolerance.rms_error(joined(forward()), want)]
        errors.append(tolerance.rms_error(joined(forward()), want))
        u = tolerance.unit_roundoff(self.dtype)
        limit = tolerance.rms_limit(self.eager, u, self.sums)
        for error in errors:
            if not error <= limit:  # NaN is not
                return Verdict(error, f"y MISS: rms {error / u:.3g} u, limit {limit / u:.3g} u")
        return Verdict(max(errors))


def joined(y: Any) -> Tensor:
    """Return y, or the results of a group side by side."""
    return y if isinstance(y, Tensor) else torch.cat([*y], dim=1)


def held_to(
    calls: dict[str, Call],
    want: Tensor | Mapping[str, Tensor],
    like: str,
    rounded: torch.dtype,
    sums: Sequence[int],
) -> dict[str, Call]:
    """Give the calls their check.

    Args:
        want: y in float64, of all calls or of each; a call without is a bound, and not checked.
        like: the call that stands for plain PyTorch, whose error sets the limit.
        rounded, sums: the dtype to which results are rounded, and as in `tolerance.rms_limit`.
    """
    wants = dict.fromkeys(calls, want) if isinstance(want, Tensor) else want
    eager = tolerance.rms_error(joined(calls[like].forwards[0]()), wants[like])
    limit = Tolerance(eager, rounded, sums)
    for name in wants:
        calls[name].check = partial(limit.check, calls[name].forwards[0], wants[name])
    return calls


def layer_call(
    layer: Any,
    x: Tensor,
    dy: Any = None,
    leaves: Sequence[Tensor] = (),
    *,
    args: Sequence[Any] = (),
    frozen: Sequence[Tensor] = (),
) -> Call:
    """Return the call of a module, whose parameters train, or of a function.

    Args:
        dy: the gradient of y; None if there is no step.
        leaves: what a function trains.
        args: follow x.
        frozen: what a function reads and does not train.
    """
    there = [*leaves, *frozen]
    if isinstance(layer, nn.Module):
        leaves = [p for p in layer.parameters() if p.requires_grad]
        there = [*layer.parameters(), *layer.buffers()]
    own = [] if dy is None else [x, *leaves]
    return Call(forwards=[partial(layer, x, *args)], leaves=own, dy=dy, there=there)


@dataclass
class Suite:
    """A filter of the table.

    Args:
        kind: in the file of results.
        option: of the command line that selects it; empty for the default.
        unused: options without effect on it.
        entries: yields its part of the table; facts: the provenance.
        head: yields lines before the rows.
    """

    kind: str
    option: str
    unused: str
    entries: Callable[[argparse.Namespace, Facts], Iterator[Entry]] = lambda args, facts: iter(())
    head: Callable[[argparse.Namespace, Result], Iterator[str]] = lambda args, result: iter(())

    def provenance(self, args: argparse.Namespace) -> Facts:
        return provenance(args.dtypes, args.device)

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        for entry in self.entries(args, facts):
            for row in run(entry, args.seconds):
                row.note_load()
                yield row

    def summary(self, rows: list[Row]) -> Iterator[str]:
        """Yield lines after the rows."""
        return summary(rows)

    def has_failed(self, rows: list[Row]) -> bool:
        """True if a result of ours misses the tolerance, or loses a row that was counted."""
        return any(is_ours(name) for row in rows for name in row.misses)
