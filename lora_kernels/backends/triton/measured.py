"""The tuning table of `lora-kernels tune`: a strategy and its tiles for a shape on a kind of GPU.

Rows come from the file that LORA_KERNELS_MEASURED names. A file that cannot be read is ignored with
a warning. If no row matches, the cost model in `configs` decides.
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

import torch

from ... import device
from ...core.problem import Strategy
from ...device import DeviceInfo
from ..replay import forget
from . import STRATEGIES, configs
from .configs import GemmTiles

KEEP_EAGER = 0.95  # of eager's time: a row replaces it if it takes at most that


@dataclasses.dataclass(frozen=True)
class Shape:
    """The key of a row.

    Args:
        arch: compute capability, 90 for 9.0; 0 for AMD's.
        rows: M, rounded up to a power of two.
        columns, inner: N and K of the forward.
        dtype, adapter: of the base GEMM, and of lora_A and lora_B.
        platform: versions of the driver, torch and Triton.
    """

    arch: int
    multiprocessors: int
    rows: int
    columns: int
    inner: int
    block_r: int
    dtype: str
    adapter: str
    four_bit: bool
    platform: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """The fastest strategy for forward and backward together.

    Args:
        forward, backward: the tiles of linear.py's kernels; None for the tiles of `configs`.
        source: the device and the time, in words.
        microseconds, eager_microseconds: of a step, and of the eager backend's.
    """

    strategy: Strategy
    forward: GemmTiles | None = None
    backward: GemmTiles | None = None
    source: str = ""
    microseconds: float | None = None
    eager_microseconds: float | None = None

    @property
    def beats_eager(self) -> bool:
        """Return True if it took at most `KEEP_EAGER` of the eager backend's time."""
        if self.microseconds is None or self.eager_microseconds is None:
            return False
        return self.microseconds <= KEEP_EAGER * self.eager_microseconds


def shape(
    target: DeviceInfo,
    rows: int,
    columns: int,
    inner: int,
    rank: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    four_bit: bool,
) -> Shape:
    """Return the key of a call without dropout."""
    rows, block_r = configs.power_of_two(max(rows, 1)), configs.block_of_ranks(rank)
    arch, count = target.capability, target.multiprocessors
    names = str(dtype).removeprefix("torch."), str(adapter).removeprefix("torch.")
    return Shape(arch, count, rows, columns, inner, block_r, *names, four_bit, _platform())


@functools.cache
def _platform() -> str:
    versions = device.driver_version(), torch.__version__, device.version("triton")
    return "driver {}, torch {}, Triton {}".format(*versions)


_overrides: dict[Shape, Measured] = {}


@contextmanager
def override_row(key: Shape, row: Measured) -> Iterator[None]:
    """Make `find` return this row for this shape, in all threads. `tune` measures rows with it."""
    _overrides[key] = row
    forget()
    try:
        yield
    finally:
        del _overrides[key]
        forget()


def find(key: Shape) -> Measured | None:
    """Return the row for this shape, or None."""
    return _overrides.get(key) or _table(os.environ.get("LORA_KERNELS_MEASURED")).get(key)


@functools.cache
def _table(path: str | None) -> Mapping[Shape, Measured]:
    if not path:
        return {}
    try:
        return read(Path(path))
    except ValueError as error:
        warnings.warn(f"the tuning table is left out: {error}", stacklevel=3)
        return {}


def read(file: Path) -> dict[Shape, Measured]:
    """Return the rows of a file that `tune` wrote; ValueError for any other file."""
    try:
        rows = json.loads(file.read_text())["rows"]
        return dict(_row(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: got {error!r}, want a file that `lora-kernels tune` wrote"
        ) from error


def _row(row: Mapping[str, Any]) -> tuple[Shape, Measured]:
    key = Shape(**{field.name: row[field.name] for field in dataclasses.fields(Shape)})
    try:
        strategy = Strategy.read(row["strategy"])
    except ValueError:
        strategy = None
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {row['strategy']!r}")
    for name, value in vars(key).items():
        if name in ("dtype", "adapter", "platform"):
            if not isinstance(value, str):
                raise ValueError(f"{name} {value!r}")
        elif not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} {value!r}")
    tiles = {name: _tiles(row[name]) for name in ("forward", "backward")}
    source = f"measured on {row['device']}: {row['microseconds']:.0f} µs a step"
    times = row["microseconds"], row["eager_microseconds"]
    return key, Measured(strategy, tiles["forward"], tiles["backward"], source, *times)


def _tiles(row: Mapping[str, Any] | None) -> GemmTiles | None:
    """Return the tiles of a row; ValueError if no kernel can be compiled for them."""
    if row is None:
        return None
    config = GemmTiles(**row)
    sizes = config.block_m, config.block_n, config.block_k
    if any(type(n) is not int or n < configs.MIN_BLOCK or n & (n - 1) for n in sizes):
        raise ValueError(f"tiles {sizes}, want powers of two from {configs.MIN_BLOCK} on")
    counts = config.warps, config.stages, config.group_m
    if any(type(n) is not int or n < 1 for n in counts) or config.warps & (config.warps - 1):
        raise ValueError(f"warps, stages, group_m {counts}, want a power of two, and 1 or more")
    return config


def entry(key: Shape, row: Measured, **provenance: Any) -> dict[str, Any]:
    """Return a row of a file. provenance: at least "device", and the two fields of times."""
    tiles = {
        name: None if tile is None else dataclasses.asdict(tile)
        for name, tile in (("forward", row.forward), ("backward", row.backward))
    }
    return {**dataclasses.asdict(key), "strategy": row.strategy, **tiles, **provenance}
