"""The verdicts of `lora_kernels.qualify` on GPUs, which `choose` follows.

A verdict is a file in `folder()`, one for each combination of card, driver, versions and kernel
sources (`key`). It is read once a process. Without a verdict the eager backend runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backends.eager import orders
from ..core import device
from ..core.problem import Problem

ADVICE = "run `lora-kernels qualify` (25 s, and compiling before)"
KEEP_EAGER = 0.95  # largest ratio to eager's time at which a strategy replaces eager
# The same for another order of PyTorch's own GEMMs: above the scatter of interleaved medians.
KEEP_ORDER = 0.98
ONE_TILE = 16  # rows of a kernel's smallest tile: fewer rows take as long
MAX_RANK = 128  # largest rank for which claims are checked
FORMAT = "5"  # of a verdict's file; part of its key
OFF = 'qualification is switched off: fuse(qualify="off")'


class Group(NamedTuple):
    """The calls that are qualified together.

    Args:
        dtype: of the base GEMM.
        adapter: the dtype of lora_A and lora_B.
        weight: "dense" or "4bit"; of parts of a training step "order" or "skinny" (see `ORDERS`).
    """

    backend: str
    strategy: str
    dtype: str
    adapter: str
    weight: str

    def __str__(self) -> str:
        return " ".join(self)


# The weight of a group that is part of a training step: the order of PyTorch's GEMMs, or a kernel
# in place of a skinny GEMM. Its strategy is a name of `orders`; `Point.forward` has the time of the
# other order or the kernel, and `Point.eager_forward` that of today's GEMMs. A point of a skinny
# GEMM has the wide dimension as columns, and the rank as inner dimension.
ORDERS = ("order", "skinny")


class Seconds(NamedTuple):
    """Measured seconds of a call.

    Args:
        device: of its kernels.
        host: of the Python code that launches them.
        is_captured: True if `device` was measured on a replayed CUDA graph. False if the call
            cannot be captured: its kernels were queued behind other work in the stream.
    """

    device: float
    host: float
    is_captured: bool = True

    def elapsed(self, in_graph: bool = False) -> float:
        """Return the device's seconds in a CUDA graph, else the longer of device and host.

        >>> Seconds(1e-5, 3e-5).elapsed(), Seconds(1e-5, 3e-5).elapsed(in_graph=True)
        (3e-05, 1e-05)
        """
        return self.device if in_graph else max(self.device, self.host)


class Ratios(NamedTuple):
    """A group's time over the eager backend's. step: None if only the forward was timed."""

    forward: float
    step: float | None


class Point(NamedTuple):
    """Measured seconds of a group and of the eager backend, weights cold.

    Args:
        rows, columns, inner: M, N and K.
        step, eager_step: forward and backward; None if only the forward was timed.
    """

    group: Group
    rows: int
    columns: int
    inner: int
    rank: int
    forward: Seconds
    eager_forward: Seconds
    step: Seconds | None
    eager_step: Seconds | None

    @property
    def sizes(self) -> str:
        """M×N×K."""
        return f"{self.rows}×{self.columns}×{self.inner}"

    def ratios(self, in_graph: bool = False) -> Ratios:
        """Return the group's time over eager's.

        in_graph: whether the calls are captured in a CUDA graph, where the host's time does not
            count.
        """
        forward = self.forward.elapsed(in_graph) / self.eager_forward.elapsed(in_graph)
        if self.step is None or self.eager_step is None:
            return Ratios(forward, None)
        return Ratios(forward, self.step.elapsed(in_graph) / self.eager_step.elapsed(in_graph))


@dataclass(frozen=True, eq=False)
class Verdict:
    """The result of a qualification.

    Attributes:
        key: the card, driver, versions and sources for which the verdict holds (`key`).
        passed: the groups whose claims all hold.
        failed: for each other group, the claim that failed and the observed value.
        points: the times of the groups that passed.
        date: of the qualification, ISO 8601.
    """

    key: Mapping[str, str]
    passed: frozenset[Group] = frozenset()
    failed: Mapping[Group, str] = field(default_factory=dict)
    points: Sequence[Point] = ()
    date: str = ""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON types; `read_verdict` is the inverse.

        >>> Verdict({"name": "H100"}).json()["passed"]
        []
        """
        data = asdict(self)
        data["passed"] = sorted(self.passed)
        data["failed"] = [[group, reason] for group, reason in self.failed.items()]
        return data

    @property
    def digest(self) -> str:
        """A short name of the verdict's content, for logs and checkpoints."""
        return _digest(self.json())

    @functools.cached_property
    def max_rows(self) -> int:
        """The most rows that any kernel of a layer was measured with; 0 if none was."""
        rows = [point.rows for point in self.points if point.group.weight not in ORDERS]
        return max(rows, default=0)

    @functools.cached_property
    def winners(self) -> dict[str, Callable[[torch.dtype, int, int, int], bool]]:
        """Name of an order or a skinny GEMM -> whether a call's dtype and sizes were faster.

        Only names that won at some point, so that the others cost a training step nothing.
        """
        names = {point.group.strategy for point in self.points if wins(point)}
        return {name: functools.partial(self._is_winner, name) for name in sorted(names)}

    def _is_winner(
        self, name: str, dtype: torch.dtype, rows: int, columns: int, inner: int
    ) -> bool:
        point = self.nearest_order(name, dtype, rows, columns, inner)
        return point is not None and wins(point)

    def nearest_order(
        self, name: str, dtype: torch.dtype, rows: int, columns: int, inner: int
    ) -> Point | None:
        """Return the point of an order or a skinny GEMM that is nearest to a call.

        Returns None for another dtype, fewer rows or a larger rank than were measured. More rows
        than were measured take as long in proportion.
        """
        points = [
            point
            for point in self.points
            if point.group.strategy == name
            and point.group.weight in ORDERS
            and point.group.dtype == _name(dtype)
            and point.group in self.passed
        ]
        if not points or rows < min(point.rows for point in points):
            return None
        if name in orders.SKINNY and inner > max(point.inner for point in points):
            return None
        return _nearest(points, rows, columns, inner)

    def describe_order(self, dtype: torch.dtype, rows: int, columns: int, inner: int) -> str:
        """Return which order computes y [rows, columns], and why; "" if none was measured."""
        point = self.nearest_order(orders.BASE_FIRST, dtype, rows, columns, inner)
        if point is None:
            return ""
        order = "the base GEMM first" if wins(point) else "the update first"
        ratio = point.ratios().forward
        return f"{order}: base first took {ratio:.2f} of update first's time at {point.sizes}"

    def nearest_point(self, group: Group, rows: int, columns: int, inner: int) -> Point | None:
        """Return the point nearest to a call: by the ratio of M, then of N·K, then of N.

        Returns None if the group has no points, or M is outside their range. A point of 16 rows
        covers fewer rows too.
        """
        points = [point for point in self.points if point.group == group]
        if not points or rows > max(point.rows for point in points):
            return None
        if min(point.rows for point in points) > max(rows, ONE_TILE):
            return None
        return _nearest(points, rows, columns, inner)


