"""What a reader needs to judge a recipe's results or to get them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]

from .. import device as devices
from ..measure import bench

_OWN = ("user", "system", "children_user", "children_system")
_IDLE = ("idle", "iowait")
QUIET = 0.02  # of the processors' time, for what a system does of itself


class Provenance:
    """The machine and the versions, looked at before the work; and what ran beside it."""

    def __init__(self, device: str) -> None:
        names = ("transformers", "accelerate")
        self._facts = bench.provenance(["float32"], device.partition(":")[0])
        self._facts |= {name: devices.version(name) for name in names}
        self._before = psutil.cpu_times(), psutil.Process().cpu_times()

    def facts(self) -> dict[str, Any]:
        """For json. others: the share of the processors' time that other programs took since; the
        processes of this one that have ended are its own."""
        (system, process), now = self._before, psutil.cpu_times()
        mine = psutil.Process().cpu_times()
        spent = sum(now) - sum(system)
        busy = spent - sum(getattr(now, n, 0.0) - getattr(system, n, 0.0) for n in _IDLE)
        own = sum(getattr(mine, n, 0.0) - getattr(process, n, 0.0) for n in _OWN)
        return self._facts | {"others": max(0.0, busy - own) / spent if spent > 0 else 0.0}


def quietness(facts: Mapping[str, Any]) -> str:
    """
    >>> quietness({"others": 0.31})
    'Other programs took 31% of the processors beside it, so that its times are too long.'
    """
    if facts["others"] < QUIET:
        return "The machine had next to nothing else to do."
    return (
        f"Other programs took {facts['others']:.0%} of the processors beside it, so that its times "
        "are too long."
    )
