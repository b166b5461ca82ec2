"""Write RESULTS.md, its pictures and other tables from results/, README's figures.

    lora-kernels bench --json benchmarks/results/ISA/dense.json
    lora-kernels bench --quant nf4 --json benchmarks/results/ISA/4bit.json
    lora-kernels bench --variants --json benchmarks/results/ISA/variants.json
    lora-kernels bench --memory --json benchmarks/results/memory.json
    lora-kernels bench --count --json benchmarks/results/traffic.json
    lora-kernels compare --demo --out benchmarks/results
    python -m benchmarks.report [--check | --folder]

ISA is the instruction set of the kernels, which --folder prints: one folder a machine, and the
report puts all of them beside each other. --check writes nothing and fails where the files say
something else than the JSON, or a picture was drawn from another. To draw needs matplotlib, which
the package's extra `bench` installs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cpu_costs
from lora_kernels.backends import cpu, native
from lora_kernels.cpu_costs import Machine, Sizes
from lora_kernels.finetune.compare_command import markdown

from . import pictures

HERE = Path(__file__).parent
JSON_MEMORY = HERE / "results/memory.json"
JSON_TRAFFIC = HERE / "results/traffic.json"
JSON_CLASSIFICATION = HERE / "results/classification.json"
RESULTS, README = HERE / "RESULTS.md", HERE.parent / "README.md"
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

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What one machine has measured."""

    folder: Path

    @property
    def name(self) -> str:
        return NAMES.get(self.folder.name, self.folder.name)

    @property
    def tax_png(self) -> Path:
        return self.folder / "lora-tax.png"

    @property
    def roofline_png(self) -> Path:
        return self.folder / "roofline.png"

    @cached_property
    def dense(self) -> Row:
        return json.loads((self.folder / "dense.json").read_text())  # type: ignore[no-any-return]

    @cached_property
    def codes(self) -> Row | None:
        return self._read("4bit.json")

    @cached_property
    def variants(self) -> Row | None:
        return self._read("variants.json")

    def _read(self, name: str) -> Row | None:
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    def digests(self) -> tuple[str, str]:
        """Of what lora-tax.png is drawn from, and roofline.png."""
        files = [file for n in ("dense", "4bit") if (file := self.folder / f"{n}.json").exists()]
        return pictures.digest(files[0]), pictures.digest(*files)


def runs() -> list[Run]:
    """Every machine that has measured, the one of the widest instructions first."""
    folders = [file.parent for file in (HERE / "results").glob("*/dense.json")]
    order = [*NAMES, *(folder.name for folder in folders)]
    return [Run(f) for f in sorted(folders, key=lambda f: (order.index(f.name), f.name))]


def machine(facts: Row) -> str:
    peak = ", ".join(f"{p / 1e9:.0f} GFLOP/s {n}" for n, p in facts["product_peak"].items())
    return (
        f"{facts['threads']} threads of {facts['machine']} with {facts['isa']}, torch "
        f"{facts['torch']}, {facts['date']}; in the same run a plain copy moved "
        f"{facts['copy_bandwidth'] / 1e9:.0f} GB/s and the library's product reached {peak}"
    )


def mark(row: Row) -> str:
    """Our tax, with how it stands to the target and to addmm."""
    if not row["correct"]:
        return "✗ (misses the tolerance)"
    tax = row["tax"]["ours"]
    text = f"{tax:.3f}"
    if row["target"] is not None:
        text += " ✓" if tax <= row["target"] else " over target"
    return text if tax <= row["tax"].get("addmm", tax) else f"{text}, addmm faster"


def cell(row: Row, name: str) -> str:
    """A candidate's tax, with ✗ where it misses the tolerance; – where it is not in the row."""
    tax = f"{row['tax'][name]:.3f}" if name in row["tax"] else ""
    return " ".join(filter(None, [tax, "✗" * (name in row["misses"])])) or "–"


def peers(data: Row) -> list[str]:
    """Those of PEERS that were timed."""
    present = {name for row in data["rows"] for name in (*row["tax"], *row["misses"])}
    return [name for name in PEERS if name in present]