def _nearest(points: Sequence[Point], rows: int, columns: int, inner: int) -> Point:
    def distance(p: Point) -> tuple[float, float, float]:
        size = _ratio(columns * inner, p.columns * p.inner)
        return _ratio(rows, p.rows), size, _ratio(columns, p.columns)

    return min(points, key=distance)


def wins(point: Point) -> bool:
    """Return True if the point's order or kernel replaces today's GEMMs in a training step."""
    group = point.group
    if group.weight not in ORDERS or group.strategy not in (orders.BASE_FIRST, *orders.SKINNY):
        return False
    return point.ratios().forward <= (KEEP_ORDER if group.weight == "order" else KEEP_EAGER)


def _ratio(a: int, b: int) -> float:
    """Return the larger number over the smaller one; 0 counts as 1."""
    return max(a, b, 1) / max(min(a, b), 1)


def read_verdict(data: Mapping[str, Any]) -> Verdict:
    """Build from `Verdict.json`; raises an error if anything is missing or of another type."""
    points = [read_point(point) for point in data["points"]]
    failed = {_read_group(group): str(reason) for group, reason in data["failed"]}
    passed = frozenset(_read_group(group) for group in data["passed"])
    return Verdict(dict(data["key"]), passed, failed, points, str(data["date"]))


def read_point(data: Sequence[Any]) -> Point:
    """Build from a `Point` as JSON has it; raises an error if anything is missing or no time."""
    fields: dict[str, Any] = dict(zip(Point._fields, data, strict=True))
    for name in ("rows", "columns", "inner", "rank"):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{name}: got {fields[name]!r}, want a positive integer")
    for name in ("forward", "eager_forward", "step", "eager_step"):
        if fields[name] is not None or name.endswith("forward"):
            fields[name] = _read_seconds(name, fields[name])
    return Point(**fields | {"group": _read_group(fields["group"])})


def _read_group(data: Any) -> Group:
    if len(data) != len(Group._fields) or not all(isinstance(name, str) for name in data):
        raise ValueError(f"group: got {data!r}, want five strings, {', '.join(Group._fields)}")
    return Group(*data)


def _read_seconds(name: str, data: Any) -> Seconds:
    """Return the times, by which others are divided."""
    is_valid = isinstance(data, list) and [type(t) for t in data[2:]] == [bool]
    if not is_valid or not all(type(t) in (int, float) and 0 < t < math.inf for t in data[:2]):
        raise ValueError(f"{name}: got {data!r}, want positive seconds of device and host, a bool")
    return Seconds(float(data[0]), float(data[1]), data[2])


def group_of(backend: str, strategy: str, problem: Problem) -> Group:
    """Return the group that a call belongs to."""
    adapter = _name(problem.a_dtype) if problem.a_dtype is problem.b_dtype else "unequal"
    weight = "4bit" if problem.is_quantized else "dense"
    return Group(backend, str(strategy), _name(problem.dtype), adapter, weight)


