"""The arguments of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UsageError


@dataclass(frozen=True)
class Options:
    """The arguments, checked as far as that goes without loading anything."""

    model: Path
    data: tuple[Path, ...]
    out: Path
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    batch: int = 4
    seq_len: int = 256
    steps: int = 200
    lr: float = 2e-4
    dtype: str = "fp32"
    quant: str | None = None
    seed: int = 0
    save_every: int = 50
    device: str = ""
    prompt: str = "Tell me a story."
    compare: bool = True
    sgd_steps: int = 20
    timed_steps: int = 10
    peft_steps: int = 60

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(
            ("rank", "alpha", "batch", "steps", "save_every", "sgd_steps"), 1
        ) | {"seq_len": 2, "timed_steps": 2, "peft_steps": 0}
        for name, least in at_least.items():
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{flag(name)}: got {value}, want at least {least}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"--dropout: got {self.dropout}, want a probability in [0, 1)")
        if not 0.0 < self.lr < float("inf"):
            raise UsageError(f"--lr: got {self.lr}, want a positive number")

    @property
    def lora(self) -> dict[str, Any]:
        """The keyword arguments of `add_adapters`."""
        names = ("rank", "alpha", "dropout", "target_modules")
        return {name: getattr(self, name) for name in names}

    @property
    def loop(self) -> dict[str, Any]:
        """The keyword arguments of `train`."""
        return {"batch_size": self.batch, "steps": self.steps, "lr": self.lr, "seed": self.seed}

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True)
class ChatOptions:
    """The arguments of a run on chats, prompts with completions, or by a preset."""

    model: Path
    data: tuple[Path, ...]
    out: Path
    preset: str = "chat"
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] = ()
    max_length: int = 512
    on_bad_line: str = "error"
    pack: bool = False
    eval_share: float = 0.0
    eval_every: int = 0
    patience: int = 0
    batch: int = 4
    accumulate: int = 1
    steps: int = 200
    lr: float = 2e-4
    lora_plus: float = 0.0
    autocast: bool = False
    checkpointing: bool = False
    dtype: str = "fp32"
    quant: str | None = None
    seed: int = 0
    save_every: int = 50
    device: str = ""
    prompt: str = ""
    expect: str = ""

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(("batch", "accumulate", "steps", "save_every"), 1)
        at_least |= dict.fromkeys(("eval_every", "patience"), 0) | {"max_length": 2}
        at_least |= {n: 1 for n in ("rank", "alpha") if getattr(self, n) is not None}
        for name, least in at_least.items():
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{flag(name)}: got {value}, want at least {least}")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"--dropout: got {self.dropout}, want a probability in [0, 1)")
        if not 0.0 <= self.eval_share < 1.0:
            raise UsageError(f"--eval-share: got {self.eval_share}, want a share in [0, 1)")
        for name, least_number in (("lr", False), ("lora_plus", True)):
            value = getattr(self, name)
            if not (0.0 < value < float("inf") or (least_number and value == 0.0)):
                raise UsageError(f"{flag(name)}: got {value}, want a positive number")
        if self.on_bad_line not in ("error", "skip"):
            raise UsageError(f"--on-bad-line: got {self.on_bad_line}, want error or skip")
        for name in ("eval_every", "patience"):
            if getattr(self, name) and not self.eval_share:
                raise UsageError(f"{flag(name)}: needs held-out data; give --eval-share too")
        if self.patience and (not self.eval_every or self.save_every % self.eval_every):
            raise UsageError(
                f"--patience: got --save-every {self.save_every}, want a multiple of --eval-every, "
                f"which is {self.eval_every}"
            )

    @property
    def adapter(self) -> dict[str, Any]:
        """The keyword arguments of `add_lora_layers`."""
        names = ("preset", "rank", "alpha", "dropout", "seed")
        return {name: getattr(self, name) for name in names} | {
            "targets": self.target_modules or None
        }

    @property
    def training(self) -> dict[str, Any]:
        """The keyword arguments of `training_arguments`."""
        names = ("steps", "batch", "accumulate", "lr", "checkpointing", "save_every", "seed")
        every = self.eval_every or (self.save_every if self.eval_share else None)
        return {name: getattr(self, name) for name in names} | {
            "bf16": self.autocast, "eval_every": every,
        }  # fmt: skip


def read_run(folder: Path) -> dict[str, Any]:
    """The arguments of the run that `finetune` wrote to the folder. Raises UsageError."""
    file = folder / "run.json"
    if not file.is_file():
        raise UsageError(f"--run: {folder} holds no run.json; give finetune's --out")
    saved: dict[str, Any] = json.loads(file.read_text())
    return saved


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
