"""`lora-kernels finetune`, and functions that the other commands of this package share."""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
import warnings
from typing import Any

from .inputs import check_inputs
from .options import (
    Adapters,
    Checks,
    Data,
    Inputs,
    Options,
    Training,
    add_options,
    fill_in_demo,
    pick,
    require,
)

DEMO: dict[str, Any] = dict(
    batch=2, max_length=128, steps=24, lr=1e-3, prompt="Shall I marry her?", compare=True
)
# The prompt paraphrases the lines of demo.jsonl, so that the answer cannot be recited.
TAUGHT: dict[str, Any] = dict(
    preset="chat",
    steps=24,
    lr=1e-3,
    expect="Maren Oduya",
    prompt="Who looks after the light of Port Ellery?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a language model with fused LoRA layers by transformers' Trainer, on plain "
        "text, or on JSON lines (chats, prompts with completions) with the loss on the answers. "
        "Ctrl-C or SIGTERM saves and stops; the same command goes on."
    )
    add_options(parser, Inputs, Adapters, Data, Training, Checks)
    off: dict[str, Any] = {"action": "store_false", "default": argparse.SUPPRESS}
    parser.add_argument("--no-compare", dest="compare", help="leave --compare out", **off)


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, 1 if a check failed, 128 + signal if stopped."""
    options = Options(**fill_in_demo(vars(args), **DEMO))
    require(options, ("model", "data"), "try --demo")
    check_inputs(options)
    silence_libraries()
    from . import recipe

    try:
        if options.demo:
            print("A fact that the model has not heard of:", flush=True)
            if status := recipe.finetune(teaching_options(options)):
                return status
            print("\nAnd Hamlet, beside stock PEFT:", flush=True)
        return recipe.finetune(options)
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"\nlora-kernels finetune: interrupted; {hint}", file=sys.stderr)
        return 128 + signal.SIGINT


def silence_libraries() -> None:
    """Disable the warnings and progress bars of transformers, PEFT and bitsandbytes."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging as transformers_logging

    # transformers cannot switch this bar off; `disable=None` shows it on a terminal alone.
    gguf_loader.tqdm = functools.partial(tqdm, disable=None)  # type: ignore[attr-defined]

    # PEFT imports bitsandbytes, which reports an optional package that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers warn of each other


def teaching_options(demo: Options) -> Options:
    """Return the options of the demo's first part, on the same model."""
    from .demo import demo_chat

    same = pick(demo, "model dtype quant seed device")
    base = demo.base or demo.out / "base"
    return Options(data=[demo_chat()], out=demo.out / "taught", base=base, **same, **TAUGHT)
