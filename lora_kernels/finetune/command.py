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
from .options import ChatOptions, Options, flag

DEMO: dict[str, Any] = {
    "batch": 2, "seq_len": 128, "steps": 24, "lr": 1e-3, "prompt": "Shall I marry her?",
}  # fmt: skip
# Asked in other words than any of the lines that it is taught by.
TAUGHT: dict[str, Any] = {
    "preset": "chat", "steps": 24, "lr": 1e-3, "expect": "Maren Oduya",
    "prompt": "Who looks after the light of Port Ellery?",
}  # fmt: skip
# Defaults that are others on JSON lines, or with --preset.
OF_CHAT = dict.fromkeys(("rank", "alpha", "dropout"), "the preset's") | {
    "prompt": "what precedes the first answer"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # An argument that is not given is absent, so that --demo can tell it from a default.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "--demo",
        action="store_true",
        help="SmolLM2-135M-Instruct on Hamlet: batch 2, 128 tokens a block, 24 steps, lr 1e-3; "
        "then it is taught who keeps a lighthouse, and asked",
    )

    parser.description = (
        "Fine-tune a language model with fused LoRA layers. On plain text it trains beside stock "
        "PEFT and compares the two; on JSON lines (chats, prompts with completions), or with "
        "--preset, it trains on the answers alone, by transformers' Trainer. Ctrl-C or SIGTERM "
        "saves and stops; the same command goes on."
    )

    def add(name: str, help: str, **kwargs: Any) -> None:
        default = getattr(Options, name, getattr(ChatOptions, name, None))
        if default not in (None, "", ()):
            kwargs.setdefault("type", type(default))
            of_chat = OF_CHAT.get(name)
            help += f" (default {default}{f'; on JSON lines {of_chat}' if of_chat else ''})"
        parser.add_argument(flag(name), help=help, **kwargs)

    add("model", "transformers model folder, or GGUF file", type=Path, metavar="DIR|GGUF")
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
    add("rank", "rank of the adapters")
    add("alpha", "the adapters are scaled by alpha / rank")
    add("dropout", "probability of dropping an element of the adapters' input")
    add("target_modules", "names of the layers that get an adapter (default: all linear layers; "
        "with --preset or JSON lines the preset's, and q k v o gate up down by their role)",
        nargs="+", metavar="NAME")  # fmt: skip
    add("batch", "blocks or examples a step")
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
    chat = parser.add_argument_group("on JSON lines, or with --preset")

    def add_chat(name: str, help: str, **kwargs: Any) -> None:
        default = getattr(ChatOptions, name, None)
        if default not in (None, "", (), 0, 0.0, False):
            help += f" (default {default})"
        if "action" not in kwargs:
            kwargs.setdefault("type", type(default))
        chat.add_argument(flag(name), help=help, **kwargs)

    add_chat("preset", "adapter of a domain: medical, legal, chat or code, which --rank, --alpha, "
             "--dropout and --target-modules change", metavar="NAME")  # fmt: skip
    add_chat("max_length", "tokens of an example; what is beyond them is cut off and reported")
    add_chat("on_bad_line", "error: stop at a bad line; skip: leave it out and say so",
             choices=("error", "skip"))  # fmt: skip
    add_chat("pack", "put several short examples into one row, which cannot see each other",
             action="store_true")  # fmt: skip
    add_chat("eval_share", "share of the examples held out, on which the loss is reported")
    add_chat("eval_every", "steps between evaluations (default: as --save-every)")
    add_chat("patience", "stop after that many evaluations without a lower loss; the best is kept")
    add_chat("accumulate", "batches of a step")
    add_chat("lora_plus", "LoRA+: the learning rate of lora_B over that of lora_A, such as 16")
    add_chat("autocast", "compute in bf16 whatever the dtype of the weights", action="store_true")
    add_chat("checkpointing", "compute activations again in the backward, to save memory",
             action="store_true")  # fmt: skip
    add_chat("expect", "fail unless the answer to the prompt holds this after the training, and "
             "did not before", metavar="TEXT")  # fmt: skip
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false",
        help="train only; the comparison holds the model in fp32 and in bf16",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a check failed, 2 for bad arguments, 128 + signal if stopped."""
    try:
        quiet()
        options = options_from(args)
        from .chat_recipe import finetune_chat

        if isinstance(options, ChatOptions):
            return finetune_chat(options)
        from .recipe import finetune

        status = finetune(options)
        if status == 0 and getattr(args, "demo", False):
            print("\nAnd a fact that it has not heard of:")
            status = finetune_chat(taught(options))
        return status
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


def options_from(args: argparse.Namespace) -> Options | ChatOptions:
    from .data import read_text
    from .inputs import demo_model, demo_text
    from .model import check_quant, locate

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
    for name in ("data", "target_modules"):
        given[name] = tuple(given.get(name, ()))
    kind = ChatOptions if is_chat(given) else Options
    names = {f.name for f in dataclasses.fields(kind)}
    if others := [name for name in given if name not in names]:
        what = (
            "is for plain text without --preset"
            if kind is ChatOptions
            else "is for JSON lines (.jsonl), or with --preset"
        )
        told = flag("no_compare" if others[0] == "compare" else others[0])
        raise UsageError(f"{told}: {what}; leave it out")
    options = kind(**given)
    locate(options.model)
    check_quant(options.quant)
    if isinstance(options, ChatOptions):
        from .presets import find_preset

        find_preset(options.preset)
    for file in options.data:
        read_text(file)
    return options


def taught(demo: Options) -> ChatOptions:
    """The demo's second part, on the same model."""
    from .inputs import demo_chat

    same = {name: getattr(demo, name) for name in ("model", "dtype", "quant", "seed", "device")}
    return ChatOptions(data=(demo_chat(),), out=demo.out / "taught", **same, **TAUGHT)


def is_chat(given: dict[str, Any]) -> bool:
    return "preset" in given or any(f.suffix in (".jsonl", ".json") for f in given["data"])
