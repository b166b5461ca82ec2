"""Write RESULTS.md, its pictures and other tables from results/*.json, README's figures, FAULTS.md.

    lora-kernels bench --json benchmarks/results/cpu.json
    lora-kernels bench --quant nf4 --json benchmarks/results/cpu-4bit.json
    lora-kernels bench --variants --json benchmarks/results/cpu-variants.json
    lora-kernels bench --memory --json benchmarks/results/memory.json
    lora-kernels compare --demo --out benchmarks/results
    python -m benchmarks.report [--check]

--check writes nothing and fails where the files say something else than the JSON, or a picture was
drawn from another. To draw needs matplotlib, which the package's extra `bench` installs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lora_kernels import cpu_costs
from lora_kernels.backends import cpu
from lora_kernels.cpu_costs import Machine, Sizes
from lora_kernels.finetune.compare_command import markdown

from . import faults, pictures

HERE = Path(__file__).parent
JSON_4BIT = HERE / "results/cpu-4bit.json"
JSON_VARIANTS = HERE / "results/cpu-variants.json"
JSON_MEMORY = HERE / "results/memory.json"
FAULTS = HERE / "FAULTS.md"
JSON_CLASSIFICATION = HERE / "results/classification.json"
JSON, RESULTS, README = HERE / "results/cpu.json", HERE / "RESULTS.md", HERE.parent / "README.md"
TAX_PNG, ROOFLINE_PNG = HERE / "results/lora-tax.png", HERE / "results/roofline.png"
MARKS = "<!-- figures: written by benchmarks/report.py -->", "<!-- end of figures -->"
# Name in the JSON -> column; those that no row has are left out.
PEERS = {
    "addmm": "addmm_",
    "torch.compile": "compile",
    "eager": "eager",
    "ours, fp32 adapters": "ours, fp32 A B",
    "peft": "PEFT, fp32 A B",
}
MODES = {"step": "Forward and backward", "forward": "Forward", "backward": "Backward"}

Row = dict[str, Any]


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
    """A candidate's tax, ✗ where it misses the tolerance, – where it is not in the row."""
    if name in row["misses"]:
        return "✗"
    return f"{row['tax'][name]:.3f}" if name in row["tax"] else "–"


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


def results(data: Row) -> str:
    us = data["overhead_us"]
    extra = us["ours, forward"] - us["eager, forward"]
    out = [
        "# Results",
        "",
        "Written by `make bench` from `results/*.json`; losing rows are printed like winning ones.",
        "",
        f"**Machine.** {machine(data['provenance'])}.",
        "",
        "**LoRA tax**: time of the layer over that of its frozen linear alone, x needing a "
        "gradient in both; medians, taking turns in one process, warm unless it says cold, dropout "
        "0. *Floor* is arithmetic alone, *target* 1 + 2·(floor − 1) + 0.01 for r ≤ 16. *addmm_* is "
        "the strongest form in plain PyTorch (an autograd Function around in-place `addmm_`), "
        "*eager* what one writes first, *compile* that under `torch.compile`, each shape for "
        "itself; all with adapters in x's dtype. A backward is the second part of the steps. PEFT "
        "keeps its adapters in fp32; in fp32 rows that is the same thing. p20 and p80 of every "
        "time are in the JSON. ✗ stands where a result misses the tolerance.",
        "",
    ]
    out += shown(
        TAX_PNG,
        "LoRA tax of each layer, ours and others' beside the floor",
        machine(data["provenance"]),
    )
    for mode, title in MODES.items():
        if rows := [row for row in data["rows"] if row["mode"] == mode]:
            out += [f"## {title}", "", *table(rows, peers(data)), ""]
    out += [
        "## Calling overhead",
        "",
        "Microseconds of a call at M = 1, K = N = 64, r = 8, with gradients on. In the forward "
        f"ours takes {extra:.1f} µs more than the eager expression.",
        "",
        "| | forward | forward and backward |",
        "|---|---|---|",
        *(
            f"| {n} | {us[f'{n}, forward']:.1f} | {us[f'{n}, step']:.1f} |"
            for n in ("frozen", "ours", "addmm", "eager")
        ),
        "",
    ]
    codes = json.loads(JSON_4BIT.read_text()) if JSON_4BIT.exists() else None
    out += results_roofline(data, codes)
    if codes:
        out += results_4bit(codes)
    out += results_model([data, *([codes] if codes else [])])
    if JSON_VARIANTS.exists():
        out += results_variants(json.loads(JSON_VARIANTS.read_text()))
    if JSON_MEMORY.exists():
        out += results_memory(json.loads(JSON_MEMORY.read_text()))
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


def results_roofline(data: Row, codes: Row | None) -> list[str]:
    return [
        "## Roofline",
        "",
        "Operations are those of y, of dx and of the adapter's gradients; bytes those that must "
        "move, each operand once a direction, so that moving one twice shows as a point that is "
        "further down. The lines are what a copy and the library's product of two 2048×2048 "
        "reached in the same run. Above the line of float32: bitsandbytes in eval mode multiplies "
        "in bfloat16 and misses the tolerance of float32; ours is faster than the library's "
        "product.",
        "",
        *shown(
            ROOFLINE_PNG,
            "Operations a second of layers over operations a byte",
            roofline_caption(data, codes),
        ),
    ]


