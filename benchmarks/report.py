"""Write RESULTS.md, its pictures and the figures of other documents from results/.

    lora-kernels bench --json FILE
    lora-kernels bench --quant nf4 --json FILE
    lora-kernels bench --variants --json FILE
    lora-kernels bench --experts --dtypes bfloat16 --json FILE
    lora-kernels bench --head --json FILE
    lora-kernels bench --end-to-end --json FILE
    lora-kernels bench --count --ranks 16 --json benchmarks/results/traffic.json
    lora-kernels bench --host --json benchmarks/results/host.json
    python -m benchmarks.gguf
    python -m benchmarks.rounding
    python -m benchmarks.report [--check | --file]

FILE is benchmarks/results/ISA.json, which --file prints: ISA is the instruction set of the kernels.
Each machine has one file, and the report puts all of them beside each other. A run in which
environment variables cap the instructions has rows in RESULTS.md alone. AVX2's is of float32,
because PyTorch's 16-bit GEMMs take seconds there:

    export LORA_KERNELS_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2
    export MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
    lora-kernels bench --dtypes float32 --json FILE
    lora-kernels bench --quant nf4 --dtypes float32 --seconds 0.6 --json FILE

The prose is in templates/, the tables' rows are made here. --check writes nothing and fails where
the files say something else than the JSON, or a picture was drawn from another. It also names the
results that were measured on other sources than the tree's. That is no failure: sources change
between two measurements, and the pages mark results that are older than the newest. The package's
extra `bench` installs pandas, and matplotlib to draw; Jinja comes with torch.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch

from lora_kernels.backends.cpu import native
from lora_kernels.bench.qualify import SHEETS
from lora_kernels.bench.results import equivalent_call, limits, read, sources
from lora_kernels.bench.traffic import CHECKPOINTED, EXPERTS_WORD, TILED
from lora_kernels.core.device import DeviceInfo
from lora_kernels.finetune.compare_command import markdown

from . import pictures

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
JSON_TRAFFIC = HERE / "results/traffic.json"
JSON_HOST = HERE / "results/host.json"
JSON_GGUF = HERE / "results/gguf.json"
JSON_ROUNDING = HERE / "results/rounding.json"
JSON_LONG_CONTEXT = HERE / "results/long_context.json"
JSON_CLASSIFICATION = HERE / "results/classification.json"
RESULTS = HERE / "RESULTS.md"
OVERVIEW = HERE / "results/overview.png"  # README's picture
# Document -> the template of its figures.
FIGURES = {
    HERE.parent / "README.md": "README.md.j2",
    HERE.parent / "docs/commands.md": "commands.md.j2",
    HERE.parent / "docs/cpu.md": "cpu.md.j2",
    HERE.parent / "docs/gpu.md": "gpu.md.j2",
    HERE.parent / "docs/gguf.md": "gguf.md.j2",
    HERE.parent / "docs/long_context.md": "long_context.md.j2",
}
MARKS = "<!-- figures: written by benchmarks/report.py -->", "<!-- end of figures -->"
# Name in the JSON -> column; those that no row has are left out.
PEERS = {
    "addmm": "addmm_",
    "torch.compile": "compile",
    "eager": "eager",
    "ours, fp32 adapters": "ours, fp32 A B",
    "peft": "PEFT, fp32 A B",
}
MODES = {
    "step": "Forward and backward",
    "forward": "Forward",
    "backward": "Backward",
    "decoding": "Decoding",
}
NAMES = {
    "amxbf16": "AMX",
    "avx512bf16": "AVX-512 BF16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "scalar": "no vectors",
    "python": "no native kernels",
}
CODES_PEERS = ("bitsandbytes, eval", "bitsandbytes, train", "dense", "stream")
BNB_EVAL, BNB_TRAIN, *_ = CODES_PEERS
FORWARD, BF16 = "mode == 'decoding'", "mode == 'decoding' and dtype == 'bfloat16'"
# Target of the layer, its rows, and how many times our time the peer takes at least.
CODES_TARGETS = (
    ("one row of 4096×4096: stream", f"{BF16} and M == 1 and N == 4096", "stream", 1 / 1.45),
    ("one row of 4096×14336: stream", f"{BF16} and M == 1 and N == 14336", "stream", 1 / 2.0),
    ("bitsandbytes, eval, bfloat16", BF16, BNB_EVAL, 1.0),
    ("bitsandbytes, eval, float32", f"{FORWARD} and dtype == 'float32'", BNB_EVAL, 1.0),
    ("one row: bitsandbytes, train", f"{FORWARD} and M == 1 and K == 4096", BNB_TRAIN, 10.0),
    ("up to 16 rows: dense, bfloat16", f"{BF16} and M <= 16", "dense", 1.0),
    ("128 rows: dense", f"{FORWARD} and M == 128", "dense", 1 / 1.15),
    ("512 rows: dense", f"{FORWARD} and M == 512", "dense", 1 / 1.10),
    ("training step: bitsandbytes", "mode == 'step'", BNB_TRAIN, 1.3),
)
# Variant -> its numerator, its denominator, and how many times the latter it may take.
VARIANT_TARGETS = {"DoRA": ("ours", "LoRA", 1.15), "16 adapters": ("ours", "ours, 1", 1.3)}
TRAFFIC_ROWS = (1, 512, 8192)  # those of the table
BLOCKS = {"layer": "one layer", "qkv": "q, k, v", "mlp": "gated MLP"}
HOST_BLOCKS = BLOCKS | {"decoder": "decoder layer"}
# Name in the JSON -> column.
BLOCK_PEERS = {
    "ours": "ours",
    "peft": "PEFT",
    "unsloth": "Unsloth",
    "axolotl": "axolotl",
    "addmm": "addmm_",
    "unsloth_inplace": "Unsloth's default, which overwrites x",
}
# Mode of the host's time -> column.
HOST_MODES = {
    "step": "step",
    "checkpointed": "checkpointed",
    "no_grad": "no gradients",
    "one_row": "one row",
}
EXPERTS_PEERS = ("ours, NF4", "ours", "peft", "peft, unfolded", "unsloth", "axolotl")
# Parts of a user's step, by the first word of `Row.what`.
STEPS = {
    "qkv": "q, k, v of 4096, 1024, 1024",
    "mlp": "gated MLP of 14336",
    "head": "head of 128,256 and its loss",
    "layer": "one layer of 4096",
}
STEP_PEERS = {"ours": "ours", "peft": "PEFT", "unsloth": "Unsloth's order", "axolotl": "axolotl's"}
# Type of the adapters, ours and each peer's -> the counted types of layers that have it.
ADAPTERS = {
    "bf16": re.compile(r"(NF4 )?bf16, bf16 adapters?"),
    "fp32": re.compile(r"(NF4 )?bf16, fp32 adapters?(, autocast)?"),
}

CPU_PEERS = {"ours": "ours", "addmm": "addmm_", "peft": "PEFT"}

Row = dict[str, Any]
Cells = Iterator[Sequence[str]]  # a line of a table


@dataclass(frozen=True)
class Run:
    """The results of one machine, the runs of its file by suite."""

    file: Path

    @property
    def name(self) -> str:
        return NAMES.get(self.file.stem, self.file.stem) + ", capped" * self.is_capped

    @property
    def processor(self) -> str:
        """Its name without trademarks, and the instructions of the kernels."""
        name = re.sub(r"\(\w+\)| Processor", "", self.dense["provenance"]["processor"])
        return f"{name} ({self.name})"

    @property
    def is_capped(self) -> bool:
        """True if the processor and the libraries had wider instructions that were turned off."""
        return bool(self.dense["provenance"].get("capped_by"))

    @property
    def tax_png(self) -> Path:
        return self.file.with_name(f"{self.file.stem}-tax.png")

    @property
    def roofline_png(self) -> Path:
        return self.file.with_name(f"{self.file.stem}-roofline.png")

    @cached_property
    def runs(self) -> dict[str, Row]:
        return read(self.file)

    @property
    def dense(self) -> Row:
        return self.runs["layers"]

    @property
    def codes(self) -> Row | None:
        return self.runs.get("4-bit")

    @property
    def models(self) -> Row | None:
        return self.runs.get("model")

    @property
    def other_runs(self) -> list[Row]:
        """The runs of the suites that have one table each."""
        return [self.runs[kind] for kind in ("variants", "experts", "head") if kind in self.runs]

    def rows_of(self, mode: str) -> list[Row]:
        return [row for row in self.dense["rows"] if row["mode"] == mode]

    @property
    def peers(self) -> list[str]:
        """Name the PEERS that were timed."""
        present = {name for row in self.dense["rows"] for name in (*row["tax"], *row["misses"])}
        return [name for name in PEERS if name in present]

    @property
    def roofline_caption(self) -> str:
        """Machine and date of the dense layers' run, and of the 4-bit layers' run."""
        caption = machine(self.dense["provenance"])
        if self.codes is None:
            return caption
        facts = self.codes["provenance"]
        return f"{caption}; 4-bit: {facts['isa']}, torch {facts['torch']}, {facts['date']}"

    def digests(self) -> tuple[str, str]:
        """Hash the sources of the two pictures."""
        sources = [run for run in (self.dense, self.codes) if run]
        return pictures.digest(sources[0]), pictures.digest(*sources)

    @property
    def has_limits(self) -> bool:
        """True if the run measured the processor's peak, without which there is no roofline."""
        return limits(self.dense["provenance"]) is not None

    def drawn(self) -> dict[Path, tuple[str, Callable[[], bytes]]]:
        """Picture -> the digest of what it is drawn from, and what draws it."""
        tax, roofline = self.digests()
        name, caption = machine(self.dense["provenance"]), self.roofline_caption
        drawn = {self.tax_png: (tax, lambda: pictures.lora_tax(self.dense, name, tax))}
        if self.has_limits:
            drawn[self.roofline_png] = (
                roofline,
                lambda: pictures.roofline(self.dense, self.codes, caption, roofline),
            )
        return drawn