def table(rows: list[Row], names: list[str]) -> list[str]:
    head = ["M×K×N", "dtype", "r", "frozen, ms", "floor", "target", "ours"]
    head += [PEERS[name] for name in names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [mark(row), *(cell(row, name) for name in names)]
        target = "–" if row["target"] is None else f"{row['target']:.3f}"
        cold = ", cold" * (row.get("cache") == "cold")
        lines.append(
            f"| {row['M']}×{row['K']}×{row['N']}{cold} | {row['dtype']} | {row['R']} "
            f"| {row['frozen_ms']:.2f} | {row['floor']:.3f} | {target} | {' | '.join(cells)} |"
        )
    return lines


def results(measured: list[Run]) -> str:
    out = [
        "# Results",
        "",
        "Written by `make bench` from `results/`, of every machine that has measured; losing rows "
        "are printed like winning ones.",
        "",
        *(
            f"- **{run.name}**: {machine(run.dense['provenance'])}, commit "
            f"{run.dense['provenance']['commit']}."
            for run in measured
        ),
        "",
        "## LoRA tax",
        "",
        "Time of the layer over that of its frozen linear alone, x needing a "
        "gradient in both; medians, taking turns in one process, warm unless it says cold, dropout "
        "0. *Floor* is arithmetic alone, *target* 1 + 2·(floor − 1) + 0.01 for r ≤ 16. *addmm_* is "
        "the strongest form in plain PyTorch (an autograd Function around in-place `addmm_`), "
        "*eager* what one writes first, *compile* that under `torch.compile`, each shape for "
        "itself; all with adapters in x's dtype. Decoding is the forward without gradients. Ours "
        "is called as a layer calls it, from the second time on. Forward and backward are the "
        "parts of the steps; forwards that are also shown cold were timed by themselves, before. "
        "PEFT keeps its adapters in fp32; in fp32 rows that is the same thing. p20 and p80 of "
        "every time are in the JSON. ✗ stands where a result misses the tolerance.",
        "",
    ]
    for run in measured:
        data = run.dense
        out += shown(
            run.tax_png,
            f"{run.name}: LoRA tax of each layer, ours and others' beside the floor",
            machine(data["provenance"]),
        )
    for mode, title in MODES.items():
        for run in measured:
            data = run.dense
            if rows := [row for row in data["rows"] if row["mode"] == mode]:
                out += [f"### {title}: {run.name}", "", *table(rows, peers(data)), ""]
    out += [
        "## Calling overhead",
        "",
        "Microseconds of a call at M = 1, K = N = 64, r = 8, with gradients on; of ours also what "
        "it takes more than the eager expression.",
        "",
        "| | | frozen | ours | addmm_ | eager | ours more |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in measured:
        us = run.dense["overhead_us"]
        for mode, title in (("forward", "forward"), ("step", "forward and backward")):
            t = {name: us[f"{name}, {mode}"] for name in ("frozen", "ours", "addmm", "eager")}
            cells = " | ".join(f"{value:.1f}" for value in t.values())
            out.append(f"| {run.name} | {title} | {cells} | {t['ours'] - t['eager']:.1f} |")
    out += ["", *results_roofline(measured), *results_4bit(measured), *results_model(measured)]
    out += results_variants(measured)
    if JSON_MEMORY.exists():
        out += results_memory(json.loads(JSON_MEMORY.read_text()))
    if JSON_TRAFFIC.exists():
        out += results_traffic(json.loads(JSON_TRAFFIC.read_text()))
    return "\n".join(out)


def shown(png: Path, alt: str, caption: str) -> list[str]:
    """The lines that show a picture."""
    return [f"![{alt}]({png.relative_to(HERE)})", "", f"*{alt}: {caption}.*", ""]


def roofline_caption(data: Row, codes: Row | None) -> str:
    """Machine and date of the dense layers' run, and of the 4-bit layers' own."""
    if codes is None:
        return machine(data["provenance"])
    own = codes["provenance"]
    return (
        f"{machine(data['provenance'])}; 4-bit: {own['isa']}, torch {own['torch']}, {own['date']}"
    )


def results_roofline(measured: list[Run]) -> list[str]:
    out = [
        "## Roofline",
        "",
        "Operations are those of y, of dx and of the adapter's gradients; bytes those that must "
        "move, each operand once a direction, so that moving one twice shows as a point that is "
        "further down. The lines are what a copy and the library's product of two 2048×2048 "
        "reached in the same run. Above the line of float32: bitsandbytes in eval mode multiplies "
        "in bfloat16 and misses the tolerance of float32; ours is faster than the library's "
        "product.",
        "",
    ]
    for run in measured:
        out += shown(
            run.roofline_png,
            f"{run.name}: operations a second of layers over operations a byte",
            roofline_caption(run.dense, run.codes),
        )
    return out


def results_model(measured: list[Run]) -> list[str]:
    """How far the model of costs is from what was measured."""
    out = [
        "",
        "## The model of costs",
        "",
        "What `explain(model, rows=...)` predicts of a CPU (`lora_kernels/cpu_costs.py`), over "
        "what was measured here, with the copy and the products of the same runs. Narrow 4-bit "
        "layers take longer than predicted, one row of a wide one in float32 less.",
        "",
        "| | layers of ours | dtype | mode | rows | least | median | greatest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in measured:
        found: dict[tuple[str, str, str], list[float]] = {}
        for data in filter(None, (run.dense, run.codes)):
            for key, ratio in predicted(data):
                found.setdefault(key, []).append(ratio)
        for (kind, dtype, mode), ratios in found.items():
            out.append(
                f"| {run.name} | {kind} | {dtype} | {mode} | {len(ratios)} | {min(ratios):.2f} "
                f"| {statistics.median(ratios):.2f} | {max(ratios):.2f} |"
            )
    return [*out, ""]


def predicted(data: Row) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Kind of layer, dtype and mode, and the predicted time over the measured one."""
    limits = data["provenance"]
    peaks = {getattr(torch, name): peak for name, peak in limits["product_peak"].items()}
    here = Machine("", limits["copy_bandwidth"], peaks)
    for row in data["rows"]:
        if row["mode"] not in ("forward", "step") or "ours" not in row["seconds"]:
            continue
        four_bit, dtype = "quant_type" in row, getattr(torch, row["dtype"])
        sizes = Sizes(row["M"], row["N"], row["K"], row["R"], dtype, dtype.itemsize, four_bit)
        strategy = row.get("strategy", cpu.SINGLE_PASS)
        seconds = cpu_costs.predict(here, sizes, strategy)
        if row["mode"] == "step":
            seconds += cpu_costs.predict(here, sizes, strategy, backward=True)
        kind = "4-bit" if four_bit else "dense"
        yield (kind, row["dtype"], row["mode"]), seconds / row["seconds"]["ours"]["p50"]


def drawn(run: Run) -> dict[Path, tuple[str, Callable[[], bytes]]]:
    """Picture -> the digest of what it is drawn from, and what draws it."""
    data, codes = run.dense, run.codes
    of_tax, of_roof = run.digests()
    name, caption = machine(data["provenance"]), roofline_caption(data, codes)
    return {
        run.tax_png: (of_tax, lambda: pictures.lora_tax(data, name, of_tax)),
        run.roofline_png: (of_roof, lambda: pictures.roofline(data, codes, caption, of_roof)),
    }


def results_memory(data: Row) -> list[str]:
    facts = data["provenance"]
    names = (("torch", "torch"), ("peft", "PEFT"), ("transformers", "transformers"))
    versions = ", ".join(f"{name} {facts[key]}" for key, name in names)
    out = [
        "",
        "## Memory held for the backward",
        "",
        "Bytes that are kept between forward and backward, each storage once, without parameters; "
        "counted by saved-tensor hooks, on a CPU, where PyTorch's dropout keeps a mask as wide as "
        "x. Ours is PEFT's layer after `fuse`, in training mode, adapters in float32. *Minimum*: "
        "x, D(x)·Aᵀ in float32, 16 bytes of dropout state, and z where DoRA's magnitude trains; "
        "what is over it are vectors of N or r elements of which c and g are made. *gate* is "
        "AdaLoRA. *SmolLM2's step*: the 135M model's sizes, random weights, two sequences of 64 "
        "tokens, LoRA with dropout 0.1 on all linears, all that the model keeps; its minimum is "
        "what the frozen model holds, and of each layer the input, P and the dropout state.",
        "",
        f"{versions}.",
        "",
        "| | dtype | M×K×N | r | minimum | ours | over | PEFT | PEFT over ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        held, least = row["bytes"], row.get("minimum")
        above = ["–", "–"] if least is None else [f"{least:,}", f"{held['ours'] - least:,}"]
        out.append(
            f"| {row['what']} | {row['dtype']} | {row['M']}×{row['K']}×{row['N']} | {row['R']} "
            f"| {above[0]} | {held['ours']:,} | {above[1]} | {held['peft']:,} "
            f"| {held['peft'] / held['ours']:.2f} |"
        )
    return [*out, ""]


TRAFFIC_ROWS, TRAFFIC_RANK = (1, 512, 8192), 16  # those of the table


def results_traffic(data: Row) -> list[str]:
    """Return the section on counted memory traffic: a line has both directions of a layer."""
    facts, rows = data["provenance"], data["rows"]
    lost = sum(bool(row["losses"]) for row in rows)
    versions = ", ".join(f"{n} {facts[n]}" for n in ("torch", "peft", "bitsandbytes") if facts[n])
    out = [
        "",
        "## Memory traffic on a GPU, counted",
        "",
        "These are counts, not timings; nothing was measured on a GPU. The layer runs on meta "
        "tensors. Each op counts as the kernels that it launches on a GPU, and each kernel reads "
        "and writes each operand once. Ours is PEFT's layer after `fuse`, in training mode; "
        "alpha = 2·r. *Bytes* and *peak* are ratios of ours to PEFT's; the pairs are ours / "
        "PEFT's. Peak memory includes y and the tensors saved for the backward. bitsandbytes "
        "chooses its kernels as on an H100. **✗** marks a loss: more bytes, more kernels, or a "
        "peak that is more than 2 MiB above PEFT's, the least that CUDA's allocator reserves. "
        "With float32 adapters, no autocast and more than 64 rows, up to 8 more kernels are no "
        "loss if ours moves at most 70 % of PEFT's bytes or 48 MiB less.",
        "",
        f"{versions}. Ours loses {lost} of {len(rows)} rows. The JSON has them all, also those of "
        "r = 8 and 64 and of M = 16.",
        "",
        "| r = 16 | dropout | M×K×N | forward: bytes | MB | kernels | peak | backward: bytes | MB "
        "| kernels | peak |",
        "|---" * 11 + "|",
    ]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["R"] == TRAFFIC_RANK and row["M"] in TRAFFIC_ROWS:
            shape = f"{row['M']}×{row['K']}×{row['N']}"
            lines.setdefault((row["cell"], f"{row['dropout_p']:g}", shape), []).append(row)
    for key, directions in lines.items():
        cells = [cell for row in directions for cell in traffic_cells(row)]
        out.append(f"| {' | '.join((*key, *cells))} |")
    return [*out, ""]


def traffic_cells(row: Row) -> list[str]:
    """Ratio of bytes, MB, kernels and ratio of the peak."""
    count, kernels, peak = row["bytes"], row["kernels"], row["peak"]
    marks = {name: " ✗" * (name in row["losses"]) for name in ("bytes", "kernels", "peak")}
    return [
        f"{count['ours'] / count['peft']:.2f}{marks['bytes']}",
        f"{megabytes(count['ours'])} / {megabytes(count['peft'])}",
        f"{kernels['ours']} / {kernels['peft']}{marks['kernels']}",
        f"{peak['ours'] / peak['peft']:.2f}{marks['peak']}",
    ]


def megabytes(count: int) -> str:
    """Three digits, or all in front of the point."""
    return f"{count / 1e6:.{max(0, 2 - len(str(count // 1_000_000)) + 1)}f}"


def results_variants(measured: list[Run]) -> list[str]:
    present = [(run.name, data) for run in measured if (data := run.variants)]
    if not present:
        return []
    out = [
        "",
        "## Variants, several adapters, groups",
        "",
        "Milliseconds, and over ours; r = 16; a *step* is forward and backward, the other rows are "
        "without gradients. *16 adapters*: 16 sequences, the rows of all of them together M, with "
        "16, 4 and 1 adapters in turn; *three levels*: ranks 8, 16 and 32; *switching*: "
        "`set_adapter` of one layer with 16 adapters. Adapters are "
        "float32, as PEFT has them. Errors are rms, relative to float64.",
        "",
    ]
    for name, data in present:
        out += [f"### Variants: {name}", "", f"{machine(data['provenance'])}.", ""]
        out += [*variants_table(data["rows"]), ""]
    return out


def variants_table(rows: list[Row]) -> list[str]:
    out = [
        "| | dtype | M×K×N | ms, and over ours | target | errors |",
        "|---|---|---|---|---|---|",
    ]
    # What, its numerator, its denominator, and how many times the latter it may take.
    targets = {
        "DoRA step": ("ours", "LoRA", 1.15),
        "16 adapters": ("ours", "ours, 1", 1.3),
    }
    for row in rows:
        seconds = {name: times["p50"] for name, times in row["seconds"].items()}
        timed = [f"{name} ✗" for name in row.get("misses", ())]
        for name, t in seconds.items():
            over = f" ({t / seconds['ours']:.2f})" if name != "ours" and "ours" in seconds else ""
            timed.append(f"{name} {t * 1e3:.3g}{over}")
        times = "; ".join(timed)
        target = ""
        if row["what"] in targets and set(targets[row["what"]][:2]) <= seconds.keys():
            what, over, most = targets[row["what"]]
            ratio = seconds[what] / seconds[over]
            verdict = "✓" if ratio <= most else "over target"
            target = f"over {over} {ratio:.2f}, at most {most} {verdict}"
        if row["what"] == "switching":
            verdict = "✓" if seconds["ours"] <= 1e-4 else "over target"
            target = f"at most 0.1 ms {verdict}"
        errors = "; ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        shape = f"{row['M']}×{row['K']}×{row['N']}"
        out.append(f"| {row['what']} | {row['dtype']} | {shape} | {times} | {target} | {errors} |")
    return out


def results_4bit(measured: list[Run]) -> list[str]:
    present = [(run.name, data) for run in measured if (data := run.codes)]
    if not present:
        return []
    out = [
        "## 4-bit bases",
        "",
        "NF4 with nested scales and an adapter of rank 16 in x's dtype, forward without gradients; "
        "*step* is forward and backward. Ours in milliseconds, the others as multiples of ours: "
        "under 1 is faster than ours. Ours is `QLoRALinear`, bitsandbytes' layer is under PEFT's; "
        "to *dense*, the weight before quantization, LoRA is added by PyTorch's calls; *stream* "
        "reads the packed bytes and no more. *Peak*: our multiply-adds a second over those of the "
        "library's largest product in x's dtype. Cold goes through more weights than the "
        "last-level cache holds, warm repeats one. Errors are rms, relative to float64 on the "
        "float32 decode.",
        "",
    ]
    for name, data in present:
        facts = data["provenance"]
        out += [f"### 4-bit bases: {name}", ""]
        out += [f"{machine(facts)}; bitsandbytes {facts['bitsandbytes']}.", ""]
        out += [*table_4bit(data), "", *targets_4bit(data["rows"]), ""]
    return out


def table_4bit(data: Row) -> list[str]:
    others = ("bitsandbytes, eval", "bitsandbytes, train", "dense", "stream")
    out = [
        "| K×N | dtype | M | cache | ours, ms | bnb eval | bnb train | dense | stream | peak "
        "| error of ours | of bnb eval |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        m = row["M"] if row["mode"] == "forward" else f"{row['M']}, step"
        if "ours" not in row["seconds"]:
            out.append(
                f"| {row['K']}×{row['N']} | {row['dtype']} | {m} | {row['cache']} "
                f"| ✗ {row['misses']['ours']} |" + " – |" * 7
            )
            continue
        seconds = {name: times["p50"] for name, times in row["seconds"].items()}
        ours = seconds["ours"]
        ratios = (f"{seconds[n] / ours:.2f}" if n in seconds else "–" for n in others)
        errors = (row["errors"].get(n) for n in ("ours", "bitsandbytes, eval"))
        out.append(
            f"| {row['K']}×{row['N']} | {row['dtype']} | {m} | {row['cache']} | {ours * 1e3:.3f} "
            f"| {' | '.join(ratios)} | {peak_share(row, data['provenance']):.0%} "
            f"| {' | '.join('–' if e is None else f'{e:.1e}' for e in errors)} |"
        )
    return out


def peak_share(row: Row, provenance: Row) -> float:
    """Our multiply-adds a second, over those of the library's dense product in the same run."""
    M, K, N, R = (row[name] for name in "MKNR")
    forward = 2 * M * (N * K + R * (K + N))
    # dx is a product of the same size; P, dS and the two updates of y and dx, and dA and dB.
    step = 4 * M * N * K + 6 * M * R * (K + N)
    seconds: float = row["seconds"]["ours"]["p50"]
    peak: float = provenance["product_peak"][row["dtype"]]
    return (forward if row["mode"] == "forward" else step) / seconds / peak


def targets_4bit(rows: list[Row]) -> list[str]:
    """What the layer was to reach, and the row in which it is furthest from that; cold."""
    cold = [row for row in rows if row["cache"] == "cold" and "ours" in row["seconds"]]
    forward = [row for row in cold if row["mode"] == "forward"]

    def over(row: Row, peer: str) -> float:
        ratio: float = row["seconds"][peer]["p50"] / row["seconds"]["ours"]["p50"]
        return ratio

    def shaped(N: int, M: int) -> list[Row]:
        return [r for r in forward if (r["N"], r["M"]) == (N, M) and r["dtype"] == "bfloat16"]

    def of(dtype: str) -> list[Row]:
        return [row for row in forward if row["dtype"] == dtype]

    # What, rows, peer, and how many times our time it takes at least.
    targets = [
        ("one row of 4096×4096: stream", shaped(4096, 1), "stream", 1 / 1.45),
        ("one row of 4096×14336: stream", shaped(14336, 1), "stream", 1 / 2.0),
        ("bitsandbytes, eval, bfloat16", of("bfloat16"), "bitsandbytes, eval", 1.0),
        ("bitsandbytes, eval, float32", of("float32"), "bitsandbytes, eval", 1.0),
        (
            "one row: bitsandbytes, train",
            [row for row in forward if row["M"] == 1 and row["K"] == 4096],
            "bitsandbytes, train",
            10.0,
        ),
        (
            "up to 16 rows: dense, bfloat16",
            [row for row in of("bfloat16") if row["M"] <= 16],
            "dense",
            1.0,
        ),
        ("128 rows: dense", [row for row in forward if row["M"] == 128], "dense", 1 / 1.15),
        ("512 rows: dense", [row for row in forward if row["M"] == 512], "dense", 1 / 1.10),
        (
            "training step: bitsandbytes",
            [row for row in cold if row["mode"] == "step"],
            "bitsandbytes, train",
            1.3,
        ),
    ]
    out = [
        "Targets: how many times our time the peer is to take, and does in the row where it takes "
        "least. NOTES.md says what stands in the way of those that are missed.",
        "",
        "| | at least | rows that reach it | least | there |",
        "|---|---|---|---|---|",
    ]
    for what, chosen, peer, least in targets:
        worst = min(chosen, key=lambda row: over(row, peer), default=None)
        if worst is None:
            continue
        reached = sum(over(row, peer) >= least for row in chosen)
        mark = " ✓" if reached == len(chosen) else ""
        out.append(
            f"| {what} | {least:.2f} | {reached} of {len(chosen)}{mark} | {over(worst, peer):.2f} "
            f"| {worst['K']}×{worst['N']}, M = {worst['M']}, {worst['dtype']} |"
        )
    return out


def readme_figures(measured: list[Run]) -> str:
    """The rows that matter most: a training step at r = 16, and one row as a layer decodes it."""
    names = {"ours": "ours", "addmm": "addmm_", "peft": "PEFT"}
    lines = [
        "LoRA tax of a training step, and of one row decoded from memory, at r = 16; 1.00 is the",
        "frozen linear alone. PEFT's adapters are in fp32, as it keeps them, others in x's dtype.",
        "",
    ]
    lines += [f"- {run.name}: {machine(run.dense['provenance'])}" for run in measured]
    head = [
        f"{run.name}: {name}" if name == "ours" else name
        for run in measured
        for name in names.values()
    ]
    lines += ["", f"| M×K×N | dtype | floor | {' | '.join(head)} |"]
    lines.append("|---" * (len(head) + 3) + "|")
    found: dict[tuple[str, str, str], dict[Path, Row]] = {}
    for run in measured:
        for row in run.dense["rows"]:
            if row["R"] != 16:
                continue
            shape = f"{row['M']}×{row['K']}×{row['N']}"
            decoded = row["mode"] == "decoding" and row["M"] == 1 and row["cache"] == "cold"
            if decoded:
                shape += ", decoded"
            if decoded or (row["mode"] == "step" and row["M"] > 1):
                found.setdefault((shape, row["dtype"], f"{row['floor']:.3f}"), {})[run.folder] = row
    for key, by_run in found.items():
        cells = [
            cell(by_run[run.folder], name) if run.folder in by_run else "–"
            for run in measured
            for name in names
        ]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    if JSON_TRAFFIC.exists():
        lines += ["", *readme_traffic(json.loads(JSON_TRAFFIC.read_text())["rows"])]
    return "\n".join(lines)


def readme_traffic(rows: list[Row]) -> list[str]:
    """Return the table of a training step's bytes on a GPU: both directions of a layer together."""
    M, K, N, R = 8192, 4096, 4096, 16
    cells = (
        "bf16, bf16 adapters", "bf16, fp32 adapters", "bf16, fp32 adapters, autocast",
        "NF4 bf16, fp32 adapters", "DoRA bf16, fp32 adapter",
    )  # fmt: skip
    lines = [
        "Memory moved by a layer's training step on a GPU, counted, not timed; "
        f"{M}×{K}×{N}, r = {R}, no dropout.",
        "",
        "| layer, adapters | ours, MB | PEFT, MB | ratio |",
        "|---|---|---|---|",
    ]
    totals: dict[str, list[int]] = {}
    for row in rows:
        at = (row["M"], row["K"], row["N"], row["R"], row["dropout_p"])
        if at == (M, K, N, R, 0.0) and row["cell"] in cells:
            total = totals.setdefault(row["cell"], [0, 0])
            total[0] += row["bytes"]["ours"]
            total[1] += row["bytes"]["peft"]
    for cell_name, (ours, peft) in totals.items():
        lines.append(f"| {cell_name} | {ours / 1e6:.0f} | {peft / 1e6:.0f} | {ours / peft:.2f} |")
    return lines


def main(check: bool) -> int:
    measured = runs()
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    readme = README.read_text()
    if not pattern.search(readme):
        raise SystemExit(f"README.md: no place for figures; want the lines {begin} and {end}")
    figures = f"{begin}\n{readme_figures(measured)}\n{end}"
    wanted = {
        RESULTS: results(measured),
        README: pattern.sub(lambda _: figures, readme),
    }
    if JSON_CLASSIFICATION.exists():
        table = markdown(json.loads(JSON_CLASSIFICATION.read_text()))
        wanted[JSON_CLASSIFICATION.with_suffix(".md")] = table
    stale = [p.name for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    pngs = {png: how for run in measured for png, how in drawn(run).items()}
    stale += [
        str(png.relative_to(HERE))
        for png, (digest, _) in pngs.items()
        if not png.exists() or pictures.source(png.read_bytes()) != digest
    ]
    if check:
        print(f"stale: {', '.join(stale)}; run python -m benchmarks.report" if stale else "in step")
        return 1 if stale else 0
    if find_spec("matplotlib") is None:
        print("benchmarks.report: needs matplotlib: pip install 'lora-kernels[bench]'")
        return 2
    for path, text in wanted.items():
        path.write_text(text)
    for png, (_, draw) in pngs.items():
        png.write_bytes(draw())
    return 0


if __name__ == "__main__":
    if "--folder" in sys.argv[1:]:
        print(native.isa or "python")
        sys.exit()
    sys.exit(main(check="--check" in sys.argv[1:]))