def results_model(files: list[Row]) -> list[str]:
    """How far the model of costs is from what was measured."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for data in files:
        limits = data["provenance"]
        peaks = {getattr(torch, name): peak for name, peak in limits["product_peak"].items()}
        here = Machine("", limits["copy_bandwidth"], peaks)
        for row in data["rows"]:
            if row["mode"] not in ("forward", "step") or "ours" not in row["seconds"]:
                continue
            four_bit, dtype = "quant_type" in row, getattr(torch, row["dtype"])
            sizes = Sizes(
                row["M"], row["N"], row["K"], row["R"], dtype, dtype.itemsize, four_bit
            )  # fmt: skip
            strategy = row.get("strategy", cpu.SINGLE_PASS)
            seconds = cpu_costs.predict(here, sizes, strategy)
            if row["mode"] == "step":
                seconds += cpu_costs.predict(here, sizes, strategy, backward=True)
            ratio = seconds / row["seconds"]["ours"]["p50"]
            key = "4-bit" if four_bit else "dense", row["dtype"], row["mode"]
            found.setdefault(key, []).append(ratio)
    out = [
        "",
        "## The model of costs",
        "",
        "What `explain(model, rows=...)` predicts of a CPU (`lora_kernels/cpu_costs.py`), over "
        "what was measured here, with the copy and the products of the same runs. Narrow 4-bit "
        "layers take longer than predicted, one row of a wide one in float32 less.",
        "",
        "| layers of ours | dtype | mode | rows | least | median | greatest |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, dtype, mode), ratios in found.items():
        out.append(
            f"| {kind} | {dtype} | {mode} | {len(ratios)} | {min(ratios):.2f} "
            f"| {statistics.median(ratios):.2f} | {max(ratios):.2f} |"
        )
    return [*out, ""]


def drawn(data: Row) -> dict[Path, tuple[str, Callable[[], bytes]]]:
    """Picture -> the digest of what it is drawn from, and what draws it."""
    codes = json.loads(JSON_4BIT.read_text()) if JSON_4BIT.exists() else None
    of_tax = pictures.digest(JSON)
    of_roof = pictures.digest(JSON, *([JSON_4BIT] if codes else []))
    caption = roofline_caption(data, codes)
    return {
        TAX_PNG: (of_tax, lambda: pictures.lora_tax(data, machine(data["provenance"]), of_tax)),
        ROOFLINE_PNG: (of_roof, lambda: pictures.roofline(data, codes, caption, of_roof)),
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


def results_variants(data: Row) -> list[str]:
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
        f"{machine(data['provenance'])}.",
        "",
        "| | dtype | M×K×N | ms, and over ours | target | errors |",
        "|---|---|---|---|---|---|",
    ]
    # What, its numerator, its denominator, and how many times the latter it may take.
    targets = {
        "DoRA step": ("ours", "LoRA", 1.15),
        "16 adapters": ("ours", "ours, 1", 1.3),
    }
    for row in data["rows"]:
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
    return [*out, ""]


def results_4bit(data: Row) -> list[str]:
    others = ("bitsandbytes, eval", "bitsandbytes, train", "dense", "stream")
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
        f"{machine(data['provenance'])}; bitsandbytes {data['provenance']['bitsandbytes']}.",
        "",
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
    return [*out, "", *targets_4bit(data["rows"]), ""]


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


def readme_figures(data: Row) -> str:
    """The rows that matter most: a training step at r = 16."""
    names = peers(data)
    head = ["M×K×N", "dtype", "floor", "ours", *(PEERS[name] for name in names)]
    lines = [
        f"LoRA tax of a training step at r = 16 ({machine(data['provenance'])}); "
        "1.00 is the frozen linear alone:",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in data["rows"]:
        if row["mode"] == "step" and row["R"] == 16:
            cells = [cell(row, name) for name in ("ours", *names)]
            shape = f"{row['M']}×{row['K']}×{row['N']}"
            lines.append(f"| {shape} | {row['dtype']} | {row['floor']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(check: bool) -> int:
    data = json.loads(JSON.read_text())
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    readme = README.read_text()
    if not pattern.search(readme):
        raise SystemExit(f"README.md: no place for figures; want the lines {begin} and {end}")
    figures = f"{begin}\n{readme_figures(data)}\n{end}"
    wanted = {
        RESULTS: results(data),
        README: pattern.sub(lambda _: figures, readme),
        FAULTS: faults.document(),
    }
    if JSON_CLASSIFICATION.exists():
        table = markdown(json.loads(JSON_CLASSIFICATION.read_text()))
        wanted[JSON_CLASSIFICATION.with_suffix(".md")] = table
    stale = [p.name for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    pngs = drawn(data)
    stale += [
        png.name
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
    sys.exit(main(check="--check" in sys.argv[1:]))
