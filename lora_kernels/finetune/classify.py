"""Compare full fine-tuning, LoRA and its variants on text classification.

Each method trains from the same seeds on the same batches. It has a process of its own, because
its peak memory is measured.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..bench import process_memory
from ..core.quiet import silence_libraries
from ..peft.quantize import classifier, quantize
from .checkpoints import named_write
from .errors import UsageError
from .labelled import Labelled
from .methods import METHODS, Method
from .model import adapters, load_float32, load_tokenizer, usable_device
from .options import pick
from .presets import Preset, add_lora_layers
from .rank import WARMUP, Allocate, add_adalora
from .trainer import DeadRunCheck, LoRATrainer, losses, training_arguments

_RENAMED = "train_sampling_strategy" in {f.name for f in dataclasses.fields(TrainingArguments)}
# Texts of similar length in a batch need less padding.
GROUPED: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"} if _RENAMED else {"group_by_length": True}
)


@dataclass(frozen=True)
class Task:
    """The model, data and settings that all methods share.

    model: a transformers model folder.
    """

    model: str | Path
    train: Labelled
    held_out: Labelled
    steps: int = 100
    batch: int = 16
    max_length: int = 64
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """The results of one training run.

    Attributes:
        score: the accuracy on held-out texts.
        loss: the mean training loss of the last ten steps.
        step_seconds: the median of the steps after warm-up.
        trainable: the number of trainable parameters.
        saved_bytes: the size of the saved parameters.
        peak_memory: in bytes, None if the system does not report it.
    """

    seed: int
    score: float
    loss: float
    step_seconds: float
    trainable: int
    saved_bytes: int
    peak_memory: int | None


@dataclass(frozen=True)
class Outcome:
    """The runs of a method, one for each seed.

    The peak memory is that of the first run, because the others include memory that it leaks.
    """

    name: str
    method: Method
    runs: list[Run] = field(default_factory=list)

    @property
    def score(self) -> float:
        return statistics.mean(run.score for run in self.runs)

    @property
    def spread(self) -> float:
        """The standard deviation of the scores."""
        return statistics.stdev(run.score for run in self.runs) if len(self.runs) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome's row of classification.json."""
        seconds = statistics.median(run.step_seconds for run in self.runs)
        row = pick(self, "name score spread") | {"step_seconds": seconds}
        row |= pick(self.runs[0], "peak_memory trainable saved_bytes")
        row |= pick(self.method, "title lr rank")
        return row | {"runs": [dataclasses.asdict(run) for run in self.runs]}


def compare_methods(
    task: Task,
    methods: Mapping[str, Method] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    on_method: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Train by each method from each seed, with one process for each method in turn.

    A seed determines the initialization of classifier and adapters, the order of texts and dropout.
    Processes are spawned, so a script that calls this needs `if __name__ == "__main__":`.

    Args:
        task: the model, data and settings.
        methods: by name.
        seeds: one run of each method for each seed.
        on_method: called with each outcome.

    Raises UsageError if a model or a device cannot be used, and TrainingError that names the method
    and the step if a run cannot learn any more.
    """
    if not seeds:
        raise UsageError("seeds: got none, want at least one")
    found = []
    spawn = multiprocessing.get_context("spawn")
    for name, method in methods.items():
        with ProcessPoolExecutor(1, spawn, start_process, (torch.get_num_threads(),)) as pool:
            runs = [pool.submit(train_once, task, method, seed).result() for seed in seeds]
        found.append(Outcome(name, method, runs))
        on_method(found[-1])
    return found


def start_process(threads: int) -> None:
    silence_libraries()
    torch.set_num_threads(threads)


def train_once(task: Task, method: Method, seed: int) -> Run:
    """Load the model, train it on the task by the method, and score it."""
    device = usable_device(task.device)
    tokenizer = load_tokenizer(Path(task.model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train, held_out = (encode(part, tokenizer, task) for part in (task.train, task.held_out))
    before = process_memory.reset_peak(device)
    model = build(task, method, seed, tokenizer.pad_token_id)
    settings: dict[str, Any] = {"max_steps": task.steps, "per_device_train_batch_size": task.batch}
    settings |= {"learning_rate": method.lr, "warmup_steps": WARMUP, "seed": seed}
    settings |= {"use_cpu": device.type == "cpu", "disable_tqdm": True}
    settings |= {"save_strategy": "no", "prediction_loss_only": False, **GROUPED}
    clock = Clock()
    parts: Any = {"train_dataset": train, "data_collator": DataCollatorWithPadding(tokenizer)}
    parts["callbacks"] = [clock, DeadRunCheck(f"{method.title}, seed {seed}")]
    parts["callbacks"] += [Allocate()] if method.adalora else []
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, **settings)
        trainer: Any
        if method.rank is None:
            trainer = Trainer(model, args, **parts)
            trainer.remove_callback(PrinterCallback)
        else:
            trainer = LoRATrainer(model, args, **parts, lora_plus_ratio=method.lora_plus)
        process_memory.reset_peak(device)
        trainer.train()
        peak = None if before is None else process_memory.peak(device) - before
        saved = saved_bytes(model, Path(folder))
        said = trainer.predict(held_out)
    return Run(
        seed,
        score=float((said.predictions.argmax(-1) == said.label_ids).mean()),
        loss=statistics.mean(list(losses(trainer.state.log_history).values())[-10:]),
        step_seconds=statistics.median(clock.seconds[len(clock.seconds) // 10 :]),  # after warm-up
        trainable=sum(p.numel() for p in adapters(model).values()),
        saved_bytes=saved,
        peak_memory=peak,
    )


def build(task: Task, method: Method, seed: int, pad_token_id: int | None) -> Any:
    """Return the model with a new classifier, and the method's adapters or frozen parameters."""
    device = usable_device(task.device)
    torch.manual_seed(seed)
    model: Any = load_float32(
        AutoModelForSequenceClassification, Path(task.model), num_labels=len(task.train.names)
    )
    for t in (*model.parameters(), *model.buffers()):
        t.data = t.data.clone()  # a view would keep the whole file in memory
    model.config.pad_token_id = pad_token_id  # locates a causal model's last token
    model.to(device)
    if method.frozen:
        model.requires_grad_(False)
        head: Any = classifier(model)
        head.requires_grad_(True)
    if method.rank is None:
        return model
    if method.quant:
        quantize(model, method.quant, torch.float32, device)
    preset = Preset(method.rank, method.alpha, ("all-linear",), 0.0)
    config: dict[str, Any] = {"task_type": "SEQ_CLS", "seed": seed}
    if method.adalora:
        return add_adalora(model, preset, task.steps, **config)
    return add_lora_layers(model, preset, use_dora=method.dora, **config)


def saved_bytes(model: Any, folder: Path) -> int:
    """Return the size of a file with the trained parameters, in PEFT's format for adapters."""
    with named_write(folder):
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            trained = {name: p.detach().contiguous() for name, p in adapters(model).items()}
            save_file(trained, folder / "model.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def encode(data: Labelled, tokenizer: Any, task: Task) -> list[dict[str, Any]]:
    """Tokenize the texts to rows for the collator, truncated to the task's max_length."""
    ids = tokenizer(list(data.texts), truncation=True, max_length=task.max_length)["input_ids"]
    return [
        {"input_ids": row, "labels": label} for row, label in zip(ids, data.labels, strict=True)
    ]


class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Record the seconds of each step: forward, backward, optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.get_device_module(args.device).synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.get_device_module(args.device).synchronize()
        self.seconds.append(time.perf_counter() - self.start)
