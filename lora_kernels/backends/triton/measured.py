"""What `lora-kernels tune` measured: a strategy and its tiles for a shape on a kind of GPU.

Rows come from measured.json beside this file, empty until a GPU has filled it, and from the file
that LORA_KERNELS_MEASURED names, which goes first. A file that cannot be read is left out, with one
warning. Where no row fits, `configs` decides by its model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import STRATEGIES, configs
from .configs import Config, Target


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a row is looked up by. rows: M, rounded up to a power of two; columns N and inner K are
    the forward's; itemsize: bytes of the widest of x's, the adapter's and the product's dtypes."""

    arch: int
    multiprocessors: int
    rows: int
    columns: int
    inner: int
    block_r: int
    itemsize: int
    four_bit: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """The strategy that was fastest for forward and backward together, the tiles of `linear_kernel`
    in both directions (None: those that `configs` chooses), where that comes from, and what a step
    took."""

    strategy: str
    forward: Config | None = None
    backward: Config | None = None
    source: str = ""
    microseconds: float | None = None


def shape(
    target: Target,
    rows: int,
    columns: int,
    inner: int,
    rank: int,
    itemsize: int,
    four_bit: bool,
) -> Shape:
    """The key of a call without dropout."""
    return Shape(
        target.arch, target.multiprocessors, configs.power_of_two(max(rows, 1)), columns, inner,
        configs.block_of_ranks(rank), itemsize, four_bit,
    )  # fmt: skip


_tried: dict[Shape, Measured] = {}


@contextmanager
def tried(key: Shape, row: Measured) -> Iterator[None]:
    """`find` gives this row for this shape, in every thread: how `tune` tries it."""
    _tried[key] = row
    try:
        yield
    finally:
        del _tried[key]


def find(key: Shape) -> Measured | None:
    """The row for this shape, or None."""
    return _tried.get(key) or _table(os.environ.get("LORA_KERNELS_MEASURED")).get(key)


@functools.cache
def _table(path: str | None) -> Mapping[Shape, Measured]:
    found: dict[Shape, Measured] = {}
    for file in (Path(__file__).with_name("measured.json"), Path(path) if path else None):
        if file is not None:
            try:
                found |= read(file)
            except ValueError as error:
                warnings.warn(f"the tuning table is left out: {error}", stacklevel=3)
    return found


def read(file: Path) -> dict[Shape, Measured]:
    """The rows of a file that `tune` wrote; ValueError, saying what is wrong, for any other."""
    try:
        rows = json.loads(file.read_text())["rows"]
        return dict(_row(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: got {error!r}, want a file that `lora-kernels tune` wrote"
        ) from error


def _row(row: Mapping[str, Any]) -> tuple[Shape, Measured]:
    key = Shape(**{field.name: row[field.name] for field in dataclasses.fields(Shape)})
    if row["strategy"] not in STRATEGIES:
        raise ValueError(f"strategy {row['strategy']!r}")
    for name, value in vars(key).items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} {value!r}")
    tiles = {name: _tiles(row[name]) for name in ("forward", "backward")}
    source = f"measured on {row['device']}: {row['microseconds']:.0f} µs a step"
    return key, Measured(row["strategy"], **tiles, source=source, microseconds=row["microseconds"])


def _tiles(row: Mapping[str, Any] | None) -> Config | None:
    """ValueError where no kernel can be compiled for such tiles."""
    if row is None:
        return None
    config = Config(**row)
    sizes = config.block_m, config.block_n, config.block_k
    if any(type(n) is not int or n < configs.MIN_BLOCK or n & (n - 1) for n in sizes):
        raise ValueError(f"tiles {sizes}, want powers of two from {configs.MIN_BLOCK} on")
    counts = config.warps, config.stages, config.group_m
    if any(type(n) is not int or n < 1 for n in counts) or config.warps & (config.warps - 1):
        raise ValueError(f"warps, stages, group_m {counts}, want a power of two, and 1 or more")
    return config


def entry(key: Shape, row: Measured, **provenance: Any) -> dict[str, Any]:
    """A row as a file has it; provenance: "device" and "microseconds" at least."""
    tiles = {
        name: None if tile is None else dataclasses.asdict(tile)
        for name, tile in (("forward", row.forward), ("backward", row.backward))
    }
    return {**dataclasses.asdict(key), "strategy": row.strategy, **tiles, **provenance}
