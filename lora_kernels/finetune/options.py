"""The arguments of a run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UsageError

# The option that names a model, as each command has it.
MODEL: dict[str, Any] = {
    "type": Path, "metavar": "DIR|GGUF|ID",
    "help": "transformers model folder, GGUF file, or a hub id that is in the local cache",
}  # fmt: skip
SCHEDULERS = ("cosine", "linear", "constant", "inverse_sqrt")
# How PEFT starts lora_A and lora_B. Its others (pissa, olora, eva, corda, loftq) rewrite the base's
# weights or need data, and an adapter saved from them does not fit the base as it was.
INITS = ("kaiming", "gaussian", "orthogonal")
# --report-to's name -> the package that it needs
REPORTERS = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio",
    "comet_ml": "comet_ml", "clearml": "clearml", "swanlab": "swanlab", "neptune": "neptune",
}  # fmt: skip
STEPS, MAX_LENGTH, MAX_SEED = 200, 512, 2**32 - 1  # NumPy's generators take seeds of 32 bits


@dataclass(frozen=True)
class Options:
    """The arguments, checked as far as that goes without loading anything.

    None: rank, alpha and dropout are the preset's; max_length is `MAX_LENGTH`, or the model's
    positions where they are fewer; steps is `STEPS` where epochs says nothing. base: folder for the
    weights of a GGUF file (default: in `out`), which PEFT can load.
    """

    model: Path
    data: tuple[Path, ...]
    out: Path
    preset: str = ""
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    init: str = "kaiming"
    max_length: int | None = None
    on_bad_line: str = "error"
    pack: bool = False
    eval_share: float = 0.0
    eval_every: int = 0
    patience: int = 0
    batch: int = 4
    accumulate: int = 1
    steps: int | None = None
    epochs: float | None = None
    lr: float = 2e-4
    scheduler: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 0.0
    lora_plus: float = 0.0
    autocast: bool = False
    checkpointing: bool = False
    dtype: str = "fp32"
    quant: str | None = None
    seed: int = 0
    save_every: int = 50
    report_to: tuple[str, ...] = ()
    device: str = ""
    prompt: str = ""
    expect: str = ""
    compare: bool = False
    sgd_steps: int = 20
    timed_steps: int = 10
    peft_steps: int = 60
    base: Path | None = None

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(
            ("rank", "alpha", "batch", "accumulate", "steps", "save_every", "sgd_steps"), 1
        )
        at_least |= dict.fromkeys(("eval_every", "patience", "peft_steps"), 0)
        at_least |= {"max_length": 2, "timed_steps": 2}
        for name, least in at_least.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{flag(name)}: got {value}, want at least {least}")
        check_seed(self.seed)
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"--dropout: got {self.dropout}, want a probability in [0, 1)")
        for name in ("eval_share", "warmup"):
            if not 0.0 <= (share := getattr(self, name)) < 1.0:
                raise UsageError(f"{flag(name)}: got {share}, want a share in [0, 1)")
        for name in ("lr", "epochs"):
            if (number := getattr(self, name)) is not None and not 0.0 < number < float("inf"):
                raise UsageError(f"{flag(name)}: got {number}, want a positive number")
        if not 0.0 <= self.lora_plus < float("inf"):
            raise UsageError(f"--lora-plus: got {self.lora_plus}, want a positive number")
        if not 0.0 <= (decay := self.weight_decay) < float("inf"):
            raise UsageError(f"--weight-decay: got {decay}, want 0 or a positive number")
        for name, wanted in (
            ("on_bad_line", ("error", "skip")), ("scheduler", SCHEDULERS), ("init", INITS),
        ):  # fmt: skip
            if (choice := getattr(self, name)) not in wanted:
                raise UsageError(f"{flag(name)}: got {choice}, want one of {', '.join(wanted)}")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--epochs: want no --steps beside it, which says the same otherwise")
        if self.init == "orthogonal" and self.rank is not None and self.rank % 2:
            raise UsageError(f"--rank: got {self.rank}, want an even one for --init orthogonal")
        for name in ("eval_every", "patience"):
            if getattr(self, name) and not self.eval_share:
                raise UsageError(f"{flag(name)}: needs held-out data; give --eval-share too")
        if self.patience and (not self.eval_every or self.save_every % self.eval_every):
            raise UsageError(
                f"--patience: got --save-every {self.save_every}, want a multiple of --eval-every, "
                f"which is {self.eval_every}"
            )
        for name in self.report_to:
            if name not in REPORTERS:
                raise UsageError(f"--report-to: got {name}, want some of {', '.join(REPORTERS)}")
            if importlib.util.find_spec(REPORTERS[name]) is None:
                package = REPORTERS[name]
                raise UsageError(f"--report-to: {name} needs its package: pip install {package}")

    @property
    def has_json(self) -> bool:
        """True if the data are JSON lines, whose preset is "chat" where none is given."""
        return any(file.suffix in (".jsonl", ".json") for file in self.data)

    @property
    def training(self) -> dict[str, Any]:
        """The keyword arguments of `training_arguments`."""
        names = ("batch", "accumulate", "lr", "warmup", "checkpointing", "save_every", "seed")
        length = {"steps": self.steps or STEPS} if self.epochs is None else {"epochs": self.epochs}
        every = self.eval_every or (self.save_every if self.eval_share else None)
        return {name: getattr(self, name) for name in names} | length | {
            "bf16": self.autocast, "eval_every": every, "weight_decay": self.weight_decay,
            "report_to": list(self.report_to), "scheduler": self.scheduler,
        }  # fmt: skip


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that NumPy's generators do not take."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed: got {seed}, want 0 to {MAX_SEED}")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the arguments of the run that `finetune` wrote to the folder. Raises UsageError."""
    file = folder / "run.json"
    if not file.is_file():
        raise UsageError(f"--run: {folder} holds no run.json; give finetune's --out")
    saved = read_json(file, "--run")
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(name), str) for name in ("model", "dtype")
    ):
        raise UsageError(f"--run: {file} names no model and dtype; give finetune's --out")
    return saved


def read_json(file: Path, argument: str) -> Any:
    """Return what a JSON file of ours holds. Raises UsageError if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{argument}: {file} is damaged: {reason}; remove it") from None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
