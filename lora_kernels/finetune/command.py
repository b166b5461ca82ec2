"""`lora-kernels finetune`, and functions that the other commands of this package share."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..core.quiet import silence_libraries
from .inputs import check_inputs
from .options import (
    Adapters,
    Base,
    Checks,
    Data,
    Inputs,
    Options,
    Training,
    add_options,
    flag,
    require,
)

# The prompt paraphrases the lines of demo.jsonl, so that the answer cannot be recited.
DEMO: dict[str, Any] = dict(
    preset="chat",
    target_modules=["all-linear"],
    max_steps=20,
    learning_rate=7e-4,
    expect="Maren Oduya",
    prompt="Who looks after the light of Port Ellery?",
    compare=True,
    dtype="fp32",  # what its checks were written for
)
ABOUT_DEMO = (
    "SmolLM2-135M-Instruct learns from a few chats who keeps an invented lighthouse. It is asked\n"
    "for that in other words, and for something else, before and after. Then the training is\n"
    "compared with stock PEFT's. About three minutes on two cores.\n"
)


EXAMPLE = """example:
    echo '{"prompt": "Who keeps the light? ", "completion": "Maren."}' > facts.jsonl
    lora-kernels finetune --model MODEL.gguf --data facts.jsonl --steps 4 --out RUN
    lora-kernels generate --run RUN --prompt 'Who keeps the light?'
"""


class HelpAll(argparse.Action):
    """Print the help of this command, and Trainer's other options, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        parser.print_help()
        print("\nTrainer's other options, of transformers:\n")
        shown = {flag(each.name) for each in fields(Options)} | {"--output-dir"}
        theirs = trainer_parser()
        for action in theirs._actions:
            if shown & {*action.option_strings}:
                action.help = argparse.SUPPRESS
        theirs.usage = argparse.SUPPRESS
        theirs.print_help()
        parser.exit()


def trainer_parser() -> argparse.ArgumentParser:
    """Return a parser of Trainer's options, for those that are not among `Options`."""
    from transformers import HfArgumentParser, TrainingArguments

    theirs: Any = TrainingArguments
    made = HfArgumentParser(theirs, add_help=False, prog="lora-kernels finetune")
    for action in made._actions:
        action.default = argparse.SUPPRESS
        action.option_strings = [name for name in action.option_strings if "_" not in name]
    return made


def parse_rest(
    words: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[dict[str, Any], list[str]]:
    """Return Trainer's options among these words, and the words that are none."""
    theirs = trainer_parser()
    theirs.error = parser.error  # type: ignore[method-assign]
    given, rest = theirs.parse_known_args(list(words))
    return vars(given), rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s --model MODEL --data FILE [options]"
    parser.description = (
        "Fine-tune a language model with fused LoRA layers by transformers' Trainer, on\n"
        "JSON lines (chats, or prompts with completions; the loss is on the answers) or\n"
        "plain text. Ctrl-C or SIGTERM saves and stops; the same command goes on."
    )
    parser.epilog = EXAMPLE
    add_options(parser, Inputs, Adapters, Data, Training, Base, Checks)
    words = "this help, and Trainer's other options, which are accepted too"
    parser.add_argument("--help-all", action=HelpAll, nargs=0, help=words)


def run(args: argparse.Namespace) -> int:
    """Return the exit status: 0, 1 if a check failed, 128 + signal if stopped."""
    given = {name: value for name, value in vars(args).items() if name != "help_all"}
    demo = bool(given.get("demo"))
    if demo:
        from .demo import CONTROLS, demo_chat, demo_model

        given = DEMO | {"model": None, "data": [demo_chat()]} | given
        print(ABOUT_DEMO, flush=True)
        given["model"] = given["model"] or demo_model()
    if given.get("trainer", {}).get("use_cpu"):
        given = {"device": "cpu"} | given
    options = Options(**given)
    require(options, ("model", "data"), "try --demo")
    check_inputs(options)
    silence_libraries()
    print("loading", flush=True)
    from . import recipe

    try:
        status = recipe.finetune(options, CONTROLS if demo else {})
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"\nlora-kernels finetune: interrupted; {hint}", file=sys.stderr)
        return 128 + signal.SIGINT
    if demo and status == 0:
        print(next_commands(options))
    return status


def next_commands(options: Options) -> str:
    """Return the commands to type after the demo."""
    name = sys.argv[0] if Path(sys.argv[0]).name == "lora-kernels" else "lora-kernels"
    model = shlex.quote(str(options.model))
    return "\n".join(
        (
            "Next:",
            f"  {name} generate --run {options.out} --prompt 'Who keeps the light at Port Ellery?'",
            f"  {name} merge --run {options.out} --out {options.out}-merged",
            f"  {name} finetune --model {model} --data YOUR_CHATS.jsonl --out YOUR_RUN",
            f"  {name} finetune --help",
        )
    )
