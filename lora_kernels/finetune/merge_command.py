"""`lora-kernels merge`: base and adapter as one stock model, compared before it gets its name."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .command import quiet
from .options import MergeOptions, add_options, check_out, fill_in_run

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
    add_options(parser, MergeOptions)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if the logits were off and nothing was written, 2 for bad arguments."""
    options = resolve(vars(args))
    quiet()
    return merge(options)


def resolve(given: dict[str, Any]) -> MergeOptions:
    """The arguments with --run and defaults filled in, checked as far as that needs no model."""
    from .data import read_text
    from .model import check_quant, locate, read_adapter_config

    options = MergeOptions(**fill_in_run(given, "base", "quant_dtype"))
    if options.onto == "dequantized" and options.quant is None:
        options = replace(options, quant="nf4")
    if options.compare:
        check_quant(options.quant)
    if options.text:
        read_text(options.text)
    check_out(options.out, "that is not there yet")
    read_adapter_config(options.adapter, "--adapter")
    locate(options.base, "--base")
    return options


def merge(options: MergeOptions) -> int:
    from . import model
    from .merge import compare_merged, merge_adapter

    text = options.text.read_text(encoding="utf-8") if options.text else TEXT
    ids = model.load_tokenizer(options.base)(text, return_tensors="pt")["input_ids"][:, :256]
    same: Any = {"dtype": options.dtype, "quant_dtype": options.quant_dtype}

    def check(folder: Path) -> bool:
        if not options.compare:
            return True
        held = f"{options.quant} base" if options.quant else "dense base"
        print(f"against {held} + adapter in fp32, on {ids.numel()} tokens:")
        found = compare_merged(
            folder,
            options.base,
            options.adapter,
            dtype=options.dtype,
            quant=options.quant,
            quant_dtype=options.quant_dtype,
            ids=ids,
        )
        print(f"  base + adapter in {options.dtype}: {found.itself}")
        if found.original:
            print(f"  the adapter on the original weights: {found.original}")
        if options.onto == "original" and options.quant:  # of which the line above is the measure
            print(f"  this merge: {found.merged}")
            return True
        verdict = "✓" if found.ok else "✗ nothing is written"
        print(f"  this merge: {found.merged}, at most {found.limit:.3g} {verdict}")
        return found.ok

    same |= {"onto": options.onto, "quant": options.quant or "nf4"}
    done = merge_adapter(options.base, options.adapter, options.out, check=check, **same)
    if done is None:
        return 1
    print(done)
    return 0
