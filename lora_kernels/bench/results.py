"""Results of `lora-kernels bench`: rows and their provenance, as JSON, as CSV and in a summary.

Times are medians of calls that take turns in one process, warm unless a row says "cold". A step is
forward and backward with x needing a gradient. Errors are rms, relative to float64 on the same
numbers. A call of ours whose error is above the tolerance, beside that of plain PyTorch, gets ✗
instead of a time; a peer's gets ✗ beside it. In a row that was counted, and in one of the host's
time, ✗ marks ours where it loses.

In the summary a ratio is the median time of ours over the peer's in one row, of the host's the
minimum. Ours with float32 adapters is compared with PEFT's, whose adapters are float32 by default.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends.cpu import native
from ..choice import choose as selection
from ..core import device as devices
from ..core.problem import Problem
from ..quantization.codebooks import BITSANDBYTES_TYPES
from ..version import __version__
from . import timing
from .timing import Machine, Times

Facts = dict[str, Any]  # a run's provenance

PACKAGE = Path(__file__).parents[1]
# Environment variables that keep this package, ATen, MKL and oneDNN to older instructions.
CAPS = (
    *("LORA_KERNELS_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    *("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA"),
)
_TIMED = "backends", "choice", "core", "layers", "ops", "peft", "quantization"

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
VARIANTS = {"row norm": "PEFT's expression", "DoRA": "PEFT's LoRA", "16 adapters": "PEFT's, 1"}
NESTED_NF4, DECODED = "ours, NF4", "PEFT, decoded"  # beside another base than NF4 and FP4
# Variant -> pairs of calls whose ratios are its cost.
COST_RATIOS = {
    "DoRA": (("ours", "LoRA"), ("PEFT's DoRA", "PEFT's LoRA")),
    "16 adapters": (("ours", "ours, 1"), ("PEFT's", "PEFT's, 1")),
}
# The same of a base that bitsandbytes does not have.
OTHER_BASE = (("ours", NESTED_NF4), ("ours", DECODED))
WIDTH = 100  # columns of a terminal
STREAMED_ROWS = 16  # up to which a 4-bit layer's time is that of reading its codes
# Load above the bench's own threads: what another program that uses a core for half a minute adds
# to the kernel's average over a minute.
LOAD_MARGIN = 0.5


def is_ours(name: str) -> bool:
    """Return True if a call of that name runs this package's kernels."""
    return name.startswith("ours") or name in OUR_CALLS


