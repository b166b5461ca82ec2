"""The arguments of a run."""

from __future__ import annotations

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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
