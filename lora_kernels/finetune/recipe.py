"""The fine-tuning run: compare with stock PEFT if requested, train, save, and reload the adapter.

A run writes to --out:

- adapter/: in PEFT's format, with the tokenizer
- metrics.jsonl, curves.png and the last checkpoints
- layers.txt: the output of `explain`
- run.json: the arguments
- base/: the dense weights of a GGUF file, which PEFT cannot load
- compare.json and loss.png: with --compare
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState

from ..layers import adaptable_experts
from ..layers.experts import has_quantized_experts
from ..peft import explain, fuse
from . import UsageError, model, report
from .chat import IGNORED, ChatData, Collator, check_packing, pack, read_data
from .checkpoints import (
    find_intact,
    named_write,
    newest_checkpoint,
    steps_done,
    write_folder,
    write_json,
)
from .compare import Row, compare
from .inputs import read_inputs
from .lock import FolderLock
from .options import Adapters, Data, Options, Training, check_out, flag, pick, read_json
from .presets import Preset, add_lora_layers, find_preset
from .report import Progress
from .trainer import (
    CURVES,
    METRICS,
    DeadRunCheck,
    LoRATrainer,
    losses,
    plot_metrics,
    read_metrics,
    training_arguments,
)

# The options that determine the trained adapter, in addition to the model and the data.
_UNSETTLING = ("checkpointing", "save_every", "report_to", "device")
SETTLING = [
    field.name
    for group in (Adapters, Data, Training)
    for field in dataclasses.fields(group)
    if field.name not in _UNSETTLING
]
LOGITS_LIMIT = 1e-4  # largest difference / largest logit: fp32 sums in another order, all layers
TEXT = Preset(16, 32, (model.ALL_LINEAR,), 0.0)  # for plain text without --preset
TEXT_PROMPT = "Tell me a story."
UNTOUCHED = "the base model's answer, tokens and logits bit for bit ✓"
CHANGED = "another answer than the base model's, or other logits ✗"


def adapter_settings(options: Options) -> dict[str, Any]:
    """Return the settings of `add_lora_layers`: the preset with the given options, and PEFT's."""
    chosen = find_preset(options.preset or ("chat" if options.has_json else TEXT))
    given = pick(options, "rank alpha dropout") | {"targets": tuple(options.target_modules) or None}
    changes: Any = {name: value for name, value in given.items() if value is not None}
    start = True if options.init == "kaiming" else options.init
    config = {"use_dora": options.dora, "use_rslora": options.rslora, "init_lora_weights": start}
    return {"preset": replace(chosen, **changes), "seed": options.seed, **config}


def finetune(options: Options) -> int:
    """Run the recipe; return the exit status of `command.run`.

    Raises TrainingError if the run cannot learn any more; see `trainer.DeadRunCheck`. Raises
    UsageError if another run holds the folder.
    """
    with FolderLock(options.out) as lock:
        return _finetune(options, lock)