def runs() -> list[Run]:
    """Every machine that has measured, the one of the widest instructions first."""
    files = (HERE / "results").glob("*.json")
    measured = [Run(file) for file in files if "layers" in json.loads(file.read_text())]
    names = [*NAMES, *(run.file.stem for run in measured)]
    return sorted(measured, key=lambda run: (names.index(run.file.stem), run.file))


def provenances() -> dict[str, Row]:
    """The provenance of each run that is committed, by its file and suite."""
    return {
        f"{file.name}: {kind}": run["provenance"]
        for file in sorted((HERE / "results").glob("*.json"))
        for kind, run in json.loads(file.read_text()).items()
        if isinstance(run, dict) and "rows" in run
    }


def commit(facts: Row) -> str:
    """A run's commit, and whether its sources are older than those of the newest run."""
    known = [run for run in provenances().values() if "sources" in run]
    newest = max(known, key=lambda run: run["date"], default={}).get("sources")
    is_older = facts.get("sources") != newest or newest is None
    return f"commit {facts.get('commit', 'unknown')}" + " (**older sources**)" * is_older


def machine(facts: Row) -> str:
    def rates(peaks: dict[str, float]) -> str:
        return ", ".join(f"{peak / 1e9:.0f} GFLOP/s {name}" for name, peak in peaks.items())

    text = (
        f"{facts['threads']} threads of {facts['processor']} ({facts['machine']}) with "
        f"{facts['isa']}, torch {facts['torch']}, {facts['date']}; in the same run a plain copy "
        f"moved {facts['copy_bandwidth'] / 1e9:.0f} GB/s and the library GEMM reached "
        f"{rates(facts['product_peak'])}"
    )
    if caps := facts.get("capped_by"):
        text = f"capped by {' '.join(f'{name}={value}' for name, value in caps.items())}: {text}"
    return f"{text}; the processor's peak is {rates(facts['peak'])}" if facts.get("peak") else text


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; head: its first line."""
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def shape(row: Row) -> str:
    return f"{row['M']}×{row['K']}×{row['N']}"


def p50(row: Row) -> dict[str, float]:
    return {name: times["p50"] for name, times in row["seconds"].items()}


def tax_head(run: Run) -> str:
    peers = " | ".join(PEERS[name] for name in run.peers)
    return f"| M×K×N | dtype | r | frozen, ms | floor | target | ours | {peers} |"


def tax_rows(run: Run, mode: str) -> Cells:
    for row in run.rows_of(mode):
        target = row.get("target")
        yield (
            shape(row) + ", cold" * (row.get("cache") == "cold"),
            row["dtype"],
            str(row["R"]),
            f"{p50(row)['frozen'] * 1e3:.2f}",
            f"{row['floor']:.3f}",
            "–" if target is None else f"{target:.3f}",
            mark(row),
            *(cell(row, name) for name in run.peers),
        )


def mark(row: Row) -> str:
    """Our tax, with how it stands to the target and to addmm."""
    if "ours" in row["misses"]:
        return "✗ (misses the tolerance)"
    tax, target = row["tax"]["ours"], row.get("target")
    text = f"{tax:.3f}"
    if target is not None:
        text += " ✓" if tax <= target else " over target"
    return text if tax <= row["tax"].get("addmm", tax) else f"{text}, addmm faster"


def cell(row: Row, name: str) -> str:
    """A candidate's tax, with ✗ where it misses the tolerance; – where it is not in the row."""
    tax = f"{row['tax'][name]:.3f}" if name in row["tax"] else ""
    return " ".join(filter(None, [tax, "✗" * (name in row["misses"])])) or "–"


