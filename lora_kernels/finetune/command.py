"""`lora-kernels finetune`: its arguments, checked before anything heavy is imported or loaded."""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from . import UsageError
from .options import INITS, MAX_LENGTH, MODEL, REPORTERS, SCHEDULERS, STEPS, Options, flag

DEMO: dict[str, Any] = {
    "batch": 2, "max_length": 128, "steps": 24, "lr": 1e-3, "prompt": "Shall I marry her?",
    "compare": True,
}  # fmt: skip
# Asked in other words than any of the lines that it is taught by.
TAUGHT: dict[str, Any] = {
    "preset": "chat", "steps": 24, "lr": 1e-3, "expect": "Maren Oduya",
    "prompt": "Who looks after the light of Port Ellery?",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # An argument that is not given is absent, so that --demo can tell it from a default.
    parser.argument_default = argparse.SUPPRESS
    parser.description = (
        "Fine-tune a language model with fused LoRA layers by transformers' Trainer, on plain "
        "text, or on JSON lines (chats, prompts with completions) with the loss on the answers. "
        "Ctrl-C or SIGTERM saves and stops; the same command goes on."
    )
    group: Any = parser

    def add(name: str, help: str, *others: str, **kwargs: Any) -> None:
        default = getattr(Options, name, None)
        if default not in (None, "", (), 0, 0.0, False):
            help += f" (default {default})"
        if "action" not in kwargs and default is not None:
            kwargs.setdefault("type", str if default == () else type(default))
        group.add_argument(flag(name), *others, dest=name, help=help, **kwargs)

    parser.add_argument(
        "--demo",
        action="store_true",
        help="SmolLM2-135M-Instruct on Hamlet: batch 2, 128 tokens a block, 24 steps, lr 1e-3, "
        "--compare; then it is taught who keeps a lighthouse, and asked",
    )
    parser.add_argument("--model", **MODEL)
    add(
        "data",
        'JSON lines (.jsonl), each {"messages": [{"role": ..., "content": ...}, ...]}, '
        '{"prompt": ..., "completion": ...} or {"text": ...}; or plain UTF-8 text',
        type=Path,
        nargs="+",
        metavar="FILE",
    )
    add("out", "folder for the adapter, the report and checkpoints; a run that was interrupted "
        "goes on from there (default finetune-out)", type=Path, metavar="DIR")  # fmt: skip

    group = parser.add_argument_group("adapters")
    add("preset", "adapter of a domain: medical, legal, chat or code, which the other options "
        "change (default: chat on JSON lines; on plain text rank 16, alpha 32, no dropout, all "
        "linear layers)", metavar="NAME")  # fmt: skip
    add("rank", "rank of the adapters (default: the preset's)", type=int)
    add("alpha", "the adapters are scaled by alpha / rank (default: the preset's)", type=int)
    add("dropout", "probability of dropping an element of the adapters' input (default: the "
        "preset's)", type=float)  # fmt: skip
    add("target_modules", "layers that get an adapter: names, q k v o gate up down by their role, "
        "or all-linear (default: the preset's)", nargs="+", metavar="NAME")  # fmt: skip
    add("dora", "DoRA: a trained magnitude for each row of the weights", action="store_true")
    add("rslora", "rsLoRA: scale by alpha / √rank", action="store_true")
    add("init", "how lora_A and lora_B start", choices=INITS)

    group = parser.add_argument_group("data")
    add("max_length", f"tokens of an example, or of a block of plain text; what is beyond them is "
        f"cut off and reported (default {MAX_LENGTH}, or the model's positions if fewer)",
        "--seq-len", type=int)  # fmt: skip
    add("on_bad_line", "error: stop at a bad line; skip: leave it out and say so",
        choices=("error", "skip"))  # fmt: skip
    add("pack", "put several short examples into one row, which cannot see each other",
        action="store_true")  # fmt: skip
    add("eval_share", "share of the examples held out, on which the loss is reported")
    add("eval_every", "steps between evaluations (default: as --save-every)")
    add("patience", "stop after that many evaluations without a lower loss; the best is kept")

    group = parser.add_argument_group("training")
    add("batch", "blocks or examples of a forward")
    add("accumulate", "forwards of a step")
    add("steps", f"AdamW steps (default {STEPS}, unless --epochs is given)", type=int)
    add("epochs", "passes over the data, in place of --steps", type=float)
    add("lr", "peak learning rate")
    add("scheduler", "how the learning rate falls", choices=SCHEDULERS)
    add("warmup", "share of the steps over which the learning rate rises from 0 (default 0)")
    add("weight_decay", "AdamW's (default 0)")
    add("lora_plus", "LoRA+: the learning rate of lora_B over that of lora_A, such as 16")
    add("autocast", "compute in bf16 whatever the dtype of the weights", action="store_true")
    add("checkpointing", "compute activations again in the backward, to save memory",
        action="store_true")  # fmt: skip
    add("dtype", "dtype of the base model; adapters are fp32", choices=("fp32", "bf16"))
    add("quant", "hold the base model's linear layers in 4 bits, as QLoRA does (by bitsandbytes)",
        choices=("nf4", "fp4"))  # fmt: skip
    add("seed", "settles the adapters' start, the order of the data and the dropout masks")
    add("save_every", "steps between checkpoints")
    add("report_to", f"services that get the losses: {', '.join(REPORTERS)} (default: none)",
        nargs="+", metavar="NAME")  # fmt: skip
    add("device", "torch device (default: a GPU if there is one)")

    group = parser.add_argument_group("checks")
    add("prompt", "answered before and after the training (default: what precedes the first "
        "answer)")  # fmt: skip
    add("expect", "fail unless the answer to the prompt holds this after the training, and did not "
        "before", metavar="TEXT")  # fmt: skip
    add("compare", "compare gradients, updates and times with stock PEFT's first, which holds the "
        "model in fp32 and in bf16", action=argparse.BooleanOptionalAction)  # fmt: skip
    add("sgd_steps", "SGD steps of the comparison")
    add("timed_steps", "timed steps of the comparison")
    add("peft_steps", "AdamW steps of stock PEFT, for the second curve in loss.png")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a check failed, 2 for bad arguments, 128 + signal if stopped."""
    quiet()
    options = options_from(args)
    from .recipe import finetune

    try:
        status = finetune(options)
        if status == 0 and getattr(args, "demo", False):
            print("\nAnd a fact that it has not heard of:")
            status = finetune(taught(options))
        return status
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"\nlora-kernels finetune: interrupted; {hint}", file=sys.stderr)
        return 128 + signal.SIGINT


def quiet() -> None:
    """Keep the libraries' warnings and bars out of what a command prints."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging as transformers_logging

    # transformers cannot switch this bar off; `disable=None` shows it on a terminal alone.
    gguf_loader.tqdm = functools.partial(tqdm, disable=None)  # type: ignore[attr-defined]

    # PEFT imports bitsandbytes, which reports an optional package that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' at each other


def options_from(args: argparse.Namespace) -> Options:
    from .data import read_text
    from .inputs import demo_model, demo_text
    from .model import check_quant, locate
    from .presets import find_preset

    given = {name: value for name, value in vars(args).items() if name != "demo"}
    given.setdefault("out", Path("finetune-out"))
    if getattr(args, "demo", False):
        given = DEMO | given
        # Looked for where they are not given: the packages need not be there.
        given["model"] = given.get("model") or demo_model()
        given["data"] = given.get("data") or [demo_text()]
    for name in ("model", "data"):
        if name not in given:
            raise UsageError(f"{flag(name)} is missing; give it, or try --demo")
    for name in ("data", "target_modules", "report_to"):
        given[name] = tuple(given.get(name, ()))
    options = Options(**given)
    locate(options.model)
    check_quant(options.quant)
    if options.preset:
        find_preset(options.preset)
    for file in options.data:
        read_text(file)
    return options


def taught(demo: Options) -> Options:
    """The demo's second part, on the same model."""
    from .inputs import demo_chat

    same = {name: getattr(demo, name) for name in ("model", "dtype", "quant", "seed", "device")}
    out, base = demo.out / "taught", demo.base or demo.out / "base"
    return Options(data=(demo_chat(),), out=out, base=base, **same, **TAUGHT)
