"""`lora-kernels merge`: base and adapter as one stock model, compared before it gets its name."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from . import UsageError
from .command import quiet
from .options import read_run

# What the logits are compared on, where --text names nothing else.
TEXT = (
    "The river rose all night. By morning the lower meadow was a lake, and the miller's boat, "
    "which had lain upside down since harvest, was the only way to the bridge. Nobody had seen "
    "the water so high since the year the old church lost its door."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write base + adapter as a model folder that transformers loads without PEFT. Before the "
        "folder gets its name, its logits are compared with those of base + adapter; a folder that "
        "is off by more than rounding is not written. An adapter trained over a 4-bit base fits "
        "the decoded weights (--onto dequantized) and is off on the original ones; by how much is "
        "measured and printed."
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR",
        help="what `lora-kernels finetune` wrote: gives --base, --adapter, --quant, --quant-dtype",
    )  # fmt: skip
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR|GGUF|ID",
        help="transformers model folder, GGUF file, or a cached hub id",
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter in PEFT's format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="(default bf16)"
    )
    parser.add_argument(
        "--onto", choices=("original", "dequantized"), default="original",
        help="the base's weights, or what remains of them in 4 bits (default original)",
    )  # fmt: skip
    parser.add_argument(
        "--quant", choices=("nf4", "fp4"),
        help="the 4 bits that the adapter was trained over (default: none, or nf4 with --onto "
        "dequantized)",
    )  # fmt: skip
    parser.add_argument(
        "--quant-dtype", choices=("fp32", "bf16"),
        help="the base's dtype when it was quantized: finetune's --dtype (default fp32)",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="the logits are compared on its first 256 tokens"
    )
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false",
        help="write without comparing, which holds the whole model in fp32",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if the logits were off and nothing was written, 2 for bad arguments."""
    try:
        options = resolve(args)
        quiet()
        return merge(options)
    except KeyboardInterrupt:
        print("\nlora-kernels merge: interrupted; nothing is written", file=sys.stderr)
        return 128 + signal.SIGINT


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with --run and defaults filled in, checked as far as that needs no model."""
    from ..measure.outputs import unwritable_reason
    from .data import read_text
    from .model import check_quant, locate, read_adapter_config

    known: dict[str, Any] = {"quant": None, "quant_dtype": "fp32", "text": None}
    if args.run:
        saved = read_run(args.run)
        known |= {"base": Path(saved["model"]), "adapter": args.run / "adapter"}
        known |= {"quant": saved.get("quant"), "quant_dtype": saved["dtype"]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = argparse.Namespace(**known | given)
    for name in ("base", "adapter"):
        if name not in options:
            raise UsageError(f"--{name} is missing; give it, or --run")
    if options.onto == "dequantized" and options.quant is None:
        options.quant = "nf4"
    if options.compare:
        check_quant(options.quant)
    if options.text:
        read_text(options.text)
    if reason := unwritable_reason(options.out, folder=True):
        raise UsageError(f"--out: {reason}; give a folder that is not there yet")
    read_adapter_config(options.adapter, "--adapter")
    locate(options.base, "--base")
    return options


def merge(options: argparse.Namespace) -> int:
    import torch

    from . import model
    from .merge import compare_merged, merge_adapter

    tokens = model.load_tokenizer(options.base)(
        options.text.read_text(encoding="utf-8") if options.text else TEXT, return_tensors="pt"
    )

    def check(folder: Path) -> bool:
        if not options.compare:
            return True
        ids: torch.Tensor = tokens["input_ids"][:, :256]
        held = f"{options.quant} base" if options.quant else "dense base"
        print(f"against {held} + adapter in fp32, on {ids.numel()} tokens:")
        found = compare_merged(
            folder, options.base, options.adapter, dtype=options.dtype, quant=options.quant,
            quant_dtype=options.quant_dtype, ids=ids,
        )  # fmt: skip
        print(f"  base + adapter in {options.dtype}: {found.itself}")
        if found.original:
            print(f"  the adapter on the original weights: {found.original}")
        if options.onto == "original" and options.quant:  # of which the line above is the measure
            print(f"  this merge: {found.merged}")
            return True
        verdict = "✓" if found.ok else "✗ nothing is written"
        print(f"  this merge: {found.merged}, at most {found.limit:.3g} {verdict}")
        return found.ok

    done = merge_adapter(
        options.base, options.adapter, options.out, dtype=options.dtype, onto=options.onto,
        quant=options.quant or "nf4", quant_dtype=options.quant_dtype, check=check,
    )  # fmt: skip
    if done is None:
        return 1
    print(done)
    return 0