def model_rows(rows: list[Row]) -> Cells:
    """Yield a line for each step or token of a whole model; a row under load has no ratios."""
    for row in rows:
        base = {"nf4": "NF4", "gguf": "GGUF"}.get(row.get("quant_type"), row["dtype"])
        head = row["what"].removeprefix("model "), base, row["mode"], str(row["M"])
        seconds, peaks = p50(row), row.get("peak_bytes", {})
        if not {"peft", "ours"} <= seconds.keys():
            yield *head, *("–" for _ in range(5)), "; ".join(row["misses"].values())
            continue
        times = (model_ms(seconds.get(name)) for name in ("frozen", "peft", "ours"))
        ratio = seconds["ours"] / seconds["peft"]
        over = f"**{ratio:.2f}**, slower" if ratio > 1 else f"{ratio:.2f}"
        over += " ✗" * ("ours" in row["misses"])
        over_frozen = f"{seconds['ours'] / seconds['frozen']:.2f}" if "frozen" in seconds else "–"
        if row.get("under_load"):
            over, over_frozen = "under load: no result", "–"
        memory = "–"
        if {"peft", "ours"} <= peaks.keys():
            memory = f"{peaks['ours'] / 1e6:.0f} / {peaks['peft'] / 1e6:.0f}"
            memory += f" = {peaks['ours'] / peaks['peft']:.2f}"
        yield *head, *times, over, over_frozen, memory


