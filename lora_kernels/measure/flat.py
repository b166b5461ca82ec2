"""`lora-kernels bench --csv`: the times and bytes that `--json` holds, a call a line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a row says of itself.
ROW = (
    "what", "dtype", "quant_type", "M", "K", "N", "R", "dropout_p", "mode", "cache", "backend",
    "strategy", "load", "under_load",
)  # fmt: skip
# And of each call: result is "ok", "✗" with what missed the tolerance, or empty where nobody
# judged it; over, low and high are the ratio to the yardstick's time and what bounds its median.
CALL = (
    "call", "result", "p20_ms", "p50_ms", "p80_ms", "rounds", "over", "over_low", "over_high",
    "floor_ms", "held_bytes", "peak_bytes",
)  # fmt: skip


def lines(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A dict of ROW and CALL for each call of each row; absent values are left out.

    >>> times = {"p20": 0.001, "p50": 0.002, "p80": 0.004, "rounds": 9}
    >>> row = {"M": 8, "seconds": {"ours": times}, "misses": {"eager": "y MISS"}}
    >>> [(line["call"], line["result"], line.get("p50_ms")) for line in lines({"rows": [row]})]
    [('ours', 'ok', 2.0), ('eager', '✗ y MISS', None)]
    """
    for row in data["rows"]:
        misses = {name: f"✗ {text}" for name, text in row.get("misses", {}).items()}
        common = {key: row[key] for key in ROW if row.get(key) is not None}
        seconds, held, peaks = (row.get(key, {}) for key in ("seconds", "bytes", "peak_bytes"))
        judged = row.get("judged", seconds)
        for name in dict.fromkeys([*seconds, *held]):
            result = misses.pop(name, "ok" if name in judged else "")
            line = {**common, "call": name, "result": result}
            if times := seconds.get(name):
                line |= {f"{key}_ms": times[key] * 1e3 for key in ("p20", "p50", "p80")}
                line["rounds"] = times["rounds"]
                if over := times.get("over"):
                    line |= {
                        "over": over["p50"], "over_low": over["low"], "over_high": over["high"]
                    }  # fmt: skip
            if name == "ours" and row.get("floor_ms") is not None:
                line["floor_ms"] = row["floor_ms"]
            yield {**line, "held_bytes": held.get(name), "peak_bytes": peaks.get(name)}
        for name, text in misses.items():
            yield {**common, "call": name, "result": text}


def write(path: Path, data: dict[str, Any]) -> None:
    """The file, with a line of names on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*ROW, *CALL], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines(data))
