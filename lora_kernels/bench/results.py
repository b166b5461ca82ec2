"""Results of `lora-kernels bench`: rows and their provenance, as JSON, as CSV and in a summary.

Times are medians of calls that take turns in one process, warm unless a row says "cold". A step is
forward and backward with x needing a gradient. Errors are rms, relative to float64 on the same
numbers. A call of ours whose error is above the tolerance, beside that of plain PyTorch, gets ✗
instead of a time.

In the summary a ratio is the median time of ours over the peer's in one row. Ours with float32
adapters is compared with PEFT's, whose adapters are float32 by default.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends.cpu import native
from ..choice import choose as selection
from ..core import device as devices
from ..core.problem import Problem
from ..oracle import tolerance
from ..version import __version__
from . import timing
from .timing import Machine, Times

Facts = dict[str, Any]  # of a run: its provenance

FROZEN = "frozen"
# Baselines that are lower bounds, such as the frozen layer, and no alternative to ours.
NO_PEERS = (FROZEN, "stream")
OUR_CALLS = ("LoRA", "three LoRALinear", "three calls")  # and every name that begins with "ours"
# Peer -> the equivalent call of ours; "ours" for all others, and if a row lacks it.
EQUIVALENT_OF_PEER = {
    "peft": "ours, fp32 adapters",
    "PEFT's LoRA": "LoRA",
    "PEFT's, 4": "ours, 4",
    "PEFT's, 1": "ours, 1",
    "trl, no adapter": "ours, no adapter",
}
# Variant -> its baseline; "PEFT's" for all others.
VARIANTS = {"row norm": "PEFT's expression", "DoRA step": "PEFT's LoRA", "16 adapters": "PEFT's, 1"}
# Variant -> pairs of calls whose ratios are its cost.
COST_RATIOS = {
    "DoRA step": (("ours", "LoRA"), ("PEFT's DoRA", "PEFT's LoRA")),
    "16 adapters": (("ours", "ours, 1"), ("PEFT's", "PEFT's, 1")),
}
STREAMED_ROWS = 16  # up to which a 4-bit layer's time is that of reading its codes
# Load above the bench's own threads: what another program that uses a core for half a minute adds
# to the kernel's average over a minute.
LOAD_MARGIN = 0.5


def is_ours(name: str) -> bool:
    """Return True if a call of that name runs this package's kernels."""
    return name.startswith("ours") or name in OUR_CALLS