def model_ms(seconds: float | None) -> str:
    """The milliseconds of a model's step or token; – for a model that was not timed."""
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def overhead_rows(measured: list[Run]) -> Cells:
    for run in measured:
        for mode, title in (("forward", "forward"), ("step", "forward and backward")):
            names = ("frozen", "ours", "addmm", "eager")
            us = [run.dense["overhead_us"][f"{name}, {mode}"] for name in names]
            yield run.name, title, *(f"{t:.1f}" for t in (*us, us[1] - us[3]))


def rows_4bit(data: Row) -> Cells:
    for row in data["rows"]:
        m = str(row["M"]) + ", step" * (row["mode"] == "step")
        head = (f"{row['K']}×{row['N']}", row["dtype"], m, row["cache"])
        seconds = p50(row)
        if "ours" not in seconds:
            yield *head, f"✗ {row['misses']['ours']}", *7 * ["–"]
            continue
        ours, errors = seconds["ours"], row.get("errors", {})
        yield (
            *head,
            f"{ours * 1e3:.3f}",
            *(f"{seconds[n] / ours:.2f}" if n in seconds else "–" for n in CODES_PEERS),
            flops_share(row, data["provenance"]),
            *(f"{errors[n]:.1e}" if n in errors else "–" for n in ("ours", CODES_PEERS[0])),
        )


def flops_share(row: Row, provenance: Row) -> str:
    """Return our multiply-adds a second over the processor's peak in the same run, or –."""
    here = limits(provenance)
    if here is None:
        return "–"
    M, K, N, R = (row[name] for name in "MKNR")
    forward = 2 * M * (N * K + R * (K + N))
    # dx is a product of the same size; P, dS and the two updates of y and dx, and dA and dB.
    step = 4 * M * N * K + 6 * M * R * (K + N)
    seconds: float = row["seconds"]["ours"]["p50"]
    peak = here.peaks[getattr(torch, row["dtype"])]
    share = (step if row["mode"] == "step" else forward) / seconds / peak
    return f"{share:.0%}" + " ✗" * (share > 1)


def targets_4bit(rows: list[Row]) -> Cells:
    """Return the targets of the layer, and for each the row furthest from it; cold."""
    timed = pd.DataFrame({**row, **p50(row)} for row in rows if "ours" in row["seconds"])
    for what, which, peer, least in CODES_TARGETS:
        chosen = timed.query(f"cache == 'cold' and {which}")
        if chosen.empty:
            continue
        over = chosen[peer] / chosen.ours
        worst, reached = chosen.loc[over.idxmin()], int((over >= least).sum())
        yield (
            what,
            f"{least:.2f}",
            f"{reached} of {len(chosen)}" + " ✓" * (reached == len(chosen)),
            f"{over.min():.2f}",
            f"{worst['K']}×{worst['N']}, M = {worst['M']}, {worst['dtype']}",
        )


def variant_rows(rows: list[Row]) -> Cells:
    for row in rows:
        seconds, target = p50(row), ""
        timed = [f"{name} ✗" for name in row.get("misses", ())]
        for name, t in seconds.items():
            over = f" ({t / seconds['ours']:.2f})" if name != "ours" and "ours" in seconds else ""
            timed.append(f"{name} {t * 1e3:.3g}{over}")
        name, base, limit = VARIANT_TARGETS.get(row["what"], ("", "", 0.0))
        if {name, base} <= seconds.keys():
            ratio = seconds[name] / seconds[base]
            verdict = "✓" if ratio <= limit else "over target"
            target = f"over {base} {ratio:.2f}, at most {limit} {verdict}"
        if row["what"] == "switching":
            target = f"at most 0.1 ms {'✓' if seconds['ours'] <= 1e-4 else 'over target'}"
        errors = (f"{name} {error:.1e}" for name, error in row.get("errors", {}).items())
        what = f"{row['what']}, {row['mode']}"
        yield what, row["dtype"], shape(row), "; ".join(timed), target, "; ".join(errors)


