"""`FuseCallback`: a callback that fuses the LoRA layers a Trainer trains."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
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
from ..peft.swap import check_qualify, check_tile_rows, lora_layers
from .ranks import RankWatch

MAX_REASONS = 3  # number of printed reasons of a state
MAX_UNFUSED_SHARE = 0.1  # a larger share of layers that run PEFT's forward gives a warning

logger = logging.getLogger("lora_kernels")


class VerdictLog(TrainerCallback, ExportableState):
    """Save the digests of the GPU kernels' verdicts in each checkpoint, and compare on resume.

    If a resumed run follows other verdicts, a warning is logged: its losses differ in their last
    digits.

    >>> VerdictLog().state()
    {'args': {}, 'attributes': {'verdicts': {}}}
    """

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"verdicts": verdicts.digests()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer saves the state of each callback under its name. A checkpoint of a run without
        # this callback has no such entry.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if not (state.global_step and state.is_world_process_zero):
            return
        saved_digests, digests = saved["attributes"]["verdicts"], verdicts.digests()
        if saved_digests != digests:
            logger.warning(
                "the qualification of our GPU kernels changed since the checkpoint: %s, now %s",
                saved_digests,
                digests,
            )


class LayerReport(TrainerCallback):
    """Print how the LoRA layers will be computed, after accelerate has wrapped the model.

    DDP, FSDP and DeepSpeed may change a model so that its layers run PEFT's forward, as FSDP1 does.
    The main process prints a line, and one for each reason why layers are not "our kernels". More
    than a tenth of the layers left to PEFT, and a loss left to transformers, are warnings of the
    logger "lora_kernels".
    """

    _last_report: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(kwargs["model"], state)

    def _report(self, model: nn.Module, state: Any) -> None:
        if state.is_world_process_zero:
            self._last_report = _report(model, self._last_report)


class FuseCallback(LayerReport, VerdictLog):
    """Fuse the LoRA layers of the model that transformers' Trainer, or any trainer of TRL, trains.

    `fuse` runs at the end of the trainer's `__init__`, after TRL has added the adapters of its
    `peft_config` and before accelerate wraps the model. It runs again when training starts, for
    layers that were adapted in between. Loading, resuming, evaluation and merging do not change.

    Before the first step the main process prints how many layers are in each state of `explain`:
    "our kernels", "our library GEMMs", "adapter only" and "PEFT's". It prints the reasons of the
    last three. If more than a tenth of the layers are "PEFT's", the logger "lora_kernels" warns
    once.

    Args:
        linears, loss, qualify, blocks, cast_adapters, exact_merge, mlp_tile_rows: as `fuse`'s.
        differing_ranks: what to do if processes that train one adapter together hold different
            values of it: "warn", once for each kind of fault, "raise" RuntimeError in all, or None
            for no comparison. They compare the adapters when `fuse` runs, the gradients before the
            first two optimizer steps, and the parameters at each save, where the saved file is
            compared with the model too.

    Raises ValueError if `qualify`, `exact_merge`, `mlp_tile_rows` or `differing_ranks` has another
    value. The trainer's `__init__` raises ValueError if the model has no LoRA layers, or a layer
    whose base `exact_merge` cannot copy.

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
        mlp_tile_rows: int | str | None = None,
        differing_ranks: str | None = "warn",
    ) -> None:
        check_qualify(qualify)
        check_exact_merge(exact_merge)
        check_tile_rows(mlp_tile_rows)
        self.settings: dict[str, Any] = {"linears": linears, "loss": loss, "qualify": qualify}
        self.settings |= {"blocks": blocks, "cast_adapters": cast_adapters}
        self.settings |= {"exact_merge": exact_merge, "mlp_tile_rows": mlp_tile_rows}
        self._watch = RankWatch(differing_ranks)

    def state(self) -> dict[str, Any]:
        settings = self.settings | {"differing_ranks": self._watch.action}
        return super().state() | {"args": settings}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"])
        self._watch.compare_initial(kwargs["model"], args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._fuse(kwargs["model"])
        self._report(kwargs["model"], state)
        self._watch.begin(kwargs["model"])
        VerdictLog.on_train_begin(self, args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.compare_gradients(kwargs["model"], args)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._watch.compare_saved(kwargs["model"], args, folder)

    def _fuse(self, model: nn.Module) -> None:
        if next(lora_layers(model), None) is None:
            raise missing_layers(
                model, "give the trainer a peft_config, or peft.get_peft_model(model, config)"
            )
        fuse(model, **self.settings)


def report_at_first_forward(model: nn.Module) -> None:
    """Print the summary of `LayerReport` at the model's first forward, in torchrun's rank 0.

    The model may be wrapped before its first forward.
    """
    if os.environ.get("RANK", "0") != "0":
        return

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def report(*_: Any) -> None:
        handle.remove()
        _report(model)

    handle = model.register_forward_pre_hook(report)


def _report(model: nn.Module, last_report: str | None = None) -> str:
    """Print and return a summary of the layers' states, and warn if many layers are not fused.

    last_report: the last printed summary. An equal one is not printed again.
    """
    explanation = explain(model)
    lines = [f"lora_kernels: {explanation.summary()}"]
    for state in (LIBRARY, ADAPTER, PEFT):
        reasons = Counter(row.reason for row in explanation.rows if row.state == state)
        lines += [f"  {n} {state}: {reason}" for reason, n in reasons.most_common(MAX_REASONS)]
    text = "\n".join(lines)
    if text == last_report:
        return text
    tqdm.write(text)  # above a progress bar, as transformers writes its losses
    unfused, total = sum(row.state == PEFT for row in explanation.rows), len(explanation.rows)
    if unfused > MAX_UNFUSED_SHARE * total:
        logger.warning(
            "%d of %d LoRA layers are PEFT's, as fast as without lora_kernels: "
            "lora_kernels.peft.explain(model) has the reasons",
            unfused,
            total,
        )
    for row in explanation.losses:
        if row.state == TORCH:
            logger.warning("%s is transformers' own: %s", row.layer, row.reason)
    return text
