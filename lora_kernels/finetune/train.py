"""The training loop, and checkpoints that a killed run resumes from with the same bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import batch
from .model import adapters, read_adapter

WARMUP = 0.05  # of the steps
MAX_GRAD_NORM = 1.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then linear decay that would reach zero after the last step.

    >>> [round(learning_rate(step, 4, 1.0), 2) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warmup = int(steps * WARMUP)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (steps - step) / (steps - warmup)


def train(
    model: Any,
    blocks: Tensor,
    *,
    batch_size: int,
    steps: int,
    lr: float,
    seed: int,
    out: Path | None = None,
    save_every: int = 50,
    stop: Callable[[int], bool] = lambda done: False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the adapters of a PEFT model with AdamW; returns the loss of every step done.

    blocks is int64 [blocks, seq_len] on the model's device. With `out`, the run goes on from the
    newest checkpoint there, and saves one every `save_every` steps and after the last.
    `stop(steps done)`, asked after every step, ends the run early, with a checkpoint. `on_step`
    gets the number of steps done and the last loss.
    """
    torch.manual_seed(seed)
    parameters = list(adapters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    if out and (checkpoint := newest_checkpoint(out)):
        losses = load_checkpoint(checkpoint, model, optimizer)

    model.train()
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        ids = batch(blocks, step, batch_size, seed)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        on_step(step + 1, losses[-1])

        stopping = stop(step + 1)
        if out and (stopping or step + 1 == steps or (step + 1) % save_every == 0):
            save_checkpoint(out, model, optimizer, losses)
        if stopping:
            break
    model.eval()
    return losses


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's own files. Embeddings are frozen here: without the flag PEFT asks a hub for them."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def save_checkpoint(
    out: Path, model: Any, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Write out/checkpoint-<step> whole or not at all, then remove the older ones."""
    final = out / f"checkpoint-{len(losses)}"
    partial = out / ".checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, partial)
    state = {"optimizer": optimizer.state_dict(), "losses": losses, "rng": _rng_state()}
    torch.save(state, partial / "training.pt")
    for file in partial.iterdir():  # the rename must not reach the disk before the contents
        with file.open("rb") as f:
            os.fsync(f.fileno())
    partial.rename(final)
    for checkpoint in out.glob("checkpoint-*"):
        if checkpoint != final:
            shutil.rmtree(checkpoint)


def newest_checkpoint(out: str | Path) -> Path | None:
    """The newest checkpoint in a run's folder, None where there is none.

    >>> newest_checkpoint("/nowhere") is None
    True
    """
    return max(checkpoints(Path(out)), key=steps_done, default=None)


def checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]


def steps_done(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def load_checkpoint(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Put the adapters, the optimizer and the random state back; returns the losses so far."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, read_adapter(checkpoint, model, str(model.device)))
    state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    losses: list[float] = state["losses"]
    return losses


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