def memory_rows(run: Run) -> Cells:
    """MiB that steps at r = 16 hold for their backward, and at most."""
    for row in run.rows_of("step"):
        if row["R"] == 16 and row.get("bytes"):
            cells = (
                f"{row['bytes'][n] / 2**20:.3g} / {row['peak_bytes'][n] / 2**20:.3g}"
                if n in row["bytes"]
                else "–"
                for n in CPU_PEERS
            )
            yield shape(row), row["dtype"], *cells


def counted() -> Row | None:
    """The rows of `bench --count`: of layers beside PEFT's, and of blocks beside all peers."""
    run = read(JSON_TRAFFIC).get("count")
    if run is None:
        return None
    titled = [row for row in run["rows"] if "what" in row]
    return {
        "provenance": run["provenance"],
        "layers": [row for row in run["rows"] if "what" not in row],
        "blocks": [row for row in titled if row["what"].split(" ")[0] in BLOCKS],
        "experts": [row for row in titled if EXPERTS_WORD in row["what"]],
        "tiles": [row for row in titled if row["what"].startswith(TILED)],
        "titled": titled,
    }


def traffic_versions(facts: Row) -> str:
    return ", ".join(f"{n} {facts[n]}" for n in ("torch", "peft", "bitsandbytes") if facts[n])


def traffic_rows(rows: list[Row]) -> Cells:
    """A line has both directions of a layer."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["R"] == 16 and row["M"] in TRAFFIC_ROWS:
            name = ", ".join(filter(None, (row["dtype"], row.get("strategy"))))
            key = (name, f"{row['dropout_p']:g}", shape(row))
            lines.setdefault(key, []).extend(traffic_cells(row))
    return ((*key, *cells) for key, cells in lines.items())


def traffic_cells(row: Row) -> list[str]:
    """Ratio of bytes, MB, kernels and ratio of the peak."""
    count, kernels, peak = row["moved"], row["kernels"], row["peak_bytes"]
    lost = row["misses"].get("ours", "")
    marks = {name: " ✗" * (name in lost) for name in ("bytes", "kernels", "peak")}
    return [
        f"{count['ours'] / count['peft']:.2f}{marks['bytes']}",
        f"{megabytes(count['ours'])} / {megabytes(count['peft'])}",
        f"{kernels['ours']} / {kernels['peft']}{marks['kernels']}",
        f"{peak['ours'] / peak['peft']:.2f}{marks['peak']}",
    ]


def steps(rows: list[Row]) -> Iterator[Row]:
    """Yield a row for each training step, whose forward and backward are rows one after the other.

    Its losses are the backward's, which are judged with the forward.
    """
    for _, group in itertools.groupby(rows, lambda row: (row["what"], row["dtype"], row["M"])):
        parts = [*group]
        step = dict(parts[-1])
        for measure in ("moved", "kernels", "flops"):
            if measure in step:
                step[measure] = {n: sum(row[measure][n] for row in parts) for n in step["moved"]}
        step["peak_bytes"] = {n: max(row["peak_bytes"][n] for row in parts) for n in step["moved"]}
        yield step


def block_rows(rows: list[Row]) -> Cells:
    """A line has the step of one block, M = 8192."""
    for step in steps([row for row in rows if row["M"] == 8192]):
        block, sizes = step["what"].split(" ", 1)
        cells = (step_cell(step, name) for name in BLOCK_PEERS)
        yield f"{BLOCKS[block]}, {sizes}", step["dtype"], *cells


def tile_rows(rows: list[Row]) -> Cells:
    """A line has one number of rows over one base, checkpointed or not."""
    for step in steps(rows):
        ways = "checkpointed" if step["what"].endswith(CHECKPOINTED) else ""
        cells = (step_cell(step, name) for name in ("ours", "tiles", "untiled"))
        yield f"{step['M']:,}", step["dtype"].split(" ")[0].strip(","), ways, *cells


def tile_peaks(rows: list[Row]) -> Cells:
    """A line has one number of rows over one base: GB at the peak with x and dy, and TB moved."""
    for step in steps(rows):
        given = 2 * step["M"] * step["K"] * 2
        base, *_ = step["dtype"].split(" ")
        ways = "checkpointed" if step["what"].endswith(CHECKPOINTED) else ""
        names = "ours", "tiles", "untiled"
        peaks = (f"{(step['peak_bytes'][name] + given) / 1e9:.2f}" for name in names)
        moved = (f"{step['moved'][name] / 1e12:.3f}" for name in names)
        yield f"{step['M']:,}", base.strip(","), ways, *peaks, *moved


def long_context_peaks(found: Row) -> Cells:
    """A line has the peaks of one number of tokens, in GB, and their share of PEFT's."""
    for row in found["peaks"]:
        peaks = row["peak"]
        cells = (
            f"{peaks[name] / 1e9:.2f} ({peaks[name] / peaks['peft']:.2f})"
            for name in ("tiles", "ours", "peft", "trl")
        )
        yield f"{row['tokens']:,}", "checkpointed" if row["checkpointed"] else "", *cells