@dataclass(kw_only=True)
class Row:
    """Calls that took turns: the row's key, and the results of each call.

    Args:
        what: the variant, or None.
        seconds: times of each call; none in a row that counts bytes alone.
        errors: rms of y, relative to float64.
        misses: for each call whose results miss the tolerance, by how much.
        judged: the calls that were compared with the tolerance; None for all.
        bytes, peak_bytes: held for the backward, and the peak of a step.
        load, own_load, under_load: the load average, the most of it that the bench causes, and
            whether other programs must have caused the rest.
    """

    what: str | None = None
    dtype: str = "float32"
    quant_type: str | None = None
    M: int = 0
    K: int = 0
    N: int = 0
    R: int = 0
    dropout_p: float | None = None
    mode: str | None = None
    cache: str | None = None
    backend: str | None = None
    strategy: str | None = None
    floor: float | None = None
    floor_ms: float | None = None
    target: float | None = None
    minimum: int | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, dict[str, int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)
    judged: Sequence[str] | None = None
    seconds: dict[str, Times] = field(default_factory=dict)
    load: float | None = None
    own_load: int | None = None
    under_load: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, and the tax."""
        kept = "misses" if self.seconds else ""
        fields = {**asdict(self), "tax": self.tax}
        return {name: v for name, v in fields.items() if v not in (None, {}) or name == kept}

    @property
    def kind(self) -> str:
        """The suite of the row: "layers", "4-bit", "experts", "head" or "variants"."""
        for kind in ("experts", "head"):
            if self.what and self.what.startswith(kind):
                return kind
        return "4-bit" if self.quant_type else "variants" if self.what else "layers"

    @property
    def identity(self) -> str:
        """The row in words.

        >>> Row(dtype="float32", M=8, K=48, N=32, R=3, mode="step").identity
        'float32 8×48×32 r=3 step'
        """
        words = [self.what, self.dtype, self.quant_type, f"{self.M}×{self.K}×{self.N} r={self.R}"]
        words += [f"dropout {self.dropout_p}" if self.dropout_p else None, self.mode]
        # Earlier files do not say that layers are warm.
        words += [None if (self.kind, self.cache) == ("layers", "warm") else self.cache]
        return " ".join(filter(None, words))

    @property
    def baseline(self) -> str:
        """Name of the call with which the others are compared, from the row's sizes alone.

        >>> Row(quant_type="nf4", M=1, mode="forward").baseline
        'stream'
        >>> Row(quant_type="nf4", M=512, mode="step").baseline
        'dense'
        """
        if self.kind == "4-bit":
            streamed = self.mode == "forward" and self.M <= STREAMED_ROWS
            return "stream" if streamed else "dense"
        if self.kind == "head":
            return "pytorch"
        return VARIANTS.get(self.what or "", "PEFT's") if self.kind == "variants" else FROZEN

    @property
    def p50(self) -> dict[str, float]:
        """The median of each call in seconds."""
        return {name: times.p50 for name, times in self.seconds.items()}

    @property
    def tax(self) -> dict[str, float]:
        """The LoRA tax: the median of each call over the frozen layer's, if that was timed."""
        p50 = self.p50
        return {name: t / p50[FROZEN] for name, t in p50.items()} if FROZEN in p50 else {}

    def judge(self, errors: dict[str, float], eager: float, u: float, sums: Sequence[int]) -> None:
        """Compare the errors of ours with the tolerance.

        eager: plain PyTorch's error. u, sums: as in `tolerance.rms_limit`.
        """
        limit = tolerance.rms_limit(eager, u, sums)
        self.errors, self.judged = errors, [name for name in errors if is_ours(name)]
        self.misses = {
            name: f"y MISS: rms {errors[name] / u:.3g} u, limit {limit / u:.3g} u"
            for name in self.judged
            if not errors[name] <= limit  # NaN is not
        }

    def time(
        self, calls: Mapping[str, Callable[[], object]], seconds: float, device: str = "cpu"
    ) -> Row:
        """Time the calls without a miss; return the row."""
        sound = {name: call for name, call in calls.items() if name not in self.misses}
        self.seconds = timing.interleave(sound, seconds=seconds, device=device)
        return self

    def note_load(self) -> None:
        """Record the load average after timing the row."""
        self.load, self.own_load = os.getloadavg()[0], torch.get_num_threads()
        self.under_load = self.load > self.own_load + LOAD_MARGIN

    def __str__(self) -> str:
        """Return a timed row as text: each call over the baseline, then details of ours."""
        p50, unit = self.p50, self.baseline
        goals = [("floor", self.floor), ("target", self.target)]
        goal = "".join(f", {word} {value:.3f}" for word, value in goals if value is not None)
        words = []
        for name in dict.fromkeys([*p50, *self.misses]):
            ratio = p50[name] / p50[unit] if name in p50 else None
            text = name if ratio is None else f"{name} {ratio:.3f}"
            if name in self.misses:
                text += f" ✗ ({self.misses[name]})"
            elif name == "ours" and ratio is not None and self.target is not None:
                text += " ✓" if ratio <= self.target else " over target"
            words += [text] if name != unit else []
        head = f"{self.identity}: {unit} {p50[unit] * 1e3:.3g} ms{goal}"
        if self.under_load:
            head += f"  [under load: {self.load:.1f}, the bench {self.own_load}]"
        lines = [head, f"    over it: {', '.join(words)}"]
        if times := self.seconds.get("ours"):
            three = "/".join(f"{t * 1e3:.3g}" for t in (times.p20, times.p50, times.p80))
            by = f"{self.backend}, {self.strategy}; " if self.strategy else ""
            lines.append(f"    ours: {by}{three} ms (p20/p50/p80)")
            if self.floor_ms:
                share = self.floor_ms / times.p50 / 1e3
                lines[-1] += f", {share:.0%} of the roofline"
                if share > 1:
                    lines[-1] += " ✗ (the machine's limits were measured wrong)"
        pairs = (pair for pair in COST_RATIOS.get(self.what or "", ()) if {*pair} <= p50.keys())
        if each := [f"{over} over {under} {p50[over] / p50[under]:.2f}" for over, under in pairs]:
            lines.append(f"    {', '.join(each)}")
        if peaks := self.peak_bytes:
            each = [f"{n} {b / 2**20:.3g} + {peaks[n] / 2**20:.3g}" for n, b in self.bytes.items()]
            lines.append(f"    MiB held + peak of a step: {', '.join(each)}")
        if self.errors:
            each = [f"{name} {error:.1e}" for name, error in self.errors.items()]
            lines.append(f"    rms errors: {', '.join(each)}")
        return "\n".join(lines)