@dataclass(kw_only=True)
class Row:
    """Calls that took turns, or were counted: the row's key, and the results of each call.

    Args:
        what: the variant, or the block of layers that was counted; None for a layer.
        dtype: of x and the weight; in words, with the adapter's, in a row that was counted.
        seconds: times of each call.
        device_seconds: the GPU's times of each call, beside the host's.
        moved, kernels, flops: bytes that each call reads and writes on a GPU, kernels that it
            launches, and FLOPs of its GEMMs, in a row that was counted.
        errors: rms of y, relative to float64.
        misses: for each call whose results miss the tolerance, by how much; in a row that was
            counted, or of the host's time, the measures in which ours loses.
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
    bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)
    judged: Sequence[str] | None = None
    seconds: dict[str, Times] = field(default_factory=dict)
    device_seconds: dict[str, Times] = field(default_factory=dict)
    load: float | None = None
    own_load: int | None = None
    under_load: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, and the tax."""
        always = "misses" if self.seconds or self.moved else ""
        values = {**asdict(self), "tax": self.tax}
        return {name: v for name, v in values.items() if v not in (None, {}) or name == always}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """Build from what `to_json` returned, or an older version."""
        known = {name: v for name, v in values.items() if name in cls.__dataclass_fields__}
        for key in ("seconds", "device_seconds"):
            known[key] = {name: Times(**times) for name, times in known.get(key, {}).items()}
        return cls(**known)

    @property
    def kind(self) -> str:
        """The suite of the row, such as "layers" or "4-bit"."""
        if self.moved:
            return "count"
        for kind in ("experts", "head", "host", "merge", "model"):
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
        words += [None if self.cache == "warm" else self.cache]
        return " ".join(filter(None, words))

    @property
    def baseline(self) -> str:
        """Name of the call with which the others are compared, from the row's sizes alone.

        >>> Row(quant_type="nf4", M=1, mode="decoding").baseline
        'stream'
        >>> Row(quant_type="nf4", M=512, mode="step").baseline
        'dense'
        """
        if self.kind == "4-bit":
            streamed = self.mode == "decoding" and self.M <= STREAMED_ROWS
            return "stream" if streamed else "dense"
        if self.kind in ("count", "host", "merge", "model"):
            return "peft"
        if self.kind == "head":
            return "pytorch"
        return VARIANTS.get(self.what or "", "PEFT's") if self.kind == "variants" else FROZEN

    @property
    def p50(self) -> dict[str, float]:
        """The median of each call in seconds."""
        return {name: times.p50 for name, times in self.seconds.items()}

    @property
    def compared(self) -> dict[str, float]:
        """The seconds of each call that ratios compare: its median, of the host's its minimum."""
        quantile = "minimum" if self.kind == "host" else "p50"
        return {name: getattr(times, quantile) for name, times in self.seconds.items()}

    @property
    def tax(self) -> dict[str, float]:
        """The LoRA tax: the median of each call over the frozen layer's, if that was timed."""
        p50 = self.p50
        return {name: t / p50[FROZEN] for name, t in p50.items()} if FROZEN in p50 else {}

    def note_load(self) -> None:
        """Record the load average after timing the row."""
        self.load, self.own_load = os.getloadavg()[0], torch.get_num_threads()
        self.under_load = self.load > self.own_load + LOAD_MARGIN

    def __str__(self) -> str:
        """Return the row as a table of its calls."""
        p50 = self.p50
        names = dict.fromkeys([*p50, *self.moved, *self.misses])
        lines = [f"{self.identity}, over {self.baseline}", *self._details()]
        lines.append(text_table({name: self._cells(name) for name in names}))
        lines += [f"✗ {name}: {miss}" for name, miss in self.misses.items()]
        is_other = self.quant_type not in (None, *BITSANDBYTES_TYPES)
        pairs = COST_RATIOS.get(self.what or "", OTHER_BASE if is_other else ())
        timed = [(a, b) for a, b in pairs if {a, b} <= p50.keys()]
        if costs := [f"{a} over {b} {p50[a] / p50[b]:.2f}" for a, b in timed]:
            lines.append(", ".join(costs))
        return "\n".join(lines)

    def _cells(self, name: str) -> dict[str, str | None]:
        """Return a call's line of the table."""
        times, values = self.seconds.get(name), self.moved or self.compared
        text = "–" if name in values else "✗"
        if {name, self.baseline} <= values.keys():
            ratio = values[name] / values[self.baseline]
            text = f"{ratio:.3f}" + " ✗" * (name in self.misses)
            if name == "ours" and self.target is not None:
                text += " ✓" if ratio <= self.target else " over target"
        cells: dict[str, str | None] = {"ratio": text}
        if self.kind == "host":
            for key, quantile in (("µs", "minimum"), ("p50", "p50")):
                cells[key] = f"{getattr(times, quantile) * 1e6:.0f}" if times else None
            device_times = self.device_seconds.get(name)
            cells["GPU's µs"] = f"{device_times.p50 * 1e6:.0f}" if device_times else None
        else:
            for key, quantile in (("ms", "p50"), ("p20", "p20"), ("p80", "p80")):
                cells[key] = f"{getattr(times, quantile) * 1e3:.3g}" if times else None
        cells["MB moved"] = f"{self.moved[name] / 1e6:.2f}" if name in self.moved else None
        cells["kernels"] = str(self.kernels[name]) if name in self.kernels else None
        for key, counts in (("MiB held", self.bytes), ("MiB peak", self.peak_bytes)):
            cells[key] = f"{counts[name] / 2**20:.3g}" if name in counts else None
        cells["rms error"] = f"{self.errors[name]:.1e}" if name in self.errors else None
        return cells

    def _details(self) -> list[str]:
        """Return the line of goals, backend and load, if there is anything to say."""
        goals = [("floor", self.floor), ("target", self.target)]
        words = [f"{word} {value:.3f}" for word, value in goals if value is not None]
        ours = ", ".join(filter(None, (self.backend, self.strategy)))
        words += [f"ours: {ours}"] if self.strategy else []
        if self.floor_ms and (times := self.seconds.get("ours")):
            share = self.floor_ms / times.p50 / 1e3
            words.append(f"{share:.0%} of the roofline")
            if share > 1:
                words[-1] += " ✗ (the machine's limits were measured wrong)"
        if self.under_load:
            words.append(f"under load: {self.load:.1f}, the bench {self.own_load}")
        return ["; ".join(words)] if words else []


