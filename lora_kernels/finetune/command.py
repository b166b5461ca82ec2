"""`lora-kernels finetune`: its arguments, checked before anything heavy is imported or loaded."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from . import UsageError
from .options import Options, flag

DEMO = {"batch": 2, "seq_len": 128, "steps": 60, "lr": 1e-3, "prompt": "Shall I marry her?"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # An argument that is not given is absent, so that --demo can tell it from a default.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--demo",
        action="store_true",
        help="SmolLM2-135M-Instruct on Hamlet: batch 2, 128 tokens a block, 60 steps, lr 1e-3",
    )

    def add(name: str, help: str, **kwargs: Any) -> None:
        default = getattr(Options, name, None)
        if default not in (None, "", ()):
            kwargs.setdefault("type", type(default))
            help += f" (default {default})"
        parser.add_argument(flag(name), help=help, **kwargs)

    add("model", "transformers model folder, or GGUF file", type=Path, metavar="DIR|GGUF")
    add("data", "plain UTF-8 text", type=Path, nargs="+", metavar="FILE")
    add("out", "folder for the adapter, the report and checkpoints; a run that was interrupted "
        "goes on from there (default finetune-out)", type=Path, metavar="DIR")  # fmt: skip
    add("rank", "rank of the adapters")
    add("alpha", "the adapters are scaled by alpha / rank")
    add("dropout", "probability of dropping an element of the adapters' input")
    add("target_modules", "names of the layers that get an adapter (default: all linear layers)",
        nargs="+", metavar="NAME")  # fmt: skip
    add("batch", "blocks a step")
    add("seq_len", "tokens a block")
    add("steps", "AdamW steps")
    add("lr", "peak learning rate")
    add("dtype", "dtype of the base model; adapters are fp32", choices=("fp32", "bf16"))
    add("quant", "hold the base model's linear layers in 4 bits, as QLoRA does (by bitsandbytes)",
        choices=("nf4", "fp4"))  # fmt: skip
    add("seed", "settles the adapters' start, the order of the data and the dropout masks")
    add("save_every", "steps between checkpoints")
    add("device", "torch device (default: a GPU if there is one)")
    add("prompt", "answered before and after the training")
    add("sgd_steps", "SGD steps of the comparison with stock PEFT")
    add("timed_steps", "timed steps of the comparison")
    add("peft_steps", "AdamW steps of stock PEFT, for the second curve in loss.png")
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false",
        help="train only; the comparison holds the model in fp32 and in bf16",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a check failed, 2 for bad arguments, 128 + signal if stopped."""
    try:
        options = options_from(args)
        quiet()
        from .recipe import finetune

        return finetune(options)
    except UsageError as error:
        print(f"lora-kernels finetune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"\nlora-kernels finetune: interrupted; {hint}", file=sys.stderr)
        return 128 + signal.SIGINT


def quiet() -> None:
    """No warnings and bars of the libraries in between what a command prints."""
    from transformers.utils import logging as transformers_logging

    # PEFT imports bitsandbytes, which reports an optional package that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' at each other


def options_from(args: argparse.Namespace) -> Options:
    from .data import demo_text, read_text
    from .model import check_quant, demo_model, locate

    names = {f.name for f in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given.setdefault("out", Path("finetune-out"))
    if getattr(args, "demo", False):
        given = DEMO | given
        given.setdefault("model", demo_model())
        given.setdefault("data", [demo_text()])
    for name in ("model", "data"):
        if name not in given:
            raise UsageError(f"{flag(name)} is missing; give it, or try --demo")
    for name in ("data", "target_modules"):
        given[name] = tuple(given.get(name, ()))
    options = Options(**given)
    locate(options.model)
    check_quant(options.quant)
    for file in options.data:
        read_text(file)
    return options
