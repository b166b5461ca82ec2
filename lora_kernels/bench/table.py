"""The table of `bench`, cases × baselines, and its two runners.

An entry has the calls of one case: ours and the baselines. `time_calls` checks each of them against
the oracle, then times them in turns and counts their memory. `count_calls` counts the memory
traffic of calls on meta tensors. Both yield rows. A suite is a part of the table with its runner.
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
from . import counter, memory, results, timing
from .baselines import cycle_through
from .counter import Traffic
from .functions import one_line
from .results import Facts, Result, Row, is_ours
from .timing import Parts, Times

Forward = Callable[[], Any]
STEP = ("forward", "backward", "step")  # modes of a training step: its two parts, and the whole
Counts = Mapping[str, Traffic]  # by the name of the call: "ours", or a peer's
Limits = Callable[[Counts, str], Mapping[str, float]]
Rows = Callable[[argparse.Namespace, Facts], Iterator[Row]]
# Measure of a call's traffic -> the field of a row.
MEASURES = {"bytes": "moved", "kernels": "kernels", "peak": "peak_bytes", "flops": "flops"}


class Accuracy(NamedTuple):
    """The rms error of y beside float64, and what misses the tolerance, or "" if nothing does."""

    error: float | None = None
    miss: str = ""


@dataclass(kw_only=True)
class Call:
    """One of an entry's calls.

    Args:
        forwards: functions that compute y. A cold cache needs several, over copies of the weight.
        leaves: x and what trains, for the gradients of a step. Empty if the call has no step.
        dy: the gradient of y.
        existing: tensors whose memory is not the call's.
        check: compares the results with the oracle; None for a bound such as the frozen layer.
    """

    forwards: Sequence[Forward]
    leaves: Sequence[Tensor] = ()
    dy: Any = None
    existing: Iterable[Tensor] = ()
    check: Callable[[], Accuracy] | None = None

    def forward(self, cache: str | None) -> Forward:
        """Return a forward: of the first weights, or of all in turn with a cold cache."""
        return cycle_through(self.forwards) if cache == "cold" else self.forwards[0]

    def step(self, cache: str | None) -> Parts:
        """Return forward and backward."""
        backward = partial(torch.autograd.grad, inputs=self.leaves, grad_outputs=self.dy)
        return Parts(self.forward(cache), backward)


@dataclass(kw_only=True)
class Entry:
    """Calls that compute the same.

    Args:
        key: the fields that name the rows.
        calls: by name.
        modes: (mode, cache) of each row. Modes of STEP are timed in one run, all others are
            forwards without gradients. cache: "warm" or "cold"; None for a row that is counted.
        goals: what a timed row is compared with, as further fields, from mode and cache.
        foreign: names of calls of the user's functions, which may raise.
        device: where timed calls run.
        max_rounds: of timing.
        measures: keys of MEASURES, those that a counted row has.
        limits: returns the most that ours may take of each measure, from the traffic of the calls
            and the mode of a counted row.
    """

    key: Row
    calls: dict[str, Call]
    modes: Sequence[tuple[str, str | None]]
    goals: Callable[[str, str | None], Mapping[str, Any]] = lambda mode, cache: {}
    foreign: Sequence[str] = ()
    device: str = "cpu"
    max_rounds: int = 201
    measures: Sequence[str] = ("bytes", "kernels", "peak")
    limits: Limits = lambda counts, mode: {}


def count_calls(entry: Entry) -> Iterator[Row]:
    """Count the traffic of the calls, then yield a row for each mode.

    The limits of a forward hold for itself. Those of a backward hold for the whole step, because a
    step is what a user pays for.
    """
    parts: dict[str, dict[str, Traffic]] = {mode: {} for mode in STEP}
    for name, call in entry.calls.items():
        forward, backward = counter.count_layer(call.forwards[0], call.leaves)
        step = forward, backward, forward.then(backward)
        for mode, traffic in zip(STEP, step, strict=True):
            parts[mode][name] = traffic
    for mode, _ in entry.modes:
        counts = parts["forward" if mode == "forward" else "step"]
        lost = exceeded_measures(counts["ours"], entry.limits(counts, mode))
        counted: dict[str, Any] = {
            MEASURES[measure]: {name: getattr(t, measure) for name, t in parts[mode].items()}
            for measure in entry.measures
        }
        misses = {"ours": ", ".join(lost)} if lost else {}
        yield replace(entry.key, mode=mode, misses=misses, **counted)


def exceeded_measures(ours: Traffic, limits: Mapping[str, float]) -> list[str]:
    """Return the measures of which ours takes more than the limit.

    >>> exceeded_measures(Traffic(99, 1, 9, 0), {"bytes": 99, "kernels": 9})
    ['bytes']
    """
    return [measure for measure, limit in limits.items() if getattr(ours, measure) > limit]


def time_calls(entry: Entry, seconds: float) -> Iterator[Row]:
    """Check the calls, then yield a row for each mode. A call of ours that misses has no time.

    seconds: to spend on what is timed in turns.
    """
    accuracies, calls = {}, {}
    for name, call in entry.calls.items():
        try:
            accuracies[name] = call.check() if call.check else Accuracy()
        except Exception as error:  # whatever a function of the user's raises
            if name not in entry.foreign:
                raise
            accuracies[name] = Accuracy(miss=one_line(error))
            continue
        if not (is_ours(name) and accuracies[name].miss):
            calls[name] = call
    times = dict(_time(entry, calls, seconds))
    for mode, cache in entry.modes:
        shown = {n: a for n, a in accuracies.items() if mode not in STEP or entry.calls[n].leaves}
        fields: dict[str, Any] = {
            "errors": {name: a.error for name, a in shown.items() if a.error is not None},
            "misses": {name: a.miss for name, a in shown.items() if a.miss},
            "judged": [name for name in shown if entry.calls[name].check],
            **entry.goals(mode, cache),
        }
        row = replace(entry.key, mode=mode, cache=cache, seconds=times[mode, cache], **fields)
        if mode == "step":
            _add_memory(entry, calls, row)
        yield row


def _add_memory(entry: Entry, calls: dict[str, Call], row: Row) -> None:
    """Add to the row the bytes that each call's step saves for its backward, and its peak."""
    held, peaks = dict[str, int](), dict[str, int]()
    for name, call in calls.items():
        if call.leaves and name != "torch.compile":  # no profiler sees the buffers of compiled code
            step = call.step("warm")
            held[name] = sum(memory.held(step.first, existing=call.existing).values())
            peaks[name] = memory.peak(step.__call__, entry.device)
    row.bytes, row.peak_bytes = held, peaks


