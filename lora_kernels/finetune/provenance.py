"""Provenance of a recipe's results: machine, versions and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]

from ..bench import results
from ..core import device as devices

QUIET = 0.02  # the share of CPU time that an idle system uses
# The share from which times are no result: a program that keeps a fifth of a core busy, of two.
UNDER_LOAD = 0.1


def watch(device: str) -> Callable[[], dict[str, Any]]:
    """Return a function that gives the machine, the versions and the load since now, for JSON.

    "others" is the share of CPU time that other programs took; see `watch_others`.
    """
    facts = results.provenance(["float32"], device.partition(":")[0])
    facts |= {name: devices.version(name) for name in ("transformers", "accelerate")}
    others = watch_others()
    return lambda: facts | {"others": others()}


def watch_others() -> Callable[[], float]:
    """Return a function that gives the share of CPU time that other programs took since now.

    Children of this process that have ended do not count as other programs. The system counts in
    steps of 10 ms, so the share is rough over less than a second.
    """
    before = _cpu_seconds()

    def finish() -> float:
        spent, idle, own = (b - a for a, b in zip(before, _cpu_seconds(), strict=True))
        return max(0.0, spent - idle - own) / spent if spent > 0 else 0.0

    return finish


def _cpu_seconds() -> tuple[float, float, float]:
    """Return CPU seconds: in all, idle, and of this process with its children."""
    system, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = system.idle + getattr(system, "iowait", 0.0)
    return sum(system), idle, own.user + own.system + own.children_user + own.children_system


def quietness(facts: Mapping[str, Any]) -> str:
    """Return a sentence about the load of other programs."""
    if facts["others"] < QUIET:
        return "The machine had next to nothing else to do."
    return (
        f"Other programs took {facts['others']:.0%} of the processors beside it, so that its times "
        "are too long."
    )
