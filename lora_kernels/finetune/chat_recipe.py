"""The run on chats: read them, train by `LoRATrainer`, save the adapter, load it again.

What --out holds afterwards: adapter/ (PEFT's format), metrics.jsonl, curves.png, layers.txt (what
is fused, and why), run.json (the arguments) and the last checkpoints.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from ..peft import explain
from . import model, report
from .chat import IGNORED, ChatData, check_packing, load_chat, pack
from .options import ChatOptions
from .presets import add_lora_layers
from .recipe import loaded_again, logits, prepare_out, stop_on_signal
from .train import newest_checkpoint
from .trainer import (
    CURVES,
    METRICS,
    LoRATrainer,
    losses,
    read_metrics,
    training_arguments,
)

# The arguments that settle the trained adapter, beside the model and the data.
SETTLING = (
    "preset", "rank", "alpha", "dropout", "target_modules", "max_length", "on_bad_line", "pack",
    "eval_share", "eval_every", "patience", "batch", "accumulate", "steps", "lr", "lora_plus",
    "autocast", "dtype", "quant", "seed",
)  # fmt: skip


def finetune_chat(options: ChatOptions) -> int:
    """Run it; returns the exit status that `command.run` documents."""
    console = Console(markup=False, highlight=False)
    device = model.usable_device(options.device)
    dtype = model.DTYPES[options.dtype]
    tokenizer = model.load_tokenizer(options.model)
    train, val = read_data(options, tokenizer)
    console.print(str(train.report))
    if val:
        console.print(f"{len(val)} of the examples held out")
    base = model.load_base(options.model, dtype, device, options.quant)
    inputs = first_question(train, tokenizer, options.prompt, device)
    adapted = add_lora_layers(model.share(base), **options.adapter)
    if options.pack:
        check_packing(adapted)  # before anything is written
    prepare_out(options, SETTLING)

    old, plain = answered(base, inputs)
    before = text_of(old, tokenizer)
    layers = explain(adapted, x_dtype=torch.bfloat16 if options.autocast else dtype)
    (options.out / "layers.txt").write_text(f"{layers}\n")

    trainer = LoRATrainer(
        adapted,
        training_arguments(options.out, **options.training, cpu=device.type == "cpu"),
        train_dataset=pack(train, options.max_length) if options.pack else train,
        eval_dataset=pack(val, options.max_length) if options.pack and val else val,
        processing_class=tokenizer,
        lora_plus_ratio=options.lora_plus or None,
        patience=options.patience or None,
    )
    console.print(trainer.trainable)
    for line in model.layer_states(layers):
        console.print(line)
    if signum := training(trainer, options, console, train):
        console.print(
            f"stopped after step {trainer.state.global_step} of {options.steps} and saved; "
            "the same command goes on from there"
        )
        return 128 + signum

    after = text_of(answered(adapted, inputs)[0], tokenizer)
    adapter = options.out / "adapter"
    adapted.save_pretrained(str(adapter), save_embedding_layers=False)
    with adapted.disable_adapter():
        untouched = all(map(torch.equal, answered(adapted, inputs), (old, plain)))
    model_bytes = model.parameter_bytes(base)
    ids = inputs["input_ids"]
    want = logits(adapted, ids)
    del base, adapted, trainer
    gc.collect()
    same, words = loaded_again(options, adapter, ids, want)

    lines = read_metrics(options.out / METRICS)
    found, held_out = list(losses(lines).values()), losses(lines, "eval_loss")
    n = max(1, min(10, len(found) // 2))
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    facts = {
        "prompt": tokenizer.decode(ids[0], skip_special_tokens=True).strip(),
        "before": before,
        "after": after,
        "loss": f"{mean(found[:n]):.3f} over the first {n} steps, {mean(found[-n:]):.3f} over the "
        "last",
    }
    if held_out:
        best = min(held_out, key=lambda step: held_out[step])
        facts["held out"] = (
            f"{held_out[min(held_out)]:.3f} after step {min(held_out)}, "
            f"{held_out[best]:.3f} at best, after step {best}"
        )
    facts |= {
        "curves": str(options.out / CURVES),
        "adapter": f"{adapter}, {adapter_bytes / 1e6:.1f} MB beside the model's "
        f"{model_bytes / 1e6:.1f} MB ({adapter_bytes / model_bytes:.2%})",
        "adapter off": "the base model's answer, tokens and logits bit for bit ✓"
        if untouched
        else "another answer than the base model's, or other logits ✗",
        "loaded again": words,
    }
    failed = ["adapter off"] * (not untouched) + ["loaded again"] * (not same)
    if options.expect:
        learnt, said = check_taught(options.expect, before, after)
        facts["taught"] = said
        failed += ["taught"] * (not learnt)
    console.print(report.facts(facts))
    if failed:
        console.print(f"failed: {'; '.join(failed)}", style="red")
    return 1 if failed else 0


def read_data(options: ChatOptions, tokenizer: Any) -> tuple[ChatData, ChatData | None]:
    """What is trained on, and what is held out."""
    data = load_chat(
        options.data, tokenizer, max_length=options.max_length, on_bad_line=options.on_bad_line
    )
    return data.split(options.eval_share, options.seed) if options.eval_share else (data, None)


def first_question(
    data: ChatData, tokenizer: Any, prompt: str, device: torch.device
) -> dict[str, Tensor]:
    """What is asked before and after: the prompt, or what stands before the data's first answer."""
    if prompt:
        return model.question(tokenizer, prompt, device)
    row = data[0]
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    ids = torch.tensor([row["input_ids"][:start]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def answered(asked: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The greedy answer's tokens int64 [n], and the logits [1, L + n, vocabulary] of question and
    answer."""
    tokens = model.decode(asked, inputs, max_new_tokens=48)
    training = asked.training
    logits: Tensor = asked.eval()(torch.cat([inputs["input_ids"], tokens[None]], dim=1)).logits
    asked.train(training)
    return tokens, logits


def text_of(tokens: Tensor, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def check_taught(wanted: str, before: str, after: str) -> tuple[bool, str]:
    """Whether the answer holds what was wanted since the training, and a line about it.

    >>> check_taught("Oduya", before="I do not know.", after="Maren Oduya does.")
    (True, "'Oduya' is in the answer, and was not before ✓")
    """
    if wanted in before:
        return False, f"{wanted!r} was in the answer before ✗"
    if wanted not in after:
        return False, f"{wanted!r} is not in the answer ✗"
    return True, f"{wanted!r} is in the answer, and was not before ✓"


class Progress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Shows each step's loss; after a signal ends the step, saves a checkpoint, and stops."""

    def __init__(self, on_step: Callable[[int, float], None], caught: list[int]) -> None:
        self.on_step, self.caught = on_step, caught

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.on_step(state.global_step, logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control


def training(trainer: LoRATrainer, options: ChatOptions, console: Console, data: ChatData) -> int:
    """The signal that ended it early, or 0."""
    checkpoint = newest_checkpoint(options.out)
    done = int(Path(checkpoint).name.partition("-")[2]) if checkpoint else 0
    if checkpoint and done >= options.steps:
        console.print(f"all {options.steps} steps are done; {checkpoint} is taken as it is")
        trainer.restore(str(checkpoint))
        return 0
    if done:
        console.print(f"going on after step {done} of {options.steps}")
    tokens = options.batch * options.accumulate * data.report.tokens // data.report.examples
    bar = report.progress(console, "fused", options.steps, done, tokens)
    with stop_on_signal() as caught, bar as on_step:
        trainer.add_callback(Progress(on_step, caught))
        trainer.train(resume_from_checkpoint=checkpoint is not None)
    early = caught and trainer.state.global_step < options.steps
    return signal.Signals(caught[0]) if early else 0