def rounding_rows(found: Row) -> Cells:
    """A line is a run, a format and a rounding, beside the base without an adapter."""
    for row in found["rows"]:
        if row["rounding"] != "unmerged":
            names = {"base": "none"}
            yield (
                row["run"],
                row["format"],
                names.get(row["rounding"], row["rounding"]),
                f"{row['share']:.3f}",
                f"{1e3 * row['chats']:.2g}",
                f"{1e3 * row['reviews']:.2g}",
                "✓" if found["fact"] in row["answer"] else "",
            )


def long_context_times(found: Row) -> str:
    """The time of a step with tiles and the loss, with the loss, and of TRL's, over PEFT's."""
    seconds = found["times"]["seconds"]
    ratios = [f"{seconds[name] / seconds['peft']:.2f}" for name in ("tiles", "ours", "trl")]
    return f"{ratios[0]} with tiles, {ratios[1]} without them, and with TRL's head {ratios[2]}"


def step_cell(step: Row, name: str) -> str:
    """MB, kernels, the peak's MB and, if they are counted, TFLOP of a step."""
    if name not in step["moved"]:
        return "–"
    lost = step["misses"].get("ours", "") if name == "ours" else ""
    cells = [
        megabytes(step["moved"][name]) + " ✗" * ("bytes" in lost),
        str(step["kernels"][name]),
        megabytes(step["peak_bytes"][name]) + " ✗" * ("peak" in lost),
    ]
    cells += [f"{step['flops'][name] / 1e12:.3g}"] if "flops" in step else []
    return " / ".join(cells)


def experts_rows(rows: list[Row]) -> Cells:
    """A line has the step of one experts module."""
    for step in steps(rows):
        yield step["what"], str(step["M"]), *(step_cell(step, name) for name in EXPERTS_PEERS)


def experts_range(rows: list[Row]) -> str:
    """The range of the ratio of a step's bytes, ours over a dense stack, to each peer's."""

    def ratios(measure: str, peer: str) -> str:
        ratios = sorted(step[measure]["ours"] / step[measure][peer] for step in steps(rows))
        return f"{ratios[0]:.2f} to {ratios[-1]:.2f}"

    return (
        f"ours move {ratios('moved', 'peft')} of PEFT's bytes, {ratios('moved', 'unsloth')} of "
        f"Unsloth's, and {ratios('moved', 'axolotl')} of axolotl's, with "
        f"{ratios('flops', 'axolotl')} of axolotl's FLOPs"
    )


def host_head() -> str:
    return f"| block | base, adapters | {' | '.join(HOST_MODES.values())} |"


