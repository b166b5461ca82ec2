"""The end of `lora-kernels bench`: ours against each peer over all rows, and which rows count less.

A ratio is the median time of ours over the peer's in one row, where both took turns. Ours with
float32 adapters is compared with PEFT's, which keeps them so; each other call with its like.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from . import compare

Row = dict[str, Any]

# Above the bench's own threads: what another program adds to the average of a minute, over which
# the kernel takes it, if it has a core for half of that.
LOAD_MARGIN = 0.5
# Calls that no one would use instead of ours: yardsticks.
NO_PEERS = (compare.FROZEN, "stream")
# Peer -> the call of ours that does the same; "ours" for all others, and where a row lacks it.
LIKE = {
    "peft": "ours, fp32 adapters",
    "PEFT's LoRA": "LoRA",
    "PEFT's, 4": "ours, 4",
    "PEFT's, 1": "ours, 1",
}


def load() -> Row:
    """The load average, the part of it that the bench causes at most, and whether other programs
    must have caused the rest: what a row keeps of the moment at which it has been timed."""
    average, own = os.getloadavg()[0], torch.get_num_threads()
    return {"load": average, "own_load": own, "under_load": average > own + LOAD_MARGIN}


def load_mark(row: Row) -> str:
    """What stands beside a row that was timed under load; empty for another.

    >>> load_mark({"load": 3.68, "own_load": 2, "under_load": True})
    '  [under load: average 3.7, at most 2 of it the bench]'
    """
    if not row.get("under_load"):
        return ""
    return f"  [under load: average {row['load']:.1f}, at most {row['own_load']} of it the bench]"


def ratios(rows: list[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Peer -> ours over it in each row that has times of both.

    >>> times = {"ours": {"p50": 1.0}, "frozen": {"p50": 1.0}, "peft": {"p50": 2.0}}
    >>> ratios([{"seconds": times}])["peft"][0][0]
    0.5
    """
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        seconds = row["seconds"]
        for peer in seconds:
            if compare.is_ours(peer) or peer in NO_PEERS:
                continue
            like = LIKE.get(peer, "ours")
            if like not in seconds and like not in row.get("misses", ()):
                like = "ours"
            if like in seconds:
                ratio = seconds[like]["p50"] / seconds[peer]["p50"]
                found.setdefault(peer, []).append((ratio, row))
    return found


def lines(rows: list[Row]) -> Iterator[str]:
    """A line for each peer; and how many rows or results count less, where there are some."""
    against = ratios(rows)
    if against:
        yield "ours over each peer, medians of the same row; below 1 ours is faster:"
    width = max(map(len, against), default=0)
    for peer, found in against.items():
        each = [ratio for ratio, _ in found]
        worst, at = max(found, key=lambda pair: pair[0])
        text = (
            f"    {peer:{width}}  faster in {sum(r < 1 for r in each)} of {len(each)} rows, slower "
            f"in {sum(r > 1 for r in each)}; median {statistics.median(each):.3f}; worst "
            f"{worst:.3f}: {compare.identity(at)}"
        )
        wrong = sum(peer in row.get("misses", ()) for _, row in found)
        yield text + (f"; {wrong} of its results miss the tolerance" if wrong else "")
    wrong = sum(compare.is_ours(name) for row in rows for name in row.get("misses", ()))
    if wrong:
        yield f"{wrong} results of ours miss the tolerance (✗) and have no time"
    loaded = sum(row.get("under_load", False) for row in rows)
    if loaded:
        yield f"{loaded} of {len(rows)} rows were timed under load: measure them again"
