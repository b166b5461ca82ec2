"""`lora-kernels bench`: its options, and the run of one of its suites.

`dense`, `quantized`, `variants`, `memory` and `traffic` are the suites; `compare` tells what two
runs of one differ in.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from . import compare, models, outputs
from .dense import Layers
from .memory import Memory
from .quantized import Codes
from .results import Result, Row, Suite
from .traffic import Count
from .variants import Variants

QUICK_ROWS, QUICK_RANKS, QUICK_SECONDS = (1, 512), (16,), 0.25
RANKS = (8, 16, 64)
DTYPES = ["float32", "bfloat16"]
SECONDS = 2.5
SUITES: tuple[Suite, ...] = (Codes(), Variants(), Memory(), Count(), Layers())  # the last: else


def _words(values: Sequence[object], between: str = " ") -> str:
    return between.join(map(str, values))


HELP = {
    "device": "(default: %(default)s)",
    "shapes": "rows of x, in-features, out-features, such as 512x2048x5632 (default: five, with "
    "--quant others; on a GPU llama3-8b's)",
    "model": "the shapes of its linear layers",
    "rows": f"of x, in a model's layers (default: {_words(models.ROWS['cpu'])}; on a GPU "
    f"{_words(models.ROWS['cuda'])})",
    "ranks": f"(default: {_words(RANKS)}; with --quant and --variants 16)",
    "quick": f"{QUICK_SECONDS} seconds for a row, rank {QUICK_RANKS[0]}, and in a model's layers "
    f"{_words(QUICK_ROWS, ' and ')} rows, unless others are named",
    "dtypes": f"of weight and x (default: {_words(DTYPES)})",
    "dropout": "on the adapter's input (default: %(default)s)",
    "seconds": f"to spend on what is timed in turns (default: {SECONDS})",
    "quant": "time the layer over a 4-bit base instead",
    "variants": "time DoRA and its row norm, groups, several adapters and hierarchical levels "
    "instead, on a CPU",
    "memory": "count the bytes that layers, and a small Llama, hold for the backward instead",
    "count": "count the memory traffic, kernels and peak memory of a layer on a GPU instead, ours "
    "beside PEFT's, without a GPU; exit status 1 where ours loses",
    "json": "write every figure there",
    "csv": "write the times and bytes there, a call a line",
    "compare": "print what got slower or faster than in OLD.json, which --json wrote: in this run, "
    "or with NEW.json in that, running nothing. Each time counts as its ratio to a yardstick "
    "of its own row (the frozen layer; a read of the codes; the dense layer; PEFT's). The "
    "noise is 4 standard errors of the two medians over rounds, from the samples around them, "
    "and at least 5 %%; what may be slower is measured again. Exit status 1 where something "
    "got slower.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a LoRA layer's kernels against what others use: PEFT, plain PyTorch, bitsandbytes. A "
        "row gives the layer's time over that of its frozen linear alone; results that miss the "
        "tolerance are marked, and lost rows are printed like won ones."
    )
    instead = parser.add_mutually_exclusive_group()

    def add(name: str, **options: Any) -> None:
        group = instead if name in ("quant", "variants", "memory", "count") else parser
        group.add_argument(f"--{name}", help=HELP[name], **options)

    positive, files = models.positive, ("OLD.json", "NEW.json")
    add("device", choices=["cpu", "cuda"], default="cpu")
    add("shapes", nargs="+", type=models.sizes("MxKxN"), metavar="MxKxN")
    add("model", choices=models.NAMES)
    add("rows", nargs="+", type=positive, metavar="M")
    add("ranks", nargs="+", type=positive, metavar="R")
    add("quick", action="store_true")
    add("dtypes", nargs="+", choices=[*DTYPES, "float16"], default=DTYPES)
    add("dropout", type=models.probability, metavar="P", default=0.0)
    add("seconds", type=models.seconds, metavar="S")
    add("quant", choices=["nf4", "fp4"])
    add("variants", action="store_true")
    add("memory", action="store_true")
    add("count", action="store_true")
    add("json", type=Path, metavar="FILE")
    add("csv", type=Path, metavar="FILE")
    add("compare", nargs="+", type=Path, metavar=files)


def unused(args: argparse.Namespace, suite: Suite) -> str | None:
    """What is to be left out, since the run would take no account of it; None: nothing."""
    defaults = {"device": "cpu", "dtypes": DTYPES, "dropout": 0.0, "quick": False}

    def is_given(name: str) -> bool:
        return bool(getattr(args, name) != defaults.get(name))

    if name := next(filter(is_given, suite.unused.split()), None):
        value = f" {args.device}" if name == "device" else ""
        return f"--{suite.option}: want no --{name}{value} beside it, of which it has no use"
    if is_given("shapes") and is_given("model"):
        return "--shapes: want no --model beside it, which names other shapes"
    of_model = is_given("model") or (args.device == "cuda" and not (args.shapes or args.quant))
    if is_given("rows") and not of_model:
        return "--rows: want --model beside it, whose layers take them"
    return None


def run(args: argparse.Namespace) -> int:
    """0; 1 where a result of ours misses the tolerance, got slower, or loses with --count; 2 where
    it cannot start."""
    suite = next(suite for suite in SUITES if not suite.option or getattr(args, suite.option))
    why = unused(args, suite)
    for name in ("json", "csv"):
        if why is None and (file := getattr(args, name)) is not None:
            reason = outputs.unwritable_reason(file)
            why = reason and f"--{name}: {reason}"
    if why is None and args.device == "cuda" and not torch.cuda.is_available():
        why = "no GPU that this torch can use, want one for --device cuda"
    if why is not None:
        print(f"lora-kernels bench: {why}")
        return 2
    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    args.ranks = args.ranks or (QUICK_RANKS if args.quick else RANKS)
    args.rows = args.rows or (QUICK_ROWS if args.quick else None)
    if not args.compare:
        return int(suite.has_failed(measure(suite, args).rows))
    try:
        return _compare(suite, args)
    except compare.NotComparable as error:
        print(f"lora-kernels bench: {error}")
        return 2


def _compare(suite: Suite, args: argparse.Namespace) -> int:
    """Compare a file with another, or with a run."""
    if len(args.compare) > 2:
        raise compare.NotComparable(f"--compare: got {len(args.compare)} files, want 1 or 2")
    old, *runs = map(compare.read, args.compare)  # before minutes are spent
    failed = False
    if not runs:
        kind = old.rows[0].kind
        if kind != suite.kind:
            option = next(s.option for s in SUITES if s.kind == kind)
            want = f"--{option}" if option else "neither --quant nor --variants"
            raise compare.NotComparable(
                f"{args.compare[0]}: is of {kind}, the run would be of {suite.kind}: want {want}"
            )
        runs = [measure(suite, args)]
        failed = suite.has_failed(runs[0].rows)
        args.json = args.csv = None  # which hold the first, as without --compare
        while only := compare.suspects(old, *runs):
            print(f"{len(only)} rows may be slower or are too noisy, and are measured again")
            runs.append(measure(suite, args, only))
    lines, slower = compare.report(old, *runs)
    print(*lines, sep="\n")
    return int(failed or slower)


def measure(suite: Suite, args: argparse.Namespace, only: Collection[str] = ()) -> Result:
    """Run a suite, print its rows and write them after each. only: as `Suite.rows` takes it."""
    result = Result({} if only else suite.provenance(args))
    for text in () if only else suite.head(args, result):
        print(text)
    for row in suite.rows(args, result.provenance, only):
        if isinstance(row, Row) and row.seconds:
            row.note_load()
        result.rows.append(row)
        print(suite.line(row), flush=True)
        result.write(args.json, args.csv)
    result.write(args.json, args.csv)
    for text in () if only else suite.summary(result.rows):
        print(text)
    return result