def host_rows(rows: list[Row]) -> Cells:
    """A line has the modes of one block: minima of ours, and of Unsloth's sequence, over PEFT's."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        peft = row["seconds"]["peft"]["minimum"]
        over = {name: f"{times['minimum'] / peft:.2f}" for name, times in row["seconds"].items()}
        key = HOST_BLOCKS[row["what"].removeprefix("host ")], row["dtype"]
        text = over["ours"] + " ✗" * ("ours" in row["misses"])
        floor = f" / {over['unsloth']}" if "unsloth" in over else ""
        lines.setdefault(key, {})[row["mode"]] = text + floor
    for key, cells in lines.items():
        yield *key, *(cells.get(mode, "–") for mode in HOST_MODES)


def block_head() -> str:
    return f"| block | base, adapters | {' | '.join(BLOCK_PEERS.values())} |"


def megabytes(count: int) -> str:
    """Three digits, or all in front of the point."""
    return f"{count / 1e6:.{max(0, 2 - len(str(count // 1_000_000)) + 1)}f}"


def cpu_head(measured: list[Run]) -> str:
    names = (f"{run.name}: {' | '.join(CPU_PEERS.values())}" for run in measured)
    return f"| M×K×N | dtype | floor | {' | '.join(names)} |"


def cpu_rows(measured: list[Run]) -> Cells:
    """The rows that matter most: a training step at r = 16, and one row as a layer decodes it."""
    lines: dict[tuple[str, str, str], dict[Path, Row]] = {}
    for run in measured:
        for row in run.dense["rows"]:
            decoded = row["mode"] == "decoding" and row["M"] == 1 and row["cache"] == "cold"
            if row["R"] == 16 and (decoded or (row["mode"] == "step" and row["M"] > 1)):
                key = (shape(row) + ", decoded" * decoded, row["dtype"], f"{row['floor']:.3f}")
                lines.setdefault(key, {})[run.file] = row
    for key, row_of in lines.items():
        rows = [row_of.get(run.file) for run in measured]
        yield *key, *(cell(row, name) if row else "–" for row in rows for name in CPU_PEERS)


def step_bytes(
    rows: list[Row], measure: str = "moved", adapters: str = "bf16"
) -> Iterator[tuple[str, str, Row]]:
    """Bytes that a training step on a GPU moves: step, base, and those of each peer.

    Forward and backward, 8192 rows. measure: "peak_bytes" for the peak of memory. adapters: a key
    of ADAPTERS.
    """
    counted = [
        step
        for step in steps([row for row in rows if row["M"] == 8192])
        if ADAPTERS[adapters].fullmatch(step["dtype"]) and not step["what"].endswith(CHECKPOINTED)
    ]
    for prefix, name in STEPS.items():
        for step in counted:
            if step["what"].startswith(prefix):
                base = "NF4" if step["dtype"].startswith("NF4") else "bf16"
                yield name, base, {p: step[measure][p] for p in STEP_PEERS if p in step[measure]}


def step_rows(rows: list[Row], gpus: Sequence[DeviceInfo] = ()) -> Cells:
    """MB of `step_bytes`.

    gpus: a column each with the milliseconds that memory takes, at the data sheet's bandwidth, for
        what PEFT moves beyond ours.
    """
    for name, base, moved in step_bytes(rows):
        saved = ((moved["peft"] - moved["ours"]) / gpu.bandwidth * 1e3 for gpu in gpus)
        cells = (f"{moved[p] / 1e6:.0f}" if p in moved else "–" for p in STEP_PEERS)
        yield name, base, *cells, *(f"{ms:.2f}" for ms in saved)


def over_peer(row: Row, peer: str) -> float | None:
    """Return our time over the peer's, of the call of ours whose adapters have the peer's dtype.

    None if one of both has no time.
    """
    tax = row["tax"]
    ours = equivalent_call(peer, tax, row.get("misses", ()))
    return tax[ours] / tax[peer] if {ours, peer} <= tax.keys() else None


def tax_ranges(measured: list[Run]) -> Cells:
    """A dtype, and of its training steps our time over PEFT's, the least and the largest.

    Then the same beside PEFT's layer with 16-bit adapters, or "" for float32. Ours has adapters of
    the peer's dtype.
    """
    rows = [row for run in measured for row in run.rows_of("step")]
    rows = [row for row in rows if row["R"] == 16 and row["M"] > 1]
    for dtype in dict.fromkeys(row["dtype"] for row in reversed(rows)):
        steps = [row for row in rows if row["dtype"] == dtype]
        ranges = []
        for peer in ("peft", "peft, 16-bit adapters"):
            ratios = [ratio for row in steps if (ratio := over_peer(row, peer)) is not None]
            ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "")
        yield dtype, *ranges


def saved_range(rows: list[Row], adapters: str) -> str:
    """The least and the largest share of PEFT's bytes that our steps do not move."""
    counted = step_bytes(rows, adapters=adapters)
    shares = sorted(1 - moved["ours"] / moved["peft"] for _, _, moved in counted)
    return f"{100 * shares[0]:.0f} to {100 * shares[-1]:.0f} %"


def peak_share(rows: list[Row]) -> str:
    """The largest share of PEFT's peak memory that our steps take."""
    share = max(of["ours"] / of["peft"] for _, _, of in step_bytes(rows, "peak_bytes"))
    return f"{100 * share:.0f} %"


def overview(measured: list[Run]) -> tuple[str, Callable[[], bytes]]:
    """Return the digest of the source of README's picture, and the function that draws it."""
    times: dict[str, dict[str, float]] = {}
    for run in measured:
        for row in run.rows_of("step"):
            if row["R"] == 16 and row["M"] > 1:
                ratios = times.setdefault(f"{shape(row)} {row['dtype']}", {"peft": 1.0})
                if (ratio := over_peer(row, "peft")) is not None:
                    ratios[run.name] = ratio
    traffic = counted()
    moved = {
        f"{name}, {base}": {peer: count / counts["peft"] for peer, count in counts.items()}
        for name, base, counts in step_bytes(traffic["titled"] if traffic else [])
    }
    machines = {run.name: run.processor for run in measured}
    named = pictures.digest({"times": times, "moved": moved, "machines": machines})
    return named, lambda: pictures.overview(times, machines, moved, named)


def step_head(gpus: Sequence[DeviceInfo] = ()) -> str:
    return f"| {' | '.join(['step', 'base', *STEP_PEERS.values(), *(g.name for g in gpus)])} |"


def gguf_types(found: Row) -> Cells:
    """Yield a line for each type of blocks: bits in the file and packed, and their ratio."""
    for kind, row in found["types"].items():
        elements = row["elements"]
        bits = (f"{8 * row[name] / elements:.2f}" for name in ("file", "packed"))
        ratio = f"{row['packed'] / row['file']:.2f}"
        yield kind, *bits, ratio, f"{row['bits']} bits in blocks of {row['block']}"