def _finetune(options: Options, lock: FolderLock) -> int:
    console = report.new_console()
    dtype = model.DTYPES[options.dtype]
    lora = adapter_settings(options)
    preset: Preset = lora["preset"]
    run = check_run(options)
    device, tokenizer, length, train = read_inputs(options, preset.targets, preset.rank)
    console.print(str(train.report))
    val = None
    if options.eval_share:
        train, val = train.split(options.eval_share, options.seed)
        console.print(f"{len(val)} of the examples held out")

    base = model.load_base(options.model, dtype, device, options.quant)
    prompt = options.prompt or ("" if options.has_json or options.preset else TEXT_PROMPT)
    inputs = first_question(train, tokenizer, prompt, device)
    adapted = add_lora_layers(model.share(base), **lora)
    rows_of = (lambda data: pack(data, length)) if options.pack else (lambda data: data)
    if options.pack:
        check_packing(adapted)  # before anything is written
    lock.acquire()
    file = options.out / "run.json"
    if not file.exists() or read_json(file, "out") != run:
        (options.out / "compare.json").unlink(missing_ok=True)
        write_json(file, run)
    name_base(options, adapted, base, tokenizer)
    rows, stock_losses = list[Row](), list[float]()
    if options.compare:
        rows, stock_losses = compare_with_stock(base, rows_of(train), options, lora, console)

    old, plain = answer(base, inputs)
    before = text_of(old, tokenizer)
    layers = explain(adapted, x_dtype=torch.bfloat16 if options.autocast else dtype)
    (options.out / "layers.txt").write_text(f"{layers}\n")
    trainer = LoRATrainer(
        adapted,
        training_arguments(
            options.out, **options.training, cpu=device.type == "cpu", disable_tqdm=True
        ),
        train_dataset=rows_of(train),
        eval_dataset=rows_of(val) if val else None,
        processing_class=tokenizer,
        lora_plus_ratio=options.lora_plus or None,
        patience=options.patience or None,
    )
    console.print(trainer.trainable, *model.layer_states(layers), sep="\n")
    if signum := run_training(trainer, console):
        console.print(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps} and "
            "saved; the same command goes on from there"
        )
        return 128 + signum
    # accelerate leaves forward under autocast, in which logits would not be fp32.
    trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)

    after = text_of(answer(adapted, inputs)[0], tokenizer)
    folder = options.out / "adapter"
    with named_write(folder):
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
    with adapted.disable_adapter():
        untouched = all(map(torch.equal, answer(adapted, inputs), (old, plain)))
    model_bytes = model.parameter_bytes(base)
    ids = inputs["input_ids"]
    want = logits(adapted, ids)
    del base, adapted, trainer
    gc.collect()

    asked = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    facts = {"prompt": asked, "before": before, "after": after}
    facts |= summarize_losses(options, preset, stock_losses)
    size = (folder / "adapter_model.safetensors").stat().st_size
    facts["adapter"] = (
        f"{folder}, {size / 1e6:.1f} MB beside the model's {model_bytes / 1e6:.1f} MB "
        f"({size / model_bytes:.2%})"
    )
    checked = {
        "adapter off": (untouched, UNTOUCHED if untouched else CHANGED),
        "loaded again": check_reloaded(options, folder, ids, want),
    }
    if options.expect:
        checked["taught"] = check_taught(options.expect, before, after)
    console.print(report.facts_table(facts | {name: text for name, (_, text) in checked.items()}))
    failed = [row.what for row in rows if row.ok is False]
    failed += [name for name, (ok, _) in checked.items() if not ok]
    if failed:
        console.print(f"failed: {'; '.join(failed)}", style="red")
    return 1 if failed else 0


