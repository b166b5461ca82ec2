"""Provenance of a recipe's results: machine, versions and load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]

from .. import device as devices
from ..bench import results

QUIET = 0.02  # the share of CPU time that an idle system uses


def _seconds(times: Any, *names: str) -> float:
    return sum(getattr(times, name, 0.0) for name in names)


class Provenance:
    """The machine, the versions, and the load of other programs since the object was created."""

    def __init__(self, device: str) -> None:
        self._facts = results.provenance(["float32"], device.partition(":")[0])
        self._facts |= {name: devices.version(name) for name in ("transformers", "accelerate")}
        self._before = self._times()

    def _times(self) -> tuple[float, float, float]:
        """Return CPU seconds: in all, idle, and of this process with its children."""
        system, own = psutil.cpu_times(), psutil.Process().cpu_times()
        names = ("user", "system", "children_user", "children_system")
        return sum(system), _seconds(system, "idle", "iowait"), _seconds(own, *names)

    def facts(self) -> dict[str, Any]:
        """Return the facts for JSON. "others" is the share of CPU time that other programs took.

        Children of this process that have ended do not count as other programs.
        """
        spent, idle, own = (b - a for a, b in zip(self._before, self._times(), strict=True))
        others = max(0.0, spent - idle - own) / spent if spent > 0 else 0.0
        return self._facts | {"others": others}


def quietness(facts: Mapping[str, Any]) -> str:
    """Return a sentence about the load of other programs."""
    if facts["others"] < QUIET:
        return "The machine had next to nothing else to do."
    return (
        f"Other programs took {facts['others']:.0%} of the processors beside it, so that its times "
        "are too long."
    )
