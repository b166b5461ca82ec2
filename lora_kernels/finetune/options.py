"""The options of the commands: dataclasses that `HfArgumentParser` turns into arguments."""

# ruff: noqa: RUF009 (`arg` is `dataclasses.field`)

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import UsageError

# PEFT's initializations of lora_A and lora_B. Its others (pissa, olora, eva, corda, loftq) change
# the base's weights or need data, and their adapters do not fit the original base.
INITS = ("kaiming", "gaussian", "orthogonal")
# Values of --report-to, which are also the names of the packages they need.
REPORTERS = ["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml"]
REPORTERS += ["swanlab", "neptune"]
STEPS, MAX_LENGTH, MAX_SEED = 200, 512, 2**32 - 1  # NumPy's generators take seeds of 32 bits
_INF = float("inf")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: 0.0 < value < _INF, "a positive number"),
    "natural": (lambda value: 0.0 <= value < _INF, "0 or a positive number"),
    "share": (lambda value: 0.0 <= value < 1.0, "a share in [0, 1)"),
    "probability": (lambda value: 0.0 <= value < 1.0, "a probability in [0, 1)"),
    "any": (lambda value: True, "a number"),
    "seed": (lambda value: 0 <= value <= MAX_SEED, f"0 to {MAX_SEED}"),
}
# The smallest value of each argument, or the name of its range.
_WANTED: dict[str, int | str] = {
    **dict.fromkeys(
        ("rank", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"), 1
    ),
    **dict.fromkeys(("eval_steps", "save_steps", "save_total_limit", "steps", "batch"), 1),
    **dict.fromkeys(("patience", "seeds", "max_new_tokens"), 1),
    "max_length": 2,
    **dict.fromkeys(
        ("alpha", "lr", "learning_rate", "num_train_epochs", "lora_plus_ratio"), "positive"
    ),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "temperature", "warmup_steps"), "natural"),
    **{"eval_share": "share", "dropout": "probability", "seed": "seed"},
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# The options of `Training` that have a short spelling, too.
SHORT = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch": "per_device_train_batch_size",
}


def check_numbers(given: Mapping[str, Any], /, **wanted: int | str) -> None:
    """Raise UsageError if an argument is out of its range; None is allowed.

    wanted: ranges that override those in `_WANTED`.

    >>> check_numbers({"lr": 0.1, "batch": 0})
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: batch: got 0, want at least 1
    """
    for name, want in (_WANTED | wanted).items():
        value = given.get(name)
        if isinstance(want, int):
            ok, words = value is None or value >= want, f"at least {want}"
        else:
            inside, words = _RANGES[want]
            ok = value is None or inside(value)
        if not ok:
            raise UsageError(f"{name}: got {value}, want {words}")


def check_choice(name: str, value: Any, wanted: Iterable[str]) -> None:
    """Raise UsageError unless the argument of that name has one of the wanted values."""
    *rest, last = map(repr, wanted)
    if repr(value) not in (*rest, last):
        raise UsageError(f"{name}: got {value!r}, want {', '.join(rest)} or {last}")


def check_ranks(ranks: Iterable[int]) -> None:
    """Raise UsageError unless the ranks are distinct and at least 1."""
    ranks = tuple(ranks)
    if not ranks or len(set(ranks)) < len(ranks) or min(ranks) < 1:
        raise UsageError(f"ranks: got {ranks}, want different ones, each at least 1")


def pick(options: Any, names: str | Iterable[str]) -> dict[str, Any]:
    """Return the attributes of these names. A string has names separated by spaces."""
    names = names.split() if isinstance(names, str) else names
    return {name: getattr(options, name) for name in names}


def suggest(got: Any, wanted: Iterable[str], of: str = "one") -> str:
    """Return a hint for an unknown name: the closest of `wanted`, or all of them.

    >>> suggest("medcial", ("medical", "legal")), suggest("x", ("a", "b"))
    ("did you mean 'medical'?", 'want one of a, b')
    """
    close = difflib.get_close_matches(str(got), list(wanted), 1)
    return f"did you mean {close[0]!r}?" if close else f"want {of} of {', '.join(wanted)}"


