"""`lora-kernels bench`: its options, and the run of one of its suites.

A suite is a filter of one table, whose runners are in `table`; `dense`, `quantized`, `variants`,
`experts` and `head` have the entries that are timed, `traffic` those that are counted. `host` times
the host alone, `merges` times merges, and `end_to_end` whole models.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..quantization import codebooks
from . import (
    dense,
    end_to_end,
    experts,
    functions,
    head,
    host,
    merges,
    models,
    quantized,
    traffic,
    variants,
)
from .functions import Function
from .results import Result, Row, is_ours, keep_faster, read
from .table import Suite

QUICK_ROWS, QUICK_RANKS, QUICK_SECONDS = (1, 512), (16,), 0.25
RANKS = (8, 16, 64)
DTYPES = ["float32", "bfloat16"]
SECONDS = 2.5
SUITES: tuple[Suite, ...] = (
    *(quantized.SUITE, variants.SUITE, experts.SUITE, head.SUITE, host.SUITE, merges.SUITE),
    *(end_to_end.SUITE, traffic.SUITE),
    dense.SUITE,  # the default
)


def _words(values: Sequence[object], separator: str = " ") -> str:
    return separator.join(map(str, values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time a LoRA layer's kernels against what others use: PEFT, plain PyTorch, bitsandbytes. A "
        "row gives each call's time over that of its frozen linear alone; results that miss the "
        "tolerance are marked, and lost rows are printed like won ones."
    )
    instead = parser.add_mutually_exclusive_group()

    def add(name: str, text: str, to: Any = parser, **options: Any) -> None:
        to.add_argument(f"--{name}", help=text, **options)

    cpu, gpu = map(_words, models.ROWS.values())
    text = "rows of x, in-features, out-features, such as 512x2048x5632 (default: five, with "
    text += "--quant others; on a GPU llama3-8b's)"
    add("device", "(default: a GPU if there is one)", choices=["cpu", "cuda"])
    add("shapes", text, nargs="+", type=models.sizes("MxKxN"), metavar="MxKxN")
    text = f"the shapes of its linear layers ({', '.join(models.NAMES)}); with --end-to-end a "
    text += f"whole model, {' or '.join(end_to_end.SIZES)} or a transformers folder"
    add("model", text, metavar="MODEL")
    text = f"of x, in a model's layers (default: {cpu}; on a GPU {gpu})"
    add("rows", text, nargs="+", type=models.positive, metavar="M")
    text = f"(default: {_words(RANKS)}; with --quant, --variants and --experts 16)"
    add("ranks", text, nargs="+", type=models.positive, metavar="R")
    text = f"{QUICK_SECONDS} seconds for a row, rank {QUICK_RANKS[0]}, and in a model's layers "
    text += f"{_words(QUICK_ROWS, ' and ')} rows, unless others are named"
    add("quick", text, action="store_true")
    text = f"of weight and x (default: {_words(DTYPES)})"
    add("dtypes", text, nargs="+", choices=[*DTYPES, "float16"], default=DTYPES)
    text = "on the adapter's input (default: %(default)s)"
    add("dropout", text, type=models.probability, metavar="P", default=0.0)
    text = f"to spend on what is timed in turns (default: {SECONDS})"
    add("seconds", text, type=models.seconds, metavar="S")
    text = f"time the layer over a quantized base instead: {_words(codebooks.QUANT_TYPES)}, or a "
    text += "form such as int4-128-half-shift"
    add("quant", text, instead, type=quantized.format_name, metavar="FORMAT")
    text = "time DoRA and its row norm, groups, several adapters and hierarchical levels instead, "
    add("variants", text + "on a CPU", instead, action="store_true")
    text = "time LoRA on the experts of mixtures instead, beside transformers' frozen experts and "
    add("experts", text + "PEFT's; on a CPU", instead, action="store_true")
    text = "time a step of a language model's head with LoRA and its loss instead, beside "
    add("head", text + "PyTorch's and TRL's; on a CPU", instead, action="store_true")
    text = "time the host's part of small layers, q/k/v, gated MLPs and a decoder layer on the GPU "
    text += (
        "path instead, beside PEFT's, which a CPU emulates; exit status 1 where ours takes more "
    )
    text += f"than {host.LIMIT} times as long, twice"
    add("host", text, instead, action="store_true")
    text = "time merges that give the base back, and merged weights as a stream, and count their "
    text += "memory instead, beside PEFT's; exit status 1 where one of ours changes its base"
    add("merge", text, instead, action="store_true")
    text = "time training steps and tokens of whole models instead, beside PEFT's and the frozen "
    text += "ones, and measure their memory; up to 40 minutes on two cores, with --quick three"
    add("end-to-end", text, instead, action="store_true")
    text = "count the memory traffic, kernels and peak memory of layers, and of q/k/v and gated "
    text += "MLPs, on a GPU instead, ours beside PEFT's and others', without a GPU; exit status 1 "
    text += "where ours loses"
    add("count", text, instead, action="store_true")
    text = "time this function (x, weight, lora_A, lora_B, scaling, bias) -> y beside ours, after "
    text += "its results and gradients are checked; the current folder is looked in first"
    add("baseline", text, type=_function, metavar="MODULE:NAME")
    text = "write every figure there, beside those of other suites that the file has"
    add("json", text, type=Path, metavar="FILE")
    add("csv", "write the times and bytes there, a call a line", type=Path, metavar="FILE")


def _function(path: str) -> Function:
    try:
        return functions.load(path)
    except ValueError as error:  # whose text argparse would not print
        raise argparse.ArgumentTypeError(str(error)) from error


def unused(args: argparse.Namespace, suite: Suite) -> str | None:
    """Return why an option that was given would have no effect, or None."""
    defaults = {"dtypes": DTYPES, "dropout": 0.0, "quick": False}
    given = {name for name, value in vars(args).items() if value != defaults.get(name)}
    if name := next((name for name in suite.unused.split() if name in given), None):
        value = f" {args.device}" if name == "device" else ""
        option = suite.option.replace("_", "-")
        return f"--{option}: want no --{name}{value} beside it, which would have no effect"
    if {"baseline", "dropout"} <= given:
        return "--baseline: want no --dropout beside it, which the function does not take"
    if {"shapes", "model"} <= given:
        return "--shapes: want no --model beside it, which names other shapes"
    of_model = args.model or (device_of(args, suite) == "cuda" and not (args.shapes or args.quant))
    if "rows" in given and not of_model:
        return "--rows: want --model beside it, whose layers take them"
    return None


def device_of(args: argparse.Namespace, suite: Suite) -> str:
    """Return the device that was given; by default a GPU, if there is one and the suite uses it."""
    if args.device is not None:
        return str(args.device)
    return "cuda" if "device" not in suite.unused.split() and torch.cuda.is_available() else "cpu"


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, or 2 if the run cannot start.

    1 if a result of ours or of --baseline misses the tolerance, or if ours loses a row with --count
    that is not known to be lost, or a row with --host.
    """
    suite = next(suite for suite in SUITES if not suite.option or getattr(args, suite.option))
    if (reason := unused(args, suite) or _unstartable_reason(args)) is not None:
        print(f"lora-kernels bench: {reason}", file=sys.stderr)
        return 2
    args.device = device_of(args, suite)
    import pandas  # type: ignore[import-untyped] # noqa: F401 # prints; without it nothing is timed

    if args.seconds is None:
        args.seconds = QUICK_SECONDS if args.quick else SECONDS
    args.ranks = args.ranks or (QUICK_RANKS if args.quick else RANKS)
    args.rows = args.rows or (QUICK_ROWS if args.quick else None)
    baseline = [args.baseline.name] if args.baseline else []
    return int(has_failed(measure(suite, args).rows, baseline))