@dataclass
class Result:
    """A run of a suite: the rows, and the provenance that a reader needs to judge or repeat them.

    kind: the suite's, under which it stands in a file.
    """

    kind: str
    provenance: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    overhead_us: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the run as a dict for JSON."""
        run = {"provenance": self.provenance, "rows": [row.to_json() for row in self.rows]}
        return run | ({"overhead_us": self.overhead_us} if self.overhead_us else {})

    def write(self, json_file: Path | None, csv_file: Path | None) -> None:
        """Write the run into a JSON file, beside those of other suites; and a call a line as CSV.

        An earlier run of the same suite is replaced.
        """
        for file in filter(None, (json_file, csv_file)):
            file.parent.mkdir(parents=True, exist_ok=True)
        if json_file:
            json_file.write_text(dump({**read(json_file), self.kind: self.to_json()}))
        if csv_file:
            lines = [*itertools.chain(*map(flat, self.rows))]
            _frame(lines, f"{ROW_COLUMNS} {CALL_COLUMNS}".split()).to_csv(csv_file, index=False)


Runs = dict[str, dict[str, Any]]  # of a file, by kind


def read(file: Path) -> Runs:
    """Return the runs of a file of `bench --json`; none if there is no file.

    Raises ValueError for any other file.
    """
    if not file.exists():
        return {}
    try:
        runs: Runs = json.loads(file.read_text())
        if all({"provenance", "rows"} <= run.keys() for run in runs.values()):
            return runs
    except (ValueError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{file} is there, and no file of `bench --json`")


def dump(runs: Runs) -> str:
    """Return the text of a file: a row a line."""
    texts = []
    for kind, run in runs.items():
        fields = []
        for name, value in run.items():
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list):
                rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
                text = f"[\n  {rows}\n ]"
            fields.append(f"{json.dumps(name)}: {text}")
        texts.append(f"{json.dumps(kind)}: {{\n " + ",\n ".join(fields) + "\n}")
    return "{" + ",\n".join(texts) + "}\n"


# Columns of the CSV: those of a row,
ROW_COLUMNS = "what dtype quant_type M K N R dropout_p mode cache backend strategy load under_load"
# and those of a call. result is "ok", "✗" with what missed the tolerance, or empty if it was not
# judged; over is the ratio to the baseline's time.
CALL_COLUMNS = (
    "call result over minimum_ms p20_ms p50_ms p80_ms rounds floor_ms held_bytes peak_bytes"
)


def flat(row: Row) -> Iterator[dict[str, Any]]:
    """Yield a line of the CSV for each call of the row.

    >>> row = Row(M=8, seconds={"ours": Times(0.5, 1.0, 2.0, 4.0, 9)}, misses={"eager": "y MISS"})
    >>> [(line["call"], line["result"], line.get("p50_ms")) for line in flat(row)]
    [('ours', 'ok', 2000.0), ('eager', '✗ y MISS', None)]
    """
    judged = row.seconds if row.judged is None else row.judged
    for name in dict.fromkeys([*row.seconds, *row.bytes, *row.misses]):
        line = {column: getattr(row, column) for column in ROW_COLUMNS.split()}
        result = f"✗ {row.misses[name]}" if name in row.misses else "ok" if name in judged else ""
        line |= {"call": name, "result": result, "floor_ms": row.floor_ms if name == "ours" else ""}
        line |= {"held_bytes": row.bytes.get(name), "peak_bytes": row.peak_bytes.get(name)}
        if times := row.seconds.get(name):
            quantiles = ("minimum", "p20", "p50", "p80")
            line |= {f"{key}_ms": getattr(times, key) * 1e3 for key in quantiles}
            line["rounds"] = times.rounds
            if row.baseline in row.seconds:
                line["over"] = row.compared[name] / row.compared[row.baseline]
        yield line


def equivalent_call(peer: str, timed: Container[str], missed: Container[str] = ()) -> str:
    """Return the call of ours whose adapters have the peer's dtype, if the row has one.

    >>> equivalent_call("peft", {"ours": 1.0, "ours, fp32 adapters": 1.1})
    'ours, fp32 adapters'
    >>> equivalent_call("peft", {"ours": 1.0})
    'ours'
    """
    name = EQUIVALENT_OF_PEER.get(peer, "ours")
    return name if name in timed or name in missed else "ours"


def ratios(rows: list[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Return, for each peer, ours over it in each row that has times of both.

    >>> times = {"ours": Times(1.0, 1.0, 1.0, 1.0, 9), "peft": Times(2.0, 2.0, 2.0, 2.0, 9)}
    >>> ratios([Row(seconds=times)])["peft"][0][0]
    0.5
    """
    ratios: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        seconds = row.compared
        for peer in seconds:
            if is_ours(peer) or peer in NO_PEERS:
                continue
            ours = equivalent_call(peer, seconds, row.misses)
            if ours in seconds:
                ratios.setdefault(peer, []).append((seconds[ours] / seconds[peer], row))
    return ratios


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each peer, and the numbers of misses and of rows under load."""
    if table := peers_table(rows):
        yield "ours over each peer, medians of the same row; below 1 ours is faster:"
        yield table
    if wrong := sum(is_ours(name) for row in rows for name in row.misses):
        yield f"{wrong} results of ours miss the tolerance (✗) and have no time"
    yield from under_load(rows)


def peers_table(rows: list[Row]) -> str:
    """Return a line for each peer, how often ours is faster and the worst row; "" without any."""
    lines = {}
    for peer, pairs in ratios(rows).items():
        values = [ratio for ratio, _ in pairs]
        worst, worst_row = max(pairs, key=lambda pair: pair[0])
        wrong = sum(peer in row.misses for _, row in pairs)
        lines[peer] = {
            "rows": len(values),
            "faster": sum(ratio < 1 for ratio in values),
            "slower": sum(ratio > 1 for ratio in values),
            "✗": wrong or "",
            "median": f"{statistics.median(values):.3f}",
            "worst": f"{worst:.3f}",
            "worst row": worst_row.identity,
        }
    return text_table(lines) if lines else ""


def under_load(rows: list[Row]) -> Iterator[str]:
    """Yield the number of rows that were timed under load, if there are any."""
    if loaded := sum(bool(row.under_load) for row in rows):
        yield f"{loaded} of {len(rows)} rows were timed under load: measure them again"


def _frame(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    import pandas as pd  # type: ignore[import-untyped]

    return pd.DataFrame(lines, columns=columns, dtype=object)


def text_table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table that fits a terminal; columns without a value are left out.

    >>> print(text_table({"ours": {"ms": "1.5", "p20": None}, "peft": {"ms": "12", "p20": None}}))
           ms
    ours  1.5
    peft   12
    """
    columns = {name: None for line in lines.values() for name in line}
    frame = _frame([*lines.values()], [*columns]).dropna(axis="columns", how="all").fillna("")
    frame.index = [*lines]
    text: str = frame.to_string(line_width=WIDTH)
    return "\n".join(map(str.rstrip, text.splitlines()))