def arg(default: Any, help: str, *aliases: str, **settings: Any) -> Any:
    """Return a dataclass field for `HfArgumentParser`. settings: of argparse's argument."""
    if default not in (None, "", 0, 0.0, False, []):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        help += f" (default {shown})"
    metadata = {"help": help, "aliases": aliases} | settings
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, *options: Any) -> None:
    """Add an argument for each field. The namespace has only the arguments that were given."""
    from transformers import HfArgumentParser

    made = HfArgumentParser(options, add_help=False)
    for action in made._actions:
        action.default = argparse.SUPPRESS
    parser._add_container_actions(made)
    for action in made._actions:  # --max_length is not shown beside --max-length
        action.option_strings = [name for name in action.option_strings if "_" not in name]
        if action.metavar is None and not action.choices:
            words: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
            action.metavar = "BOOL" if action.nargs == "?" else words.get(action.type, "NAME")


def require(options: Any, names: Iterable[str], otherwise: str) -> None:
    """Raise UsageError that names the first missing option."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"{flag(name)} is missing; give it, or {otherwise}")


def check_out(out: Path, instead: str = "that can be written") -> None:
    """Raise UsageError if the folder cannot be written; leave nothing behind."""
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    try:
        # A file without a name: permission bits say nothing of a read-only or full disk.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{out} cannot be written: {error.strerror}"
        raise UsageError(f"out: {reason}; give a folder {instead}") from error


# Arguments of several commands
_MODEL: dict[str, Any] = {"help": "model folder, .gguf file or cached hub id", "metavar": "MODEL"}
_BITS = "hold linear layers in 4 bits, as QLoRA does, by bitsandbytes"
_QUANT: dict[str, Any] = {"help": _BITS, "choices": ("nf4", "fp4")}
_DTYPE: dict[str, Any] = {"help": "dtype of the base model", "choices": ("fp32", "bf16")}
_DTYPE_OF_RUN = "dtype of the base model (default: bf16 on a GPU that has it, else fp32)"
_LINES = "JSON lines: messages, prompt and completion, or text; or plain text"
_DEVICE = "torch device (default: a GPU if there is one)"
_RUN = "folder that `lora-kernels finetune` wrote: gives the model, adapter, dtype and quant"
_ADAPTER = "folder of an adapter in PEFT's format"
_ONTO = "the original weights, or what 4 bits hold of them (default: what the adapter trained over)"
_LENGTH = f"tokens of an example (default {MAX_LENGTH}, or the model's positions if fewer)"


@dataclass(frozen=True)
class Inputs:
    demo: bool = arg(False, "teach SmolLM2-135M-Instruct a fact, and compare with PEFT")
    model: Path = arg(None, **_MODEL)
    data: list[Path] = arg([], _LINES)
    out: Path = arg(Path("finetune-out"), "folder; an interrupted run goes on", "--output-dir")


@dataclass(frozen=True)
class Adapters:
    _argument_group_name = "adapters (default: the preset's; on plain text rank 16, alpha 32)"
    preset: str = arg("", "medical, legal, chat or code (default: chat on JSON lines)")
    rank: int | None = arg(None, "rank of the adapters")
    alpha: int | None = arg(None, "the adapters are scaled by alpha / rank")
    dropout: float | None = arg(None, "probability of dropping an element of an adapter's input")
    target_modules: list[str] = arg([], "layers: names, q k v o gate up down, or all-linear")
    dora: bool = arg(False, "DoRA: a trained magnitude for each row of the weights")
    rslora: bool = arg(False, "rsLoRA: scale by alpha / √rank")
    init: str = arg("kaiming", "how lora_A and lora_B start", choices=INITS)
    lora_plus: float = arg(0.0, "LoRA+: learning rate of lora_B over lora_A's, such as 16")


@dataclass(frozen=True)
class Data:
    _argument_group_name = "data"
    max_length: int | None = arg(None, f"{_LENGTH}, or of a block of plain text")
    padding_free: bool = arg(False, "a batch is one row of examples that do not see each other")
    eval_share: float = arg(0.0, "share of the examples held out, on which the loss is reported")
    patience: int = arg(0, "stop after so many evaluations without a lower loss; keep the best")


@dataclass(frozen=True)
class Training:
    _argument_group_name = "training (Trainer's names; --help-all has its other options)"
    max_steps: int | None = arg(None, f"AdamW steps (default {STEPS}, or by epochs)", "--steps")
    num_train_epochs: float | None = arg(None, "passes over the data, not --steps", "--epochs")
    learning_rate: float = arg(2e-4, "peak learning rate", "--lr")
    per_device_train_batch_size: int = arg(4, "blocks or examples of a forward", "--batch")
    gradient_accumulation_steps: int = arg(1, "forwards of a step")
    lr_scheduler_type: str = arg("cosine", "how the learning rate falls")
    warmup_steps: float = arg(0.0, "steps, or below 1 a share, over which the rate rises")
    weight_decay: float = arg(0.0, "AdamW's (default 0)")
    bf16: bool = arg(False, "compute in bf16 whatever the dtype of the weights")
    gradient_checkpointing: bool = arg(False, "compute activations again, to save memory")
    logging_steps: int = arg(1, "steps between losses")
    save_steps: int = arg(50, "steps between checkpoints")
    save_total_limit: int = arg(2, "newest checkpoints that are kept")
    eval_steps: int = arg(0, "steps between evaluations (default: as --save-steps)")
    report_to: list[str] = arg([], "tensorboard, wandb or another service that gets the losses")
    seed: int = arg(0, "of the adapters, the data's order and dropout (default 0)")


@dataclass(frozen=True)
class Base:
    _argument_group_name = "base model"
    dtype: str = arg("", **_DTYPE | {"help": _DTYPE_OF_RUN})
    quant: str | None = arg(None, **_QUANT)
    device: str = arg("", _DEVICE)


@dataclass(frozen=True)
class Checks:
    _argument_group_name = "checks"
    prompt: str = arg("", "asked before and after training (default: the data's first question)")
    expect: str = arg("", "fail unless the answer holds this after the training, and not before")
    compare: bool = arg(False, "compare gradients, updates and times with stock PEFT's at the end")


@dataclass(frozen=True)
class Options(Checks, Base, Training, Data, Adapters, Inputs):
    """The options of `finetune`, checked without loading a model.

    None stands for the preset's rank, alpha and dropout, an empty dtype for `default_dtype`'s. The
    default of max_length is `MAX_LENGTH`, or the model's number of positions if that is smaller.
    The default of max_steps is `STEPS`, unless num_train_epochs is given.

    trainer: other fields of transformers' `TrainingArguments`.
    """

    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers(vars(self), alpha=1, logging_steps=1, eval_steps=0, patience=0)
        check_numbers({"lora_plus": self.lora_plus or None}, lora_plus="positive")
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise UsageError("num_train_epochs: want no --max-steps beside it")
        if self.init == "orthogonal" and self.rank is not None and self.rank % 2:
            raise UsageError(f"rank: got {self.rank}, want an even one for --init orthogonal")
        for name in ("eval_steps", "patience"):
            if getattr(self, name) and not self.eval_share:
                raise UsageError(f"{name}: needs held-out data; give --eval-share too")
        if self.patience and (not self.eval_steps or self.save_steps % self.eval_steps):
            raise UsageError(
                f"patience: got --save-steps {self.save_steps}, want a multiple of --eval-steps, "
                f"which is {self.eval_steps}"
            )
        for name in self.report_to:
            if name not in REPORTERS:
                raise UsageError(f"report_to: got {name}, want some of {', '.join(REPORTERS)}")
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"report_to: {name} needs its package: pip install {name}")

    @property
    def has_json(self) -> bool:
        """True if the data are JSON lines, for which the default preset is "chat"."""
        from .data import is_json

        return any(map(is_json, self.data))

    @property
    def training(self) -> dict[str, Any]:
        """The keyword arguments of `training_arguments`."""
        given = pick(self, (each.name for each in fields(Training)))
        if self.num_train_epochs is None:
            given |= {"num_train_epochs": 1.0, "max_steps": self.max_steps or STEPS}
        given["eval_steps"] = self.eval_steps or (self.save_steps if self.eval_share else None)
        return given | self.trainer


@dataclass(frozen=True)
class RankOptions:
    """The options of `rank-search`."""

    model: Path = arg(None, **_MODEL)
    data: list[Path] = arg([], _LINES)
    eval: list[Path] = arg([], "data on which ranks are scored (default: a fifth of --data)")
    out: Path = arg(Path("rank-search-out"), "folder for ranks.json and ranks.png")
    ranks: list[int] = arg([4, 8, 16, 32, 64], "ranks to train")
    preset: str = arg("chat", "medical, legal, chat or code: which layers")
    target_modules: list[str] = arg([], "other layers than the preset's")
    steps: int = arg(100, "for each rank", "--max-steps")
    batch: int = arg(4, "examples a step", "--per-device-train-batch-size")
    lr: float = arg(2e-4, "peak learning rate", "--learning-rate")
    max_length: int | None = arg(None, _LENGTH)
    examples: int = arg(0, "take so many of the data's, drawn by --seed (default: all)")
    adalora: bool = arg(True, "train AdaLoRA, too; --no-adalora does not")
    dtype: str = arg("fp32", **_DTYPE)
    quant: str | None = arg(None, **_QUANT)
    seed: int = arg(0, "of the adapters, the data's order and dropout (default 0)")
    device: str = arg("", _DEVICE)

    def __post_init__(self) -> None:
        require(self, ("model", "data"), "see --help")
        check_ranks(self.ranks)
        check_numbers(vars(self))
        if self.adalora and self.steps < 10:
            raise UsageError(f"steps: got {self.steps}, want at least 10, or --no-adalora")
        if self.examples < 0 or self.examples == 1:
            raise UsageError(f"examples: got {self.examples}, want at least 2, or 0 for all")


@dataclass(frozen=True)
class CompareOptions:
    """The options of `compare`."""

    demo: bool = arg(False, "MiniLM-L6 on film reviews, fresh or rotten")
    model: Path = arg(None, **_MODEL)
    data: Path = arg(None, "JSON lines or a table with a head (.csv, .csv.bz2): text and label")
    out: Path = arg(Path("compare-out"), "folder for classification.json, .md and .png")
    text: str = arg("text", "field")
    label: str = arg("label", "field")
    group: str | None = arg(None, "field; texts of one group stay on one side of the split")
    labels: list[str] = arg([], "leave texts with other labels out")
    train: int | None = arg(None, "texts (default: 2000, or two thirds of fewer than 3000)")
    held_out: int | None = arg(None, "other texts, for the score (default: half of --train's)")
    methods: list[str] = arg([], "(default: all)")
    lr: list[str] = arg([], "peak learning rates, such as full=1e-5 lora-8=1e-3")
    seeds: int = arg(3, "runs of each method")
    steps: int = arg(100, "of each run", "--max-steps")
    batch: int = arg(16, "texts a step", "--per-device-train-batch-size")
    max_length: int = arg(64, "tokens of a text")
    device: str = arg("", _DEVICE)

    def __post_init__(self) -> None:
        check_numbers(vars(self) | {"lr": None}, max_length=1)


_INTO, _ROUNDINGS = ("dense", "base"), ("nearest", "stochastic", "error")


@dataclass(frozen=True)
class MergeOptions:
    """The options of `merge`."""

    run: Path | None = arg(None, _RUN)
    model: Path = arg(None, **_MODEL)
    adapter: Path = arg(None, _ADAPTER)
    out: Path = arg(None, "a new folder")
    dtype: str = arg("bf16", "of the result", choices=("fp32", "bf16", "fp16"))
    onto: str | None = arg(None, _ONTO, choices=("original", "dequantized"))
    quant: str | None = arg(None, "what the adapter was trained over", choices=("nf4", "fp4"))
    quant_dtype: str = arg("fp32", "dtype that was quantized", choices=("fp32", "bf16"))
    into: str = arg("dense", "base: the formats of the base's own tensors", choices=_INTO)
    round: str = arg("nearest", "error keeps small updates, by --data", choices=_ROUNDINGS)
    data: list[Path] = arg([], "for --round error, such as the adapter's training data")
    seed: int = arg(0, "of --round stochastic and error (default 0)")

    def __post_init__(self) -> None:
        require(self, ("model", "adapter"), "--run")
        require(self, ("out",), "see --help")
        check_numbers({"seed": self.seed})


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export`."""

    run: Path | None = arg(None, "folder that `lora-kernels finetune` wrote: the model and adapter")
    model: Path = arg(None, **_MODEL)
    adapter: Path = arg(None, _ADAPTER)
    gguf: Path = arg(None, "the file to write, such as adapter.gguf")

    def __post_init__(self) -> None:
        require(self, ("model", "adapter"), "--run")
        require(self, ("gguf",), "see --help")


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate`."""

    run: Path | None = arg(None, _RUN)
    demo: bool = arg(False, "SmolLM2-135M-Instruct as the model")
    model: Path = arg(None, **_MODEL)
    adapter: Path | None = arg(None, f"{_ADAPTER} (default: --run's, or none)")
    prompt: str = arg("", "what is answered")
    dtype: str = arg("fp32", **_DTYPE)
    quant: str | None = arg(None, **_QUANT)
    max_new_tokens: int = arg(64, "tokens of the answer at most")
    temperature: float = arg(0.0, "0, the default: the likeliest token")
    seed: int = arg(0, "of sampling (default 0)")
    device: str = arg("", _DEVICE)
    compare: bool = arg(False, "let stock PEFT answer too, and print both speeds")

    def __post_init__(self) -> None:
        require(self, ("model",), "--run")
        if self.compare and self.adapter is None:
            raise UsageError("compare: needs an adapter; give --adapter or --run too")
        if not self.prompt:
            raise UsageError("prompt: got none, want a text that is answered")
        check_numbers(vars(self))


@dataclass(frozen=True)
class CheckOptions:
    """The options of `check`, whose adapter is an argument without a flag."""

    model: Path = arg(None, **_MODEL)
    text: Path | None = arg(None, "the model is run on its first 256 tokens (default: a paragraph)")
    dtype: str = arg("fp32", **_DTYPE)
    quant: str | None = arg(None, **_QUANT)
    device: str = arg("", _DEVICE)

    def __post_init__(self) -> None:
        require(self, ("model",), "check the adapter in a folder that `finetune` wrote")


def fill_in_run(given: dict[str, Any], dtype: str = "dtype") -> dict[str, Any]:
    """Fill in the model, adapter, dtype and quant of the run that --run names, if it is given.

    dtype: the option that has the run's dtype.
    """
    if (folder := given.get("run")) is None:
        return given
    saved = read_run(folder)
    known = {"model": Path(saved["model"]), dtype: saved["dtype"], "quant": saved.get("quant")}
    return known | {"adapter": folder / "adapter"} | given


def read_run(folder: Path) -> dict[str, Any]:
    """Return the arguments of a run from `finetune`'s folder. Raises UsageError."""
    file = folder / "run.json"
    if not file.is_file():
        raise UsageError(f"run: {folder} holds no run.json; give finetune's --out")
    saved = read_json(file, "run")
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(name), str) for name in ("model", "dtype")
    ):
        raise UsageError(f"run: {file} names no model and dtype; give finetune's --out")
    return saved


def read_json(file: Path, argument: str) -> Any:
    """Read a JSON file that a command wrote. Raises UsageError if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{argument}: {file} is damaged: {reason}; remove it") from None