def _time(
    entry: Entry, calls: dict[str, Call], seconds: float
) -> Iterator[tuple[tuple[str, str | None], dict[str, Times]]]:
    """Yield the times of each mode and cache."""
    interleave: Any = partial(
        timing.interleave_parts, seconds=seconds, device=entry.device, max_rounds=entry.max_rounds
    )
    for cache in {cache: None for mode, cache in entry.modes if mode in STEP}:
        steps = {name: call.step(cache) for name, call in calls.items() if call.leaves}
        whole, forward, backward = interleave(steps)
        yield from zip(((m, cache) for m in STEP), (forward, backward, whole), strict=True)
    for mode, cache in entry.modes:
        if mode not in STEP:
            with torch.no_grad():
                # A first run plans launches, and repacks bitsandbytes' codes.
                for call in calls.values():
                    for forward in call.forwards[: None if cache == "cold" else 1]:
                        forward()
                yield (mode, cache), interleave({n: c.forward(cache) for n, c in calls.items()})[0]


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

    def check(self, forward: Forward, want: Tensor) -> Accuracy:
        """Compare y with float64, without gradients and with them.

        The first call is not compared, because it may run other code than the calls that follow.
        """
        with torch.no_grad():
            forward()
            errors = [tolerance.rms_error(join_results(forward()), want)]
        errors.append(tolerance.rms_error(join_results(forward()), want))
        u = tolerance.unit_roundoff(self.dtype)
        limit = tolerance.rms_limit(self.eager, u, self.sums)
        for error in errors:
            if not error <= limit:  # NaN is not
                return Accuracy(error, f"y MISS: rms {error / u:.3g} u, limit {limit / u:.3g} u")
        return Accuracy(max(errors))


def join_results(y: Any) -> Tensor:
    """Return y, or the results of a group side by side."""
    return y if isinstance(y, Tensor) else torch.cat([*y], dim=1)


def set_checks(
    calls: dict[str, Call],
    want: Tensor | Mapping[str, Tensor],
    eager_name: str,
    dtype: torch.dtype,
    sums: Sequence[int],
) -> dict[str, Call]:
    """Set the check of the calls, and return them.

    Args:
        want: y in float64, for all calls, or by the name of the call. A call that has none is a
            bound, and is not checked.
        eager_name: the call that stands for plain PyTorch, whose error sets the limit.
        dtype, sums: the dtype to which results are rounded, and as in `tolerance.rms_limit`.
    """
    wants = dict.fromkeys(calls, want) if isinstance(want, Tensor) else want
    eager = tolerance.rms_error(join_results(calls[eager_name].forwards[0]()), wants[eager_name])
    limit = Tolerance(eager, dtype, sums)
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
    existing = [*leaves, *frozen]
    if isinstance(layer, nn.Module):
        leaves = [p for p in layer.parameters() if p.requires_grad]
        existing = [*layer.parameters(), *layer.buffers()]
    leaves = [] if dy is None else [x, *leaves]
    return Call(forwards=[partial(layer, x, *args)], leaves=leaves, dy=dy, existing=existing)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A part of the table, with its runner.

    Args:
        kind: its name in the file of results.
        option: that of the command line which selects it; empty for the default.
        unused: options without effect on it.
        rows: yields its part of the table, from the options and the provenance.
        provenance: returns the machine, the versions and measured rates.
        head: yields lines before the rows.
        summary: yields lines after the rows.
    """

    kind: str
    option: str
    unused: str
    rows: Rows
    provenance: Callable[[argparse.Namespace], Facts] = lambda args: results.provenance(
        args.dtypes, args.device
    )
    head: Callable[[argparse.Namespace, Result], Iterator[str]] = lambda args, result: iter(())
    summary: Callable[[list[Row]], Iterator[str]] = results.summary


def timed(entries: Callable[[argparse.Namespace, Facts], Iterator[Entry]]) -> Rows:
    """Return the rows of a suite whose entries are timed, as a function for `Suite.rows`."""

    def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        for entry in entries(args, facts):
            yield from time_calls(entry, args.seconds)

    return rows