def _commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if a tracked file has changes.

    Results do not count: the suites of one `make bench` write them one after the other.
    """
    git = "git", "-C", str(PACKAGE)
    commit = _output(*git, "describe", "--always", "--exclude=*")
    others = ":(top)", ":(top,exclude)benchmarks/results"
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", *others)
    return f"{commit}-dirty" if commit and changes else commit


def versions(*libraries: str) -> dict[str, Any]:
    """Return commit, sources and version of this package, the date, and the libraries' versions."""
    return {
        "commit": _commit(),
        "sources": sources(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "version": __version__,
        **{name: devices.version(name) for name in libraries},
    }


def sources() -> str:
    """Return a digest of the sources that are timed: csrc, and the package but for its commands.

    >>> len(sources())
    12
    """
    files = [PACKAGE / "__init__.py", *(PACKAGE.parent / "csrc").rglob("*.*")]
    files += [file for folder in _TIMED for file in (PACKAGE / folder).rglob("*.py")]
    content = hashlib.sha256()
    for file in sorted(files):
        content.update(file.relative_to(PACKAGE.parent).as_posix().encode())
        content.update(file.read_bytes())
    return content.hexdigest()[:12]


def limits(facts: Facts) -> Machine | None:
    """Return the limits in a run's provenance; None if they were not measured.

    Older results have a copy and a library GEMM, which are no limits: reading is faster than
    copying, and our kernels may be faster than the GEMM.
    """
    if facts.get("peak") is None:
        return None
    peaks = {getattr(torch, name): peak for name, peak in facts["peak"].items()}
    return Machine(max(facts["copy_bandwidth"], facts["read_bandwidth"]), peaks)


def provenance(dtypes: list[str], device: str = "cpu") -> Facts:
    """Return the facts that a reader needs to judge or to repeat the times, and measured rates."""
    products = {name: timing.product_peak(getattr(torch, name), device=device) for name in dtypes}
    return environment(device) | {
        "copy_bandwidth": timing.copy_bandwidth(device=device),
        "read_bandwidth": timing.read_bandwidth(device=device),
        "product_peak": products,
        "peak": products if device == "cuda" else _peaks(products),
    }


def keep_faster(facts: Facts, later: Facts) -> None:
    """Raise the rates in a run's provenance to those in a later one, where they are faster.

    A processor's clock changes within a run, and a share of a peak is one of the fastest.

    >>> facts = {"read_bandwidth": 2.0, "peak": {"float32": 5.0}}
    >>> keep_faster(facts, {"read_bandwidth": 1.0, "peak": {"float32": 6.0}})
    >>> facts
    {'read_bandwidth': 2.0, 'peak': {'float32': 6.0}}
    """
    for name in ("copy_bandwidth", "read_bandwidth"):
        if name in facts:
            facts[name] = max(facts[name], later[name])
    for name in ("product_peak", "peak"):
        if facts.get(name):
            facts[name] = {
                dtype: max(rate, later[name][dtype]) for dtype, rate in facts[name].items()
            }


def environment(device: str = "cpu") -> Facts:
    """Return the machine, the versions and the commit of a run."""
    cpu, f32 = devices.cpu(), torch.float32
    facts: Facts = {
        "backend": selection.choose(Problem(device, f32, f32, f32, f32, 8)).backend,
        "isa": native.isa,
        "capped_by": {name: os.environ[name] for name in CAPS if name in os.environ},
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
