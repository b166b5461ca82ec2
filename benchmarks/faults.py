"""FAULTS.md: the mistakes planted in tests/faults, which tests notice each, and what they cover."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.faults.__main__ import BACKENDS, PARTS, Fault, read

PATCHES = Path(__file__).parents[1] / "tests/faults"
# The first word of a patch's name -> heading, in this order; other words are an error.
GROUPS = {
    "Kernels for CPUs": ("native", "product", "streamed", "amx", "cpu"),
    "4-bit codes on CPUs": ("codes",),
    "Triton kernels": ("triton", "tune"),
    "CUDA kernels": ("cuda",),
    "Plain PyTorch, and the reference": ("eager", "reference"),
    "Rows with adapters of their own": ("multi", "stacked"),
    "Autograd, arguments, choice of a backend": ("autograd", "functional", "select", "costs"),
    "A layer's next call": ("decoding", "ready", "steps"),
    "Layers": ("layers", "variants", "group", "merge"),
    "PEFT": ("peft", "predict"),
    "The instrument": (
        "tolerance", "timing", "bench", "verify", "compare", "memory", "flat", "report",
    ),
    "Recipes": ("finetune",),
}  # fmt: skip


def document() -> str:
    """The text of FAULTS.md."""
    faults = [read(patch) for patch in sorted(PATCHES.glob("*.patch"))]
    lines = [
        "# Planted faults",
        "",
        f"Written by `python -m benchmarks.report` from `tests/faults/*.patch`. `make faults` "
        f"plants each of these {len(faults)} mistakes in a copy of the tree, one at a time, runs "
        "the tests named beside it, and fails where they pass.",
        "",
        "## What they cover",
        "",
        "A fault for each gradient and option in each backend, by name.",
        "",
        f"| | {' | '.join(BACKENDS)} |",
        "|---" * (len(BACKENDS) + 1) + "|",
    ]
    for part in PARTS:
        cells = []
        for backend in BACKENDS:
            cell = f"{backend} {part}"
            cells.append(", ".join(fault.name for fault in faults if cell in fault.covers))
        lines.append(f"| {part} | {' | '.join(cells)} |")
    for heading, firsts in GROUPS.items():
        own = [fault for fault in faults if fault.name.split("-")[0] in firsts]
        lines += ["", f"## {heading}", "", "| fault | what is broken | tests that notice |"]
        lines += ["|---|---|---|", *map(_line, own)]
    known = {first for firsts in GROUPS.values() for first in firsts}
    if lost := [fault.name for fault in faults if fault.name.split("-")[0] not in known]:
        raise SystemExit(f"benchmarks/faults.py: no group for {', '.join(lost)}")
    return "\n".join([*lines, ""])


def _line(fault: Fault) -> str:
    words = [word for word in shlex.split(fault.tests) if not re.match(r"[A-Z_]+=", word)]
    tests = " ".join(f"`{word}`" for word in words if word not in ("-k", "-m"))
    needs = f" (needs {fault.needs})" if fault.needs else ""
    cells = (fault.name, fault.text + needs, tests)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
