"""The command line: `lora-kernels COMMAND`. Each command's module is imported when it runs.

A command module has `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from .core import device
from .core.quiet import silence_imports
from .finetune import TrainingError, UsageError
from .version import __version__

# name -> module, the extra that installs what it needs, help
COMMANDS = {
    "info": ("lora_kernels.info", None, "what this machine is and which backends it can run"),
    "verify": ("lora_kernels.verify", None, "check every kernel against the reference"),
    "bench": ("lora_kernels.bench.command", "bench", "time the kernels against what others use"),
    "qualify": ("lora_kernels.bench.qualify", None, "check our kernels on this GPU and use them"),
    "finetune": ("lora_kernels.finetune.command", "finetune", "fine-tune a model with fused LoRA"),
    "rank-search": (
        "lora_kernels.finetune.rank_command",
        "finetune",
        "find the rank that is enough for a data set",
    ),
    "compare": (
        "lora_kernels.finetune.compare_command",
        "finetune",
        "full fine-tuning against LoRA on a data set",
    ),
    "merge": (
        "lora_kernels.finetune.merge",
        "finetune",
        "write base and adapter as one stock model",
    ),
    "export": (
        "lora_kernels.finetune.export",
        "finetune",
        "write an adapter as GGUF, for llama.cpp",
    ),
    "check": (
        "lora_kernels.finetune.check_command",
        "finetune",
        "find out whether an adapter trains, works, merges and loads",
    ),
    "generate": ("lora_kernels.finetune.generate", "finetune", "answer with an adapter, fused"),
}


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line; the usage of some commands is twenty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 where it cannot start."""
    silence_imports()
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="lora-kernels", description="Fused LoRA kernels for PyTorch and PEFT.")
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=text, description=text)
        for name, (_, _, text) in COMMANDS.items()
    }
    # The options that stand before a command take no value, so it is the first word without a dash.
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is None:
        parser.parse_args(argv)  # --help, --version, or an option that does not exist
        parser.exit(2, f"lora-kernels: no command given; want one of {', '.join(COMMANDS)}\n")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"want one of {', '.join(COMMANDS)}"
        parser.exit(2, f"lora-kernels: no command {name!r}; {hint}\n")

    module_name, extra, _ = COMMANDS[name]
    try:
        command = importlib.import_module(module_name)
        command.add_arguments(parsers[name])
        args, rest = parser.parse_known_args(argv)
        if rest and hasattr(command, "parse_rest"):  # options of a library
            args.trainer, rest = command.parse_rest(rest, parsers[name])
        if rest:
            parser.exit(2, f"lora-kernels {name}: {unknown(rest, parsers[name])}\n")
        status = int(command.run(args))
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or importlib.util.find_spec(missing) is not None:
            raise
        how = device.install_command(extra) if extra else f"pip install {missing}"
        parser.exit(2, f"lora-kernels {name}: needs {missing}: {how}\n")
    except UsageError as error:
        print(f"lora-kernels {name}: {name_option(str(error), parsers[name])}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". GPU ")[0]  # after it, how much of the card is in use
        print(f"lora-kernels {name}: {said}", file=sys.stderr)
        return 1
    except TrainingError as error:
        print(f"lora-kernels {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # also during the command's imports
        print(f"\nlora-kernels {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads, `head` for one, has seen enough
        # Or Python would try again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except OSError as error:  # a full disk, a folder that has gone
        said = name_option(str(error).partition("\n")[0], parsers[name])
        print(f"lora-kernels {name}: {said}", file=sys.stderr)
        return 1


def name_option(message: str, parser: argparse.ArgumentParser) -> str:
    """Return the message with the option's name for an argument's, with which it begins."""
    argument, _, rest = message.partition(":")
    option = "--" + argument.replace("_", "-")
    known = any(option in action.option_strings for action in parser._actions)
    return f"{option}:{rest}" if known else message


def unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the error message for words that the command does not know."""
    word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
    if not word.startswith("-"):
        return f"got {word!r}, which belongs to no option; see --help"
    options = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(word, {*options} - {"--help", "--help-all"}, n=1)
    return f"no option {word}; " + (f"did you mean {close[0]}?" if close else "see --help")


if __name__ == "__main__":
    sys.exit(main())