def first_question(
    data: ChatData, tokenizer: Any, prompt: str, device: torch.device
) -> dict[str, Tensor]:
    """Return the inputs to answer before and after training.

    These are the prompt, or without a prompt the tokens before the first answer in the data.
    """
    if prompt:
        return model.question(tokenizer, prompt, device)
    row = data[0]
    start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    ids = torch.tensor([row["input_ids"][:start]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def answer(asked: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Decode greedily: return tokens int64 [n], and the logits [1, L + n, vocabulary] of the whole.

    asked: the model, whose training mode is restored.
    """
    tokens = model.decode(asked, inputs, max_new_tokens=48)
    training = asked.training
    logits: Tensor = asked.eval()(torch.cat([inputs["input_ids"], tokens[None]], dim=1)).logits
    asked.train(training)
    return tokens, logits


def text_of(tokens: Tensor, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def summarize_losses(options: Options, preset: Preset, stock_losses: list[float]) -> dict[str, str]:
    """Return the report's lines on the losses, and plot them with stock PEFT's, if measured."""
    lines = read_metrics(options.out / METRICS)
    found, held_out = list(losses(lines).values()), losses(lines, "eval_loss")
    n = max(1, min(10, len(found) // 2))
    first, last = mean(found[:n]), mean(found[-n:])
    facts = {"loss": f"{first:.3f} over the first {n} steps, {last:.3f} over the last"}
    if held_out:
        start, best = min(held_out), min(held_out, key=lambda step: held_out[step])
        at_best = f"{held_out[best]:.3f} at best, after step {best}"
        facts["held out"] = f"{held_out[start]:.3f} after step {start}, {at_best}"
    curves = options.out / CURVES
    if stock_losses:
        gap = max(abs(f - p) for f, p in zip(found, stock_losses, strict=False))
        masks = ", whose dropout masks are other ones" if preset.dropout else ""
        facts["losses"] = (
            f"at most {gap:.2g} from stock PEFT's over {len(stock_losses)} steps{masks}"
        )
        curves = options.out / "loss.png"
        title = f"{model.display_name(options.model)}, LoRA rank {preset.rank}"
        plot_metrics(curves, lines, stock_losses, title)
    return facts | {"curves": str(curves)}


def check_taught(wanted: str, before: str, after: str) -> tuple[bool, str]:
    """Return True if only the answer after training contains `wanted`, and a line of text."""
    if wanted in before:
        return False, f"{wanted!r} was in the answer before ✗"
    if wanted not in after:
        return False, f"{wanted!r} is not in the answer ✗"
    return True, f"{wanted!r} is in the answer, and was not before ✓"


def check_reloaded(options: Options, adapter: Path, ids: Tensor, want: Tensor) -> tuple[bool, str]:
    """Return True if stock PEFT with the saved adapter gives the logits `want`, and a line of text.

    The base is loaded again, and the logits are computed in fp32. With 4-bit experts the model is
    fused, because PEFT's own forward is wrong.
    """
    dtype = model.DTYPES[options.dtype]
    base = model.load_base(options.model, dtype, want.device, options.quant)
    with adaptable_experts(base):
        stock = PeftModel.from_pretrained(base, str(adapter), torch_device=str(want.device))
    where = "in stock PEFT"
    if has_quantized_experts(base):
        stock, where = (
            fuse(stock),
            "fused (PEFT's forward is wrong over 4-bit experts)",
        )
    difference, largest = (logits(stock, ids) - want).abs().max().item(), want.abs().max().item()
    if not 0 < largest < math.inf:
        return False, f"the trained model's largest logit is {largest:.3g}: nothing to compare ✗"
    same = difference <= LOGITS_LIMIT * largest
    return same, (
        f"{where}: logits differ by at most {difference:.2g}, the largest is {largest:.3g} "
        f"{'✓' if same else '✗'}"
    )


def check_run(given: Options) -> dict[str, Any]:
    """Return the contents of run.json, without writing it.

    Raises UsageError if --out cannot be written, or holds a checkpoint of a run with other
    arguments.
    """
    check_out(given.out)
    text = hashlib.sha256()
    for file in given.data:
        text.update(read_data(file))
    run = {"model": model.identifier(given.model), "data": text.hexdigest()}
    run = dict(json.loads(json.dumps(run | pick(given, SETTLING))))  # JSON turns tuples into lists
    file = given.out / "run.json"
    earlier = read_json(file, "out") if file.exists() else {}
    if not isinstance(earlier, dict):
        raise UsageError(f"out: {file} is damaged: it holds no arguments; remove it")
    if earlier != run and newest_checkpoint(given.out):
        differing = [name for name in run if name not in earlier or run[name] != earlier[name]]
        raise UsageError(
            f"out: {given.out} holds a run with another {', '.join(map(flag, differing))}; "
            "give the same arguments to go on with it, or another --out"
        )
    find_intact(given.out)
    read_metrics(given.out / METRICS)
    if given.compare and earlier == run:
        read_comparison(given.out)
    return run


def name_base(options: Options, adapted: Any, base: Any, tokenizer: Any) -> None:
    """Set the base model's folder or hub id in the adapter's configuration.

    PEFT cannot load a GGUF file, so its dense weights are written in the run's dtype.
    """
    name = model.identifier(options.model)
    if model.locate(options.model)[1] is not None:
        folder = options.base or options.out / "base"
        name = str(folder.resolve())
        if not folder.exists():
            if options.quant:
                dtype = model.DTYPES[options.dtype]
                base = model.load_base(options.model, dtype, torch.device("cpu"))
            with write_folder(folder) as temporary:
                base.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = name


def compare_with_stock(
    base: nn.Module,
    data: ChatData,
    options: Options,
    lora: dict[str, Any],
    console: Console,
) -> tuple[list[Row], list[float]]:
    """Print the table of `compare`, and return its rows and stock PEFT's losses.

    A run that is continued reads both from compare.json.
    """
    found = read_comparison(options.out)
    if found is None:
        how: Any = pick(options, "sgd_steps timed_steps") | {"batch_size": options.batch}
        how["on_stage"] = lambda stage: console.print(f"comparing with stock PEFT: {stage}")
        rows = compare(base, data, lora=lora, **how)
        stock = add_lora_layers(model.share(base), **lora, fused=False)
        found = rows, train_stock(stock, data, options, console)
        saved = {"rows": [dataclasses.asdict(row) for row in rows], "peft_losses": found[1]}
        write_json(options.out / "compare.json", saved)
    name = model.display_name(options.model)
    held = f"{options.dtype}, {options.quant} by bitsandbytes" if options.quant else options.dtype
    console.print(report.comparison_table(found[0], f"{name}, rank {lora['preset'].rank}, {held}"))
    return found


def read_comparison(out: Path) -> tuple[list[Row], list[float]] | None:
    """Return the comparison of an earlier call of the same command, or None. Raises UsageError."""
    file = out / "compare.json"
    if not file.exists():
        return None
    saved = read_json(file, "out")
    try:
        return [Row(**row) for row in saved["rows"]], [float(loss) for loss in saved["peft_losses"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"out: {file} is damaged: {error!r}; remove it") from None


def train_stock(stock: Any, data: ChatData, options: Options, console: Console) -> list[float]:
    """Train stock PEFT for --peft-steps steps in the same way, and return the losses."""
    if not options.peft_steps:
        return []
    cpu = next(stock.parameters()).device.type == "cpu"
    settings = options.training | {"eval_every": None, "save_strategy": "no", "report_to": []}
    shown = Progress(console, "stock PEFT")
    shown.most = options.peft_steps
    with tempfile.TemporaryDirectory() as folder, shown.bar:
        args = training_arguments(folder, **settings, cpu=cpu, disable_tqdm=True)
        checked = [shown, DeadRunCheck("stock PEFT")]
        trainer: Any = Trainer(stock, args, Collator(0), data, callbacks=checked)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return list(losses(trainer.state.log_history).values())


def run_training(trainer: LoRATrainer, console: Console) -> int:
    """Train or resume, and return the signal that stopped the training early, or 0."""
    checkpoint = trainer.find_checkpoint(partial(console.print, soft_wrap=True))
    if checkpoint:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:
            console.print(f"all {state.max_steps} steps are done; {checkpoint} is taken as it is")
            trainer.restore(str(checkpoint))
            return 0
        console.print(f"going on after step {steps_done(checkpoint)} of {state.max_steps}")
    shown = Progress(console, "fused")
    trainer.add_callback(shown)
    with shown.bar, stop_on_signal() as caught:
        shown.caught = caught
        trainer.train(resume_from_checkpoint=checkpoint is not None)
    early = caught and trainer.state.global_step < trainer.state.max_steps
    return signal.Signals(caught[0]) if early else 0


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yield a list of received SIGINT and SIGTERM. A second signal has its usual effect."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, usual[signal.Signals(signum)])

    usual = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)


@torch.no_grad()
def logits(m: Any, ids: Tensor) -> Tensor:
    model.cast_parameters(m, torch.float32).eval()
    out: Tensor = m(input_ids=ids).logits
    return out