def folder() -> Path:
    """Return the cache folder: $LORA_KERNELS_CACHE, or lora_kernels in the user's cache folder."""
    configured = os.environ.get("LORA_KERNELS_CACHE")
    if configured:
        return Path(configured)
    xdg_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg_cache) if xdg_cache else Path.home() / ".cache") / "lora_kernels"


def file_of(key: Mapping[str, str]) -> Path:
    """Return the file of the verdict for a key."""
    name = re.sub(r"\W+", "-", key["name"].lower()).strip("-")
    return folder() / f"qualified-{name}-{_digest(key)}.json"


def key(index: int) -> dict[str, str]:
    """Return what a verdict on a GPU depends on: card, driver, versions and kernel sources.

    The name, the multiprocessors and the memory of a MIG slice are those of its profile.
    """
    gpu = device.gpu(index)
    return {
        "format": FORMAT,
        "name": gpu.name,
        "capability": str(gpu.capability),
        "multiprocessors": str(gpu.multiprocessors),
        "memory": str(gpu.memory),
        "driver": device.driver_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": str(device.version("triton")),
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", "Triton's"),
        "bitsandbytes": str(device.version("bitsandbytes")),
        "kernels": _source_digest(),
    }


@functools.cache
def _source_digest() -> str:
    """Return a digest of the sources and binaries that kernels and their launches come from."""
    package = Path(__file__).parents[1]
    files = [
        *(package / "backends").rglob("*.py"),
        *package.glob("_cuda*"),
        *package.glob("core/*.py"),
    ]
    content = hashlib.sha256()
    for file in sorted(files):
        content.update(file.relative_to(package).as_posix().encode())
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# GPU index -> its verdict in this process, or the reason if there is none.
_current: dict[int, Verdict | str] = {}
_is_off = False


def current(index: int | None) -> Verdict | str:
    """Return the verdict on a GPU, or why there is none. Reads the cache once a process.

    index: None for the current GPU.
    """
    if _is_off:
        return OFF
    device_index = torch.cuda.current_device() if index is None else index
    verdict = _current.get(device_index)
    if verdict is None:
        try:
            verdict = read(key(device_index))
        except (OSError, RuntimeError) as error:  # of the driver, or of sources in an archive
            verdict = f"not qualified on this card: its key is unknown ({error})"
        set_current(device_index, verdict)
    return verdict


def read(expected_key: Mapping[str, str]) -> Verdict | str:
    """Return the verdict for a key from the cache, or why there is none.

    A damaged file raises no error.
    """
    file = file_of(expected_key)
    try:
        verdict = read_verdict(json.loads(file.read_text()))
    except FileNotFoundError:
        return f"not qualified on this card: {ADVICE}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return (
            f"not qualified on this card: {file} cannot be read ({type(error).__name__}: {error}); "
            f"{ADVICE}"
        )
    if dict(verdict.key) != dict(expected_key):
        return f"not qualified on this card: {file} is another card's; {ADVICE}"
    return verdict


def write(verdict: Verdict) -> Path:
    """Write a verdict to the cache atomically, and return the file. Raises OSError."""
    file = file_of(verdict.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    temp_file = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        temp_file.write_text(json.dumps(verdict.json(), indent=1) + "\n")
        os.replace(temp_file, file)
    finally:
        temp_file.unlink(missing_ok=True)
    return file


def digests() -> dict[str, str]:
    """Return device -> the digest of its verdict or "none", for GPUs passed to `current`."""
    return {
        f"cuda:{index}": verdict.digest if isinstance(verdict, Verdict) and not _is_off else "none"
        for index, verdict in sorted(_current.items())
    }


def set_current(index: int, verdict: Verdict | str) -> None:
    """Set the result of `current` for a GPU in this process: a verdict, or why there is none."""
    _current[index] = verdict
    _set_winners()


def _set_winners() -> None:
    """Give the eager backend what the verdicts of this process measured to be faster."""
    current = {} if _is_off else _current
    found = {index: v for index, v in current.items() if isinstance(v, Verdict)}
    names = sorted({name for verdict in found.values() for name in verdict.winners})
    orders.winners = {
        name: functools.lru_cache(maxsize=4096)(functools.partial(_wins_on, name, found))
        for name in names
    }


def _wins_on(
    name: str,
    found: Mapping[int, Verdict],
    index: int,
    dtype: torch.dtype,
    a: Sequence[int],
    b: Sequence[int],
) -> bool:
    """`orders.Wins` of a name, given the verdicts on GPUs."""
    winners = found[index].winners if index in found else {}
    return name in winners and winners[name](dtype, *orders.sizes(name, a, b))


def set_off(is_off: bool) -> None:
    """Disable verdicts in this process, which makes GPUs run eager, or enable them again."""
    global _is_off
    _is_off = is_off
    _set_winners()


def forget() -> list[Path]:
    """Remove all verdicts from the cache and from this process, and return the files."""
    _current.clear()
    _set_winners()
    removed = list(folder().glob("qualified-*.json"))
    for file in removed:
        file.unlink()
    return removed
