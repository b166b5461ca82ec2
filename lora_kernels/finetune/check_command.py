"""`lora-kernels check`: whether a saved adapter trains, has an effect, merges and loads."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from ..core.quiet import silence_libraries
from ..layers import adaptable_experts
from . import model as models
from .checkpoints import translate_errors
from .data import decode_text, read_file
from .errors import UsageError
from .options import CheckOptions, add_options, fill_in_run

# The text on which the model is run without --text.
TEXT = (
    "The river rose all night. By morning the lower meadow was a lake, and the miller's boat, "
    "which had lain upside down since harvest, was the only way to the bridge. Nobody had seen "
    "the water so high since the year the old church lost its door."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Load an adapter in fused layers and find out, for each adapted module: a gradient reaches "
        "it, it changes the output, merging gives the same output, the file has its keys, and "
        "experts have the order that PEFT reads. Nothing is written. The exit status is 1 if "
        "something is wrong. The model, dtype and quant of `finetune` are known in its folder."
    )
    words = "folder of an adapter in PEFT's format, such as RUN/adapter"
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help=words)
    add_options(parser, CheckOptions)


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, or 1 if something is wrong with the adapter."""
    given = vars(args)
    adapter = given.pop("adapter")
    if (adapter.parent / "run.json").is_file():
        given = fill_in_run({"run": adapter.parent} | given)
        del given["run"], given["adapter"]
    options = CheckOptions(**given)
    config = models.read_adapter_config(adapter)
    models.locate(options.model)
    models.check_quant(options.quant, options.model)
    silence_libraries()
    from peft import PeftModel

    from ..peft import check, fuse

    text, device = read_text(options.text), models.usable_device(options.device)
    tokenizer = models.load_tokenizer(options.model)
    base: Any = models.load_base(options.model, models.DTYPES[options.dtype], device, options.quant)
    length = min(256, models.check_length(None, base))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :length].to(device)
    models.read_adapter_weights(adapter)
    with warnings.catch_warnings(), translate_errors(models.misfit(adapter, config)):
        warnings.simplefilter("ignore")  # PEFT's about missing keys; the table has them
        with adaptable_experts(base):
            model = PeftModel.from_pretrained(base, str(adapter))
        fuse(model)
    found = check(model, {"input_ids": ids, "labels": ids}, saved=adapter)
    print(found)
    return 0 if found.ok else 1


def read_text(file: Path | None) -> str:
    """Return the file's text, or a paragraph. Raises UsageError if the file cannot be read."""
    if file is None:
        return TEXT
    text = decode_text(read_file(file, "text", "the path of a plain text file"), file, "text")
    if not text.strip():
        raise UsageError(f"text: {file} is empty; give a file with text in it")
    return text
