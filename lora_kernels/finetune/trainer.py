"""`LoRATrainer`: transformers' Trainer for fused adapters."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType, TrainOutput

from ..bench import process_memory
from ..integrations.trainer import VerdictLog
from ..peft import fuse
from .chat import IGNORED, ChatData, Collator, check_flattening
from .checkpoints import (
    STATE,
    check_free,
    checkpoints,
    count_more,
    find_intact,
    named_write,
    newest_checkpoint,
    translate_errors,
)
from .errors import TrainingError, UsageError
from .model import adapters
from .options import SHORT, check_numbers
from .plots import draw_png
from .report import Progress, new_console

DEAD_STEPS = 10  # steps in a row without a gradient, after which a run stops
PEAK = "train_peak_memory"  # key of `PeakMemory` in Trainer's log


_THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}
# transformers 5 warns if its earlier names of these settings are used.
_HAS_SHARES_IN_STEPS = int(transformers.__version__.partition(".")[0]) >= 5
_RECOMPUTING = "activation_checkpointing"
if _RECOMPUTING not in _THEIRS:
    _RECOMPUTING = "gradient_checkpointing"
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_steps": 50,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": [],
    "prediction_loss_only": True,
    "remove_unused_columns": False,
}


def training_arguments(out: str | Path, **settings: Any) -> TrainingArguments:
    """Return transformers' `TrainingArguments` with common settings for LoRA.

    The defaults are `DEFAULTS`: AdamW without weight decay, with cosine decay without warm-up. Each
    step's loss is logged, including NaN. Nothing is reported to services. `LoRATrainer` shows its
    progress unless disable_tqdm is True.

    Args:
        out: folder of the checkpoints.
        settings: fields of `TrainingArguments`. With eval_steps, evaluation is by steps.
            warmup_steps below 1 is a share of the steps, in earlier transformers too. The default
            of per_device_eval_batch_size is that of training.

    Raises UsageError that names the argument.

    >>> from lora_kernels.finetune.trainer import training_arguments
    >>> training_arguments("out", gradient_accumulation_steps=8, use_cpu=True).learning_rate
    0.0002
    """
    for name in settings.keys() - _THEIRS:
        if full := SHORT.get(name):
            raise UsageError(f"{name}: want {full}, the field of TrainingArguments")
        if name != "gradient_checkpointing":
            close = difflib.get_close_matches(name, _THEIRS, 1) or ["a field of TrainingArguments"]
            raise UsageError(f"{name}: no such setting; did you mean {close[0]}?")
    unset = {n for n in ("max_steps", "num_train_epochs", "eval_steps") if settings.get(n) is None}
    arguments = DEFAULTS | {name: v for name, v in settings.items() if name not in unset}
    check_numbers(arguments, max_steps="any")
    kinds, kind = [kind.value for kind in SchedulerType], arguments["lr_scheduler_type"]
    if kind not in kinds:
        raise UsageError(f"lr_scheduler_type: got {kind!r}, want one of {', '.join(kinds)}")
    warmup = arguments.get("warmup_steps", 0)
    if kind == "constant" and warmup:
        arguments["lr_scheduler_type"] = "constant_with_warmup"  # "constant" ignores warm-up
    if warmup < 1 and not _HAS_SHARES_IN_STEPS:
        arguments |= {"warmup_ratio": warmup, "warmup_steps": 0}
    if arguments.pop("gradient_checkpointing", False):
        arguments = {f"{_RECOMPUTING}_kwargs": {"use_reentrant": False}} | arguments
        arguments[_RECOMPUTING] = True
    batch = arguments["per_device_train_batch_size"]
    by_steps = "steps" if "eval_steps" in arguments else "no"
    arguments = {"eval_strategy": by_steps, "per_device_eval_batch_size": batch} | arguments
    with translate_errors("training arguments", ValueError, TypeError):
        return TrainingArguments(**{"output_dir": str(out)} | arguments)


class LoRATrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """transformers' Trainer for the adapters of a PEFT model, with fused layers.

    If the process is killed at any moment, `train(resume_from_checkpoint=True)` goes on from the
    last complete checkpoint. The trainer shows a progress bar, or without a terminal ten lines.

    Args:
        model: a PEFT model, which is fused. Only adapters and `modules_to_save` may be trainable.
        args: the result of `training_arguments`, or other TrainingArguments.
        train_dataset, eval_dataset: `ChatData`, or another dataset for Trainer. The collator
            `DataCollatorWithFlattening` needs a model that passes `check_flattening`.
        lora_plus_ratio: LoRA+, by PEFT's `create_loraplus_optimizer`: the learning rate of lora_B
            divided by lora_A's. None: they are equal.
        patience: the number of evaluations without a lower loss after which training stops and the
            best adapters are restored. Needs eval_steps, and save_steps a multiple of it.
        others: other arguments of Trainer.

    The attribute `trainable` is a sentence with the number of trainable parameters.

    Raises UsageError that names the argument before anything is written. `train` raises
    TrainingError at the first loss that is not finite, and after `DEAD_STEPS` steps without a
    gradient.

    >>> from torch import nn
    >>> from lora_kernels.finetune.trainer import LoRATrainer, training_arguments
    >>> LoRATrainer(nn.Linear(2, 2), training_arguments("out", use_cpu=True), train_dataset=[])
    Traceback (most recent call last):
    lora_kernels.finetune.UsageError: model: got Linear, want a PEFT model; see add_lora_layers
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        lora_plus_ratio: float | None = None,
        patience: int | None = None,
        **others: Any,
    ) -> None:
        self.trainable = check_trainable(model)
        check_numbers({"lora_plus_ratio": lora_plus_ratio})
        if len(train_dataset) == 0:
            raise UsageError("train_dataset: got no row, want at least one")
        self.lora_plus_ratio, self.patience = lora_plus_ratio, patience
        given = list(others.get("callbacks", ()))
        if not any(isinstance(callback, DeadRunCheck) for callback in given):
            given.insert(0, DeadRunCheck())
        others["callbacks"] = [*given, VerdictLog()]
        if patience is not None:
            others["callbacks"].append(_early_stop(args, patience))
        if isinstance(others.get("data_collator"), DataCollatorWithFlattening):
            check_flattening(model)
        if others.get("data_collator") is None and isinstance(train_dataset, ChatData):
            others["data_collator"] = Collator.from_tokenizer(others.get("processing_class"))
        others |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(fuse(model), args, **others)
        # With a KV cache, transformers does not mask attention across examples in one row.
        # transformers 5 disables the cache itself. `generate` has its own setting.
        if hasattr(model, "config"):
            model.config.use_cache = False
        # Both print a dict each step, which Trainer's log has.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not self.args.disable_tqdm:
            self.add_callback(Progress(new_console(), "training"))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does. A resumed run has the losses of an uninterrupted run.

        A checkpoint that cannot be read, such as one whose write was interrupted, is renamed with a
        warning. Training resumes from the checkpoint before it, or from step 0.

        Raises UsageError if the folder has checkpoints and `resume_from_checkpoint` is not given,
        because the runs would mix their checkpoints.
        """
        newest = newest_checkpoint(str(self.args.output_dir))
        if not resume_from_checkpoint and newest is not None and not self.state.global_step:
            raise UsageError(
                f"out: {newest} is there; resume_from_checkpoint=True goes on from it, another "
                "folder starts from step 0"
            )
        going_on = resume_from_checkpoint is True and newest is not None
        if going_on and (newest := self.find_checkpoint()) is None:
            resume_from_checkpoint = None
        elif going_on:
            resume_from_checkpoint = str(newest)
            state = TrainerState.load_from_json(f"{newest}/{STATE}")
            # Trainer would run one more step before it checks that early stopping ended the run.
            saved: Any = (state.stateful_callbacks or {}).get("EarlyStoppingCallback")
            waited = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
            best = state.best_model_checkpoint
            if self.patience and waited >= self.patience and best and Path(best).is_dir():
                self.restore(str(newest))
                return TrainOutput(state.global_step, 0.0, {})
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:  # an error must not leave a bar on the terminal
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Progress):
                    callback.bar.stop()

    def find_checkpoint(self, report: Callable[[str], None] = warnings.warn) -> Path | None:
        """Return the newest checkpoint that can be read, or None. Newer ones are renamed."""
        found, damaged = find_intact(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()  # rename after all processes have read the folder
        for path, reason in damaged.items():
            taken = f"{found} is taken" if found else "training starts from step 0"
            report(f"{path} cannot be read: {reason}; it is renamed, and {taken}")
            if self.args.should_save:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        self.accelerator.wait_for_everyone()
        return found

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None and self.lora_plus_ratio is not None:
            model: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_loraplus_optimizer(
                model,
                cls,
                loraplus_lr_ratio=self.lora_plus_ratio,
                loraplus_lr_embedding=options["lr"],
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return super().create_optimizer(*args, **kwargs)

    # Trainer averages the mean losses of batches, which depends on how rows fall into batches. For
    # batches of tokens with labels, these methods compute the mean over tokens.

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._token_losses = [0.0, 0.0]  # sum and count
        out: Any = super().evaluation_loop(*args, **kwargs)
        counted = torch.tensor(self._token_losses, dtype=torch.float64, device=self.args.device)
        total, count = self.accelerator.reduce(counted, "sum").tolist()
        if count:
            out.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / count
        return out

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result: Any = super().prediction_step(model, inputs, *args, **kwargs)
        if isinstance(self.data_collator, Collator | DataCollatorWithFlattening):
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            self._token_losses[0] += result[0].item() * count
            self._token_losses[1] += count
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as Trainer does, but without PEFT's request to the hub for the base's config."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def restore(self, checkpoint: str) -> None:
        """Load the adapters of a finished run, or its best adapters, without training."""
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def _load_best_model(self) -> None:
        """Load the best adapter; PEFT saves it in a subfolder unless it is named "default"."""
        model: Any = self.model
        name = model.active_adapters[0]
        folder = Path(str(self.state.best_model_checkpoint), name)
        if folder.is_dir():
            model.load_adapter(str(folder), name, is_trainable=True)
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, and name the checkpoint if the disk is full.

        Trainer writes its state last, so a checkpoint with a state is complete.
        """
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)  # of another run
        self.accelerator.wait_for_everyone()
        with named_write(folder):
            super()._save_checkpoint(model, trial)