def has_failed(rows: list[Row], judged: Sequence[str] = ()) -> bool:
    """Return True if a result of ours, or of a call in `judged`, misses the tolerance or loses."""
    return any(is_ours(name) or name in judged for row in rows for name in row.misses)


def _unstartable_reason(args: argparse.Namespace) -> str | None:
    """Return why the run cannot write its files or use its device, or None."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return "no GPU that this torch can use, want one for --device cuda"
    if (reason := _unknown_model_reason(args.model, args.end_to_end)) is not None:
        return reason
    for name, file in (("json", args.json), ("csv", args.csv)):
        if file is not None:
            if file.is_dir():
                return f"--{name}: {file}: it is a folder, want a file"
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
            existing = file if file.exists() else file.parent
            if not file.parent.is_dir() or not os.access(existing, os.W_OK):
                return f"--{name}: {file} cannot be written"
    try:
        if args.json is not None:
            read(args.json)
    except ValueError as error:
        return f"--json: {error}"
    return None


def _unknown_model_reason(model: str | None, is_whole: bool) -> str | None:
    """Return why the value of --model names no model, or None."""
    names: Sequence[str] = [*end_to_end.SIZES] if is_whole else models.NAMES
    if model is None or model in names:
        return None
    if is_whole and (Path(model, "config.json").is_file() or _is_gguf(model)):
        return None
    others = ", a folder with a config.json, or a .gguf file" * is_whole
    wanted = f"{', '.join(names)}{others}"
    return f"--model: got {model!r}, want one of {wanted}"


def _is_gguf(model: str) -> bool:
    return model.endswith(".gguf") and Path(model).is_file()


def measure(suite: Suite, args: argparse.Namespace) -> Result:
    """Run a suite, and print and write each row."""
    result = Result(suite.kind, suite.provenance(args))
    for text in suite.head(args, result):
        print(wrap(text))
    for row in suite.rows(args, result.provenance):
        if row.seconds:
            row.note_load()
        result.rows.append(row)
        print(wrap(str(row)), flush=True)
        result.write(args.json, args.csv)
    if "peak" in result.provenance:
        keep_faster(result.provenance, suite.provenance(args))
    result.write(args.json, args.csv)
    for text in suite.summary(result.rows):
        print(wrap(text))
    return result


def wrap(text: str) -> str:
    """Break each line before its hundredth column, and indent what follows.

    >>> print(wrap("    over it: " + ", ".join(["torch.compile 1.234"] * 6)))
        over it: torch.compile 1.234, torch.compile 1.234, torch.compile 1.234, torch.compile 1.234,
            torch.compile 1.234, torch.compile 1.234
    """
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())] + "    "
        lines += textwrap.wrap(line, 100, subsequent_indent=indent, **options) or [""]
    return "\n".join(lines)
