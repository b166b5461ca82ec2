"""`FuseCallback`: one line that fuses the LoRA layers a Trainer trains."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..choice import verdicts
from ..peft import explain, fuse
from ..peft.base import missing_layers
from ..peft.explain_rows import ADAPTER, LIBRARY, PEFT, TORCH
from ..peft.merge import check_exact_merge
from ..peft.swap import check_qualify, lora_layers

MOST_REASONS = 3  # that are printed for a state
MANY_LEFT = 0.1  # of the layers; more than these being left to PEFT is a warning

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
        # Trainer saves the state of each callback under its name, which a checkpoint of a run
        # without this callback lacks.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if not (state.global_step and state.is_world_process_zero):
            return
        before, now = saved["attributes"]["verdicts"], verdicts.digests()
        if before != now:
            logger.warning(
                "the qualification of our GPU kernels changed since the checkpoint: %s, now %s",
                before,
                now,
            )


class LayerReport(TrainerCallback):
    """Print how the LoRA layers will be computed, when accelerate has wrapped the model.

    DDP, FSDP and DeepSpeed may change a model so that its layers run PEFT's forward, as FSDP1 does.
    The main process prints a line, and one for each reason why layers are not "our kernels". More
    than a tenth of the layers left to PEFT, and a loss left to transformers, are warnings of the
    logger "lora_kernels".
    """

    _said: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(kwargs["model"], state)

    def _report(self, model: nn.Module, state: Any) -> None:
        if state.is_world_process_zero:
            self._said = _report(model, self._said)


class FuseCallback(LayerReport, VerdictLog):
    """Fuse the LoRA layers of the model that transformers' Trainer, or any of TRL's, trains.

    `fuse` runs at the end of the trainer's `__init__`, when TRL has added the adapters of its
    `peft_config` and accelerate has not wrapped the model yet, and again when training starts, for
    layers that were adapted in between. Loading, resuming, evaluation and merging go on as before.

    Before the first step the main process prints how many layers are "our kernels", "our library
    GEMMs", "adapter only" and "PEFT's", as `explain` has them, and why they are not in a
    state before. If more than a tenth are PEFT's, it is one warning of the logger "lora_kernels".

    Args:
        linears, loss, qualify, blocks, cast_adapters, exact_merge: as `fuse`'s.

    Raises ValueError if `qualify` or `exact_merge` is another word; and, from the trainer's
    `__init__`, if the model has no LoRA layers, or one whose base `exact_merge` cannot keep.

    >>> from lora_kernels.integrations import FuseCallback
    >>> callback = FuseCallback()  # SFTTrainer(..., peft_config=config, callbacks=[callback])
    """

    def __init__(
        self,
        *,
        linears: bool = False,
        loss: bool = False,
        qualify: str = "cached",
        blocks: bool = True,
        cast_adapters: bool = False,
        exact_merge: str | None = None,
    ) -> None:
        check_qualify(qualify)
        check_exact_merge(exact_merge)
        self.settings: dict[str, Any] = {"linears": linears, "loss": loss, "qualify": qualify}
        self.settings |= {"blocks": blocks, "cast_adapters": cast_adapters}
        self.settings["exact_merge"] = exact_merge

    def state(self) -> dict[str, Any]:
        return super().state() | {"args": self.settings}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"])
        self._report(kwargs["model"], state)
        VerdictLog.on_train_begin(self, args, state, control, **kwargs)

    def _fuse(self, model: nn.Module) -> None:
        if next(lora_layers(model), None) is None:
            raise missing_layers(
                model, "give the trainer a peft_config, or peft.get_peft_model(model, config)"
            )
        fuse(model, **self.settings)


def report_at_first_forward(model: nn.Module) -> None:
    """Print the line of `LayerReport` in the first of torchrun's processes, at the first forward.

    The model may be wrapped until then.
    """
    if os.environ.get("RANK", "0") != "0":
        return

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def report(*_: Any) -> None:
        handle.remove()
        _report(model)

    handle = model.register_forward_pre_hook(report)


def _report(model: nn.Module, said: str | None = None) -> str:
    """Print and return what the model's layers are, and warn if many are left to others.

    said: the text printed before, which is not repeated.
    """
    explanation = explain(model)
    lines = [f"lora_kernels: {explanation.summary()}"]
    for state in (LIBRARY, ADAPTER, PEFT):
        reasons = Counter(row.reason for row in explanation.rows if row.state == state)
        lines += [f"  {n} {state}: {reason}" for reason, n in reasons.most_common(MOST_REASONS)]
    text = "\n".join(lines)
    if text == said:
        return text
    tqdm.write(text)  # above a progress bar, as transformers writes its losses
    left, total = sum(row.state == PEFT for row in explanation.rows), len(explanation.rows)
    if left > MANY_LEFT * total:
        logger.warning(
            "%d of %d LoRA layers are PEFT's, as fast as without lora_kernels: "
            "lora_kernels.peft.explain(model) has the reasons",
            left,
            total,
        )
    for row in explanation.losses:
        if row.state == TORCH:
            logger.warning("%s is transformers' own: %s", row.layer, row.reason)
    return text