def check_trainable(model: Any) -> str:
    """Return a sentence with the number of trainable parameters.

    Raises UsageError unless `model` is a PEFT model in which only adapters are trainable.

    >>> from torch import nn
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules="0"))
    >>> print(check_trainable(model))
    trainable: 32 of 104 parameters (30.77%), in 1 adapted layers; the rest is frozen
    """
    if not isinstance(model, PeftModel):
        raise UsageError(
            f"model: got {type(model).__name__}, want a PEFT model; see add_lora_layers"
        )
    prefix = f".{getattr(model.base_model, 'prefix', 'lora_')}"
    trained = list(adapters(model))
    layers = {name.partition(prefix)[0] for name in trained if prefix in name}
    whole = {"modules_to_save", "trainable_tokens_delta"}
    others = [n for n in trained if prefix not in n and not whole & {*n.split(".")}]
    if others:
        raise UsageError(
            f"model: {count_more(others)} would train beside the adapters; freeze the "
            "base, or name what is to train in LoraConfig(modules_to_save=...)"
        )
    if not layers:
        raise UsageError(
            "model: no adapter is trainable; make one with add_lora_layers, or load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    count, total = model.get_nb_trainable_parameters()
    return (
        f"trainable: {count:,} of {total:,} parameters ({count / total:.2%}), in {len(layers)} "
        "adapted layers; the rest is frozen"
    )


def _early_stop(args: TrainingArguments, patience: int) -> TrainerCallback:
    check_numbers({"patience": patience})
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "steps":
        raise UsageError("patience: needs evaluations; give eval_steps and eval_dataset")
    if args.save_steps % (args.eval_steps or 1):
        raise UsageError(
            f"patience: got save_steps {args.save_steps}, want a multiple of eval_steps "
            f"{args.eval_steps}, so that the best model is among the checkpoints"
        )
    args.load_best_model_at_end = args.restore_callback_states_from_checkpoint = True
    args.metric_for_best_model, args.greater_is_better = "eval_loss", False
    return EarlyStoppingCallback(patience)


class DeadRunCheck(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Stop a run that cannot learn any more, with TrainingError.

    Looks at Trainer's log: the first loss that is NaN or infinite, in training or evaluation, and
    `DEAD_STEPS` logged steps in a row in which the norm of all gradients is exactly 0. Trainer logs
    no norm if max_grad_norm is 0; then the losses alone are checked.

    what: named in the error before the step.
    """

    def __init__(self, what: str = "") -> None:
        self.what = f"{what}, " if what else ""
        self.dead = list[int]()  # the last steps, without a gradient

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dead = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        for name, words in (("loss", "the loss"), ("eval_loss", "the held-out loss")):
            value = logs.get(name, 0.0)
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.what}step {state.global_step}: {words} is {value}; "
                    + self._remedy(state.global_step)
                )
        if "grad_norm" not in logs:
            return
        self.dead = [*self.dead, state.global_step] if logs["grad_norm"] == 0 else []
        if len(self.dead) == DEAD_STEPS:
            raise TrainingError(
                f"{self.what}steps {self.dead[0]} to {self.dead[-1]}: every gradient is 0, so that "
                f"nothing is learnt; {self._remedy(self.dead[0])}"
            )

    def _remedy(self, step: int) -> str:
        """Name what to change: before the first update, it is not the learning rate."""
        if step <= 1:
            return (
                "no update came before it, so the learning rate is not at fault: check the base "
                "model's weights and its dtype"
            )
        return "start again with a lower learning rate, in another folder"


class SpaceCheck(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Raise UsageError if the disk has no room for a run's checkpoints and its adapter.

    An optimizer makes its state in its first step. So the adapter's bytes are checked before the
    first step, and the bytes of the whole checkpoints after it.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.has_state = self.check(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.has_state:
            self.check(*args, **kwargs)
            self.has_state = True  # or the optimizer keeps none

    def check(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> bool:
        """Check the bytes that are known by now. Return True if the optimizer has its state."""
        if not args.should_save:
            return True
        adapter = sum(p.nbytes for p in adapters(model).values())
        kept = [t for values in optimizer.state.values() for t in values.values()]
        checkpoint = adapter
        if not args.save_only_model:
            checkpoint += sum(t.nbytes for t in kept if isinstance(t, Tensor))
        out = Path(args.output_dir)
        there = checkpoints(out)
        count = len(there) + _saves_left(args, state)
        wanted = count * checkpoint + adapter
        if args.save_total_limit:  # the oldest one is removed after the newest one is written
            wanted = min(wanted, (args.save_total_limit + 1) * checkpoint)
        wanted -= sum(f.stat().st_size for path in there for f in path.rglob("*") if f.is_file())
        remedy = "give another folder, or keep fewer checkpoints: --save-total-limit"
        check_free(out, wanted, "the run's checkpoints and adapter", remedy)
        return bool(kept)


class PeakMemory(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Log the peak memory of the training so far: at each checkpoint, and at the end.

    The key is `PEAK`, the value in bytes: resident memory of this process, or what torch allocated
    on its GPU. It is None if the system does not report it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_reported = process_memory.reset_peak(args.device) is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # the checkpoint holds the log
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        peak = process_memory.peak(args.device) if self.is_reported else None
        state.log_history.append({PEAK: peak, "step": state.global_step})


def _saves_left(args: TrainingArguments, state: TrainerState) -> int:
    """Return the number of checkpoints that the run has yet to write."""
    if args.save_strategy == "steps":
        return math.ceil(state.max_steps / state.save_steps) - state.global_step // state.save_steps
    if args.save_strategy == "epoch":
        return math.ceil(args.num_train_epochs) - int(state.epoch or 0)
    return 0


def losses(lines: Sequence[dict[str, Any]], name: str = "loss") -> dict[int, float]:
    """Return the losses by step. name: "loss" for training, "eval_loss" for evaluation."""
    return {line["step"]: line[name] for line in lines if name in line}


def plot_losses(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of training loss, evaluation loss and learning rate by step."""
    with draw_png(file, (9, 6.5), nrows=2, sharex=True, height_ratios=(3, 1)) as (upper, lower):
        train, held_out = losses(lines), losses(lines, "eval_loss")
        upper.plot(list(train), list(train.values()), linewidth=3, alpha=0.7, label="training")
        if held_out:
            upper.plot(list(held_out), list(held_out.values()), "o-", label="held out")
        upper.set(ylabel="loss (nats per token)")
        rates = losses(lines, "learning_rate")
        lower.plot(list(rates), list(rates.values()), color="#444444", linewidth=2)
        lower.set(ylabel="learning rate", xlabel="step")