def gguf_memory(found: Row) -> Cells:
    """Yield a line for each file: MB of it, of its packed weights, and of the peaks."""
    for name, row in found["models"].items():
        packed, stored = (row[part] / 1e6 for part in ("packed", "file"))
        peaks = []
        for what in ("load", "step"):
            ours, peft = (row[f"{what}, {whose}"] / 1e6 for whose in ("ours", "peft"))
            peaks.append(f"{ours:,.0f} / {peft:,.0f} = {ours / peft:.2f}")
        dtype = row["dtype"].removeprefix("torch.")
        share = f"{packed:,.0f} / {stored:,.0f} = {packed / stored:.2f}"
        yield name, f"{row['size'] / 1e6:,.0f}", dtype, share, *peaks


def gguf_times(found: Row) -> Cells:
    """Yield a line for a step and for a token: milliseconds, and the ratio of ours to PEFT's."""
    for mode, seconds in found["times"].items():
        times = (model_ms(seconds[name]) for name in ("frozen", "peft", "ours"))
        yield mode, *times, f"{seconds['ours'] / seconds['peft']:.2f}"


def gguf_tokens(found: Row) -> Cells:
    """Yield a line for each number of threads: milliseconds of a token, and their ratio."""
    for threads, seconds in found["tokens"].items():
        ours, theirs = seconds["ours"], seconds["llama.cpp"]
        yield threads, f"{ours * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{ours / theirs:.2f}"


TABLES = (
    *(machine, table, model_rows, tax_head, tax_rows, overhead_rows, rows_4bit, targets_4bit),
    *(variant_rows, memory_rows, traffic_versions, traffic_rows, block_head, block_rows),
    *(tile_rows, tile_peaks, long_context_peaks, long_context_times, rounding_rows),
    *(cpu_head, cpu_rows, step_head, step_rows, tax_ranges, saved_range, peak_share, experts_rows),
    experts_range,
    *(host_head, host_rows, commit),
    *(gguf_types, gguf_memory, gguf_times, gguf_tokens),
)


def render(template: str, measured: list[Run]) -> str:
    """One of templates/ filled in."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    options = {"trim_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, **options)
    has_long_context = JSON_LONG_CONTEXT.exists()
    environment.globals.update({function.__name__: function for function in TABLES})
    text = environment.get_template(template).render(
        runs=measured,
        here=HERE,
        modes=MODES,
        traffic=counted(),
        host=read(JSON_HOST).get("host"),
        gguf=json.loads(JSON_GGUF.read_text()) if JSON_GGUF.exists() else None,
        rounding=json.loads(JSON_ROUNDING.read_text()) if JSON_ROUNDING.exists() else None,
        long_context=json.loads(JSON_LONG_CONTEXT.read_text()) if has_long_context else None,
        gpus=[*SHEETS.values()],
    )
    return text.rstrip("\n")


def main(check: bool) -> int:
    measured = runs()
    uncapped = [run for run in measured if not run.is_capped]
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    wanted = {RESULTS: render("RESULTS.md.j2", measured) + "\n"}
    for document, template in FIGURES.items():
        text = document.read_text()
        if not pattern.search(text):
            name = document.name
            raise SystemExit(f"{name}: no place for figures; want the lines {begin} and {end}")
        figures = f"{begin}\n{render(template, uncapped)}\n{end}"
        wanted[document] = pattern.sub(lambda _, figures=figures: figures, text)
    if JSON_CLASSIFICATION.exists():
        classification = json.loads(JSON_CLASSIFICATION.read_text())
        wanted[JSON_CLASSIFICATION.with_suffix(".md")] = markdown(classification)
    stale = [p.name for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    pngs = {png: how for run in measured for png, how in run.drawn().items()}
    pngs[OVERVIEW] = overview(uncapped)
    stale += [
        str(png.relative_to(HERE))
        for png, (digest, _) in pngs.items()
        if not png.exists() or pictures.source(png.read_bytes()) != digest
    ]
    if check:
        print(f"stale: {', '.join(stale)}; run python -m benchmarks.report" if stale else "in step")
        now = sources()
        older = [name for name, facts in provenances().items() if facts.get("sources") != now]
        if older:
            print(f"no failure: measured on other sources than these: {', '.join(older)}")
        return 1 if stale else 0
    if find_spec("matplotlib") is None:
        print("benchmarks.report: needs matplotlib: pip install '.[bench]'")
        return 2
    for path, text in wanted.items():
        path.write_text(text)
    for png, (_, draw) in pngs.items():
        png.write_bytes(draw())
    return 0


if __name__ == "__main__":
    if "--file" in sys.argv[1:]:
        print(f"benchmarks/results/{native.isa or 'python'}.json")
        sys.exit()
    sys.exit(main(check="--check" in sys.argv[1:]))