@dataclass
class Result:
    """A run: the rows, and the provenance that a reader needs to judge or to repeat them."""

    provenance: dict[str, Any]
    rows: list[Any] = field(default_factory=list)
    overhead_us: dict[str, float] | None = None

    def write(self, json_file: Path | None, csv_file: Path | None) -> None:
        """Write JSON, a row a line; and the times and bytes as CSV, a call a line.

        Rows are in the list "rows", or in the one that their class names as its `table`.
        """
        for file in filter(None, (json_file, csv_file)):
            file.parent.mkdir(parents=True, exist_ok=True)
        if json_file:
            tables: dict[str, list[str]] = {"rows": []}
            for row in self.rows:
                line = json.dumps(row.to_json(), ensure_ascii=False)
                tables.setdefault(getattr(row, "table", "rows"), []).append(line)
            facts = json.dumps(self.provenance, indent=1, ensure_ascii=False)
            sep = ",\n  "
            more = f',\n "overhead_us": {json.dumps(self.overhead_us)}' if self.overhead_us else ""
            lists = ",\n ".join(
                f'"{name}": [\n  {sep.join(lines)}\n ]' for name, lines in tables.items()
            )
            json_file.write_text(f'{{\n "provenance": {facts},\n {lists}{more}\n}}\n')
        if csv_file:
            with csv_file.open("w", newline="", encoding="utf-8") as text:
                writer = csv.DictWriter(text, f"{OF_ROW} {OF_CALL}".split(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(itertools.chain(*map(flat, self.rows)))


# Columns of the CSV: those of a row,
OF_ROW = "what dtype quant_type M K N R dropout_p mode cache backend strategy load under_load"
# and of each call. result is "ok", "✗" with what missed the tolerance, or empty if it was not
# judged; over is the ratio to the baseline's time.
OF_CALL = "call result over p20_ms p50_ms p80_ms rounds floor_ms held_bytes peak_bytes"


def flat(row: Row) -> Iterator[dict[str, Any]]:
    """Yield a line of the CSV for each call of the row.

    >>> row = Row(M=8, seconds={"ours": Times(1.0, 2.0, 4.0, 9)}, misses={"eager": "y MISS"})
    >>> [(line["call"], line["result"], line.get("p50_ms")) for line in flat(row)]
    [('ours', 'ok', 2000.0), ('eager', '✗ y MISS', None)]
    """
    judged = row.seconds if row.judged is None else row.judged
    for name in dict.fromkeys([*row.seconds, *row.bytes, *row.misses]):
        line = {column: getattr(row, column) for column in OF_ROW.split()}
        result = f"✗ {row.misses[name]}" if name in row.misses else "ok" if name in judged else ""
        line |= {"call": name, "result": result, "floor_ms": row.floor_ms if name == "ours" else ""}
        line |= {"held_bytes": row.bytes.get(name), "peak_bytes": row.peak_bytes.get(name)}
        if times := row.seconds.get(name):
            line |= {f"{key}_ms": getattr(times, key) * 1e3 for key in ("p20", "p50", "p80")}
            line["rounds"] = times.rounds
            if row.baseline in row.seconds:
                line["over"] = times.p50 / row.seconds[row.baseline].p50
        yield line


def ratios(rows: list[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Return, for each peer, ours over it in each row that has times of both.

    >>> times = {"ours": Times(1.0, 1.0, 1.0, 9), "peft": Times(2.0, 2.0, 2.0, 9)}
    >>> ratios([Row(seconds=times)])["peft"][0][0]
    0.5
    """
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        for peer in row.p50:
            if is_ours(peer) or peer in NO_PEERS:
                continue
            like = EQUIVALENT_OF_PEER.get(peer, "ours")
            if like not in row.p50 and like not in row.misses:
                like = "ours"
            if like in row.p50:
                found.setdefault(peer, []).append((row.p50[like] / row.p50[peer], row))
    return found


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each peer, and the numbers of misses and of rows under load."""
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
            f"{worst:.3f}: {at.identity}"
        )
        wrong = sum(peer in row.misses for _, row in found)
        yield text + (f"; {wrong} of its results miss the tolerance" if wrong else "")
    if wrong := sum(is_ours(name) for row in rows for name in row.misses):
        yield f"{wrong} results of ours miss the tolerance (✗) and have no time"
    if loaded := sum(bool(row.under_load) for row in rows):
        yield f"{loaded} of {len(rows)} rows were timed under load: measure them again"


class Suite:
    """One of the tables of `bench`.

    Args:
        option: of the command line that selects the suite.
        unused: options without effect on this suite.
        libraries: the versions that determine the counts; empty for suites that measure times.
    """

    kind, option, unused = "", "", ""
    libraries: tuple[str, ...] = ()

    def provenance(self, args: argparse.Namespace) -> Facts:
        libraries = self.libraries
        return versions(*libraries) if libraries else provenance(args.dtypes, args.device)

    def head(self, args: argparse.Namespace, result: Result) -> Iterator[str]:
        """Yield lines before the rows of a complete run."""
        return iter(())

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Any]:
        """Yield the rows of the table.

        facts: the provenance.
        """
        raise NotImplementedError

    def line(self, row: Any) -> str:
        """Return a row as text."""
        return str(row)

    def summary(self, rows: list[Any]) -> Iterator[str]:
        """Yield lines after the rows."""
        return summary(rows)

    def has_failed(self, rows: list[Any]) -> bool:
        """True if a result of ours misses the tolerance."""
        return any(is_ours(name) for row in rows for name in row.misses)


def versions(*libraries: str) -> dict[str, Any]:
    """Return the versions of this package and of the libraries."""
    return {"version": __version__, **{name: devices.version(name) for name in libraries}}


def limits(facts: Facts) -> Machine | None:
    """Return the limits in a run's provenance; None if they were not measured.

    Older results have a copy and a library GEMM, which are no limits: reading is faster than
    copying, and our kernels may be faster than the GEMM.
    """
    if facts.get("peak") is None:
        return None
    peaks = {getattr(torch, name): peak for name, peak in facts["peak"].items()}
    return Machine(max(facts["copy_bandwidth"], facts["read_bandwidth"]), peaks)


def provenance(dtypes: list[str], device: str = "cpu") -> dict[str, Any]:
    """Return the facts that a reader needs to judge or to repeat the times."""
    cpu, f32 = devices.cpu(), torch.float32
    git = "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"
    products = {name: timing.product_peak(getattr(torch, name), device=device) for name in dtypes}
    facts: Facts = {
        "commit": _output(*git),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "backend": selection.choose(Problem(device, f32, f32, f32, f32, 8)).backend,
        "isa": native.isa,
        "machine": cpu.architecture,
        "processor": cpu.name,
        "cores": cpu.cores,
        "threads": cpu.threads,
        "clocks_mhz": devices.clocks_mhz(),
        "load": os.getloadavg()[0],  # at the start
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions("peft", "transformers", "bitsandbytes", "triton", "numpy"),
        "torch": torch.__version__,
        "copy_bandwidth": timing.copy_bandwidth(device=device),
        "read_bandwidth": timing.read_bandwidth(device=device),
        "product_peak": products,
        "peak": products if device == "cuda" else _peaks(products),
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        facts |= {
            "backend": "triton",
            "gpu": asdict(devices.gpus()[0]),
            "cuda": torch.version.cuda,
            "nvidia_smi": _output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return facts


def _peaks(products: dict[str, float]) -> dict[str, float] | None:
    """Return `timing.peak` by dtype; None without our kernels."""
    peaks = {name: timing.peak(getattr(torch, name), rate) for name, rate in products.items()}
    return {name: peak for name, peak in peaks.items() if peak is not None} or None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
