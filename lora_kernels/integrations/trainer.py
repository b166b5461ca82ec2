"""`FuseCallback`: one line that fuses the LoRA layers a Trainer trains."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..choice import verdicts
from ..peft import explain, fuse
from ..peft.linear import Fused
from ..peft.swap import lora_layers

logger = logging.getLogger("lora_kernels")


class VerdictLog(TrainerCallback, ExportableState):
    """Save with each checkpoint which verdicts the GPU kernels followed, and warn if a resumed run
    follows others: its losses then differ in their last digits.

    >>> VerdictLog().state()
    {'args': {}, 'attributes': {'verdicts': {}}}
    """

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"verdicts": verdicts.digests()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not (state.global_step and saved and state.is_world_process_zero):
            return
        before, now = saved["attributes"]["verdicts"], verdicts.digests()
        if before != now:
            logger.warning(
                "the qualification of our GPU kernels changed since the checkpoint: %s, now %s",
                before,
                now,
            )


class FuseCallback(VerdictLog):
    """Fuse the LoRA layers of the model that transformers' Trainer, or any of TRL's, trains.

    `fuse` runs at the end of the trainer's `__init__`, when TRL has added the adapters of its
    `peft_config` and accelerate has not wrapped the model yet, and again when training starts, for
    layers that were adapted in between. Loading, resuming, evaluation and merging go on as before.

    A summary is logged once, at level INFO, by the logger "lora_kernels" of the main process;
    layers that stay PEFT's are a WARNING with the reason.

    Args:
        linears, loss, qualify: as `fuse`'s.

    Raises ValueError, from the trainer's `__init__`, if the model has no LoRA layers.

    >>> from lora_kernels.integrations import FuseCallback
    >>> callback = FuseCallback()  # SFTTrainer(..., peft_config=config, callbacks=[callback])
    """

    def __init__(self, linears: bool = False, loss: bool = False, qualify: str = "cached") -> None:
        self.linears, self.loss, self.qualify = linears, loss, qualify

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"], state.is_world_process_zero)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"], state.is_world_process_zero)
        super().on_train_begin(args, state, control, **kwargs)

    def _fuse(self, model: nn.Module, speaks: bool) -> None:
        layers = [layer for _, layer, _ in lora_layers(model)]
        if not layers:
            raise ValueError(
                f"FuseCallback: got a {type(model).__name__} without LoRA layers, want a PEFT "
                "model: give the trainer a peft_config, or peft.get_peft_model(model, config)"
            )
        before = sum(isinstance(layer, Fused) for layer in layers)
        fuse(model, linears=self.linears, loss=self.loss, qualify=self.qualify)
        if speaks and sum(isinstance(layer, Fused) for layer in layers) > before:
            _report(model)


def report_once(model: nn.Module) -> None:
    """Log the summary of `FuseCallback` in the first of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        _report(model)


def _report(model: nn.Module) -> None:
    """Log how many layers are fused, and why others are not."""
    rows = explain(model).rows
    left = Counter(row.reason for row in rows if row.backend == "peft")
    logger.info("%d of %d LoRA layers fused", len(rows) - left.total(), len(rows))
    for reason, count in left.most_common():
        logger.warning("%d LoRA layers stay PEFT's: %s", count, reason)
