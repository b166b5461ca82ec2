"""The fine-tuning run: train, save, compare with stock PEFT if requested, reload the adapter.

A run writes to --out:

- adapter/: in PEFT's format, with the tokenizer
- trainer_state.json (Trainer's log, with the peak memory), losses.png and the last checkpoints
- adapter.gguf: over a GGUF file, the same adapter for llama.cpp
- layers.txt: the output of `explain`
- run.json: the arguments
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, TrainerState

from ..core.weights import parameter_bytes, share
from ..layers import adaptable_experts
from ..layers.experts import has_quantized_experts
from ..peft import explain, fuse
from ..peft.packed import packed_bytes
from . import model, report
from .chat import IGNORED, ChatData, Collator, check_flattening, read_data
from .checkpoints import (
    find_intact,
    first_line,
    named_write,
    newest_checkpoint,
    steps_done,
    write_folder,
    write_json,
)
from .compare import PIECES, STEP_MEMORY, compare
from .errors import UsageError
from .export import ask_llama_cpp, export_gguf, serving_command
from .inputs import read_inputs
from .lock import FolderLock
from .options import Adapters, Base, Data, Options, Training, check_out, flag, pick, read_json
from .plots import draw_or_explain
from .presets import Preset, add_lora_layers, find_preset
from .report import Progress
from .trainer import (
    PEAK,
    LoRATrainer,
    PeakMemory,
    SpaceCheck,
    losses,
    plot_losses,
    training_arguments,
)

# The options that determine the trained adapter, in addition to the model and the data.
_UNSETTLING = {"gradient_checkpointing", "logging_steps", "save_steps", "save_total_limit"}
_UNSETTLING |= {"report_to", "device"}
SETTLING = [
    field.name
    for group in (Adapters, Data, Training, Base)
    for field in dataclasses.fields(group)
    if field.name not in _UNSETTLING
]
LOGITS_LIMIT = 1e-4  # largest difference / largest logit: fp32 sums in another order, all layers
TEXT = Preset(16, 32, (model.ALL_LINEAR,), 0.0)  # for plain text without --preset
TEXT_PROMPT = "Tell me a story."
ANSWER = 32  # tokens of an answer at most
UNTOUCHED = "the base model's logits, bit for bit ✓"
CHANGED = "other logits than the base model's ✗"


def adapter_settings(options: Options) -> dict[str, Any]:
    """Return the settings of `add_lora_layers`: the preset with the given options, and PEFT's."""
    chosen = find_preset(options.preset or ("chat" if options.has_json else TEXT))
    given = pick(options, "rank alpha dropout") | {"targets": tuple(options.target_modules) or None}
    changes: Any = {name: value for name, value in given.items() if value is not None}
    start = True if options.init == "kaiming" else options.init
    config = {"use_dora": options.dora, "use_rslora": options.rslora, "init_lora_weights": start}
    return {"preset": replace(chosen, **changes), "seed": options.seed, **config}


def finetune(options: Options, controls: Mapping[str, str] | None = None) -> int:
    """Run the recipe; return the exit status of `command.run`.

    controls: questions about something else. Each has a word that the answers before and after the
        training must contain.

    Raises TrainingError if the run cannot learn any more; see `trainer.DeadRunCheck`. Raises
    UsageError if another run holds the folder.
    """
    if not options.dtype:
        device = model.usable_device(options.device)
        options = replace(options, dtype=model.default_dtype(device))
    with FolderLock(options.out) as lock:
        return _finetune(options, controls or {}, lock)


def _finetune(options: Options, controls: Mapping[str, str], lock: FolderLock) -> int:
    console = report.new_console()
    base, adapted, trainer, answers = prepare(options, controls, lock, console)
    with keep_adapter(trainer):
        signum = run_training(trainer, console)
    if signum:
        console.print(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps} and "
            "saved; the same command goes on from there"
        )
        return 128 + signum
    failed = save_and_report(options, adapted, trainer, answers, console)

    data: Any = trainer.train_dataset
    ids = answers.inputs["input_ids"]
    want = logits(model.cast_parameters(adapted, torch.float32), ids)
    del adapted, trainer  # the last references: the memory is free for the comparison
    if options.compare:
        model.cast_parameters(base, model.DTYPES[options.dtype])
        failed += compare_with_stock(base, data, options, console)
    del base  # the last reference: the memory is free for the model that is loaded again
    gc.collect()
    same, line = check_reloaded(options, options.out / "adapter", ids, want)
    console.print(report.facts_table({"loaded again": line}))
    failed += [] if same else ["loaded again"]
    if model.is_gguf(options.model):
        failed += export_run(options, console)
    if failed:
        console.print(f"failed: {'; '.join(failed)}", style="red")
    return 1 if failed else 0


@dataclass
class BaseAnswers:
    """The base model before the training: answers, logits and bytes, without the model itself.

    Attributes:
        inputs: the tokens of the prompt.
        facts: the report's lines on the prompt and the answer.
        ids: the tokens of both, int64 [1, L].
        logits: the base model's for `ids`, [1, L, vocabulary].
        controls: of each control the word, the question's tokens and the answer.
        weights: bytes of the base model's weights.
    """

    inputs: dict[str, Tensor]
    facts: dict[str, str]
    ids: Tensor
    logits: Tensor
    controls: list[tuple[str, dict[str, Tensor], str]]
    weights: int


def prepare(
    options: Options, controls: Mapping[str, str], lock: FolderLock, console: Console
) -> tuple[nn.Module, Any, LoRATrainer, BaseAnswers]:
    """Return the base model, the adapted one on its weights, the trainer, and the base's answers.

    The inputs are checked before --out is locked. Then run.json and layers.txt are written.
    """
    dtype = model.DTYPES[options.dtype]
    lora = adapter_settings(options)
    preset: Preset = lora["preset"]
    run = check_run(options)
    device, tokenizer, _, train = read_inputs(options, preset.targets, preset.rank)
    console.print(str(train.report))
    val = None
    if options.eval_share:
        train, val = train.split(options.eval_share, options.seed)
        console.print(f"{len(val)} of the examples held out")

    how = {"use_cpu": device.type == "cpu"} | options.training | {"disable_tqdm": True}
    args = training_arguments(options.out, **how)
    base = model.load_base(options.model, dtype, device, options.quant)
    prompt = options.prompt or ("" if options.has_json or options.preset else TEXT_PROMPT)
    inputs = first_question(train, tokenizer, prompt, device)
    adapted = add_lora_layers(share(base), **lora)
    collator: Any = Collator.from_tokenizer(tokenizer)
    if options.padding_free:
        check_flattening(adapted)  # before anything is written
        collator = DataCollatorWithFlattening()  # type: ignore[no-untyped-call]
    lock.acquire()
    if args.should_save:  # of several processes the first one
        write_json(options.out / "run.json", run)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = model.identifier(options.model)

    asked = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip()
    seen, answer = ask(base, tokenizer, inputs)
    facts = {"prompt": prompt or asked, "before": answer}
    console.print(report.facts_table(facts))
    plain = logits(base, seen)
    others = [(word, model.question(tokenizer, text, device)) for text, word in controls.items()]
    told = [(word, other, ask(base, tokenizer, other)[1]) for word, other in others]
    answers = BaseAnswers(inputs, facts, seen, plain, told, parameter_bytes(base))

    layers = explain(adapted, x_dtype=torch.bfloat16 if options.bf16 else dtype)
    if args.should_save:
        (options.out / "layers.txt").write_text(f"{layers}\n")
    trainer = LoRATrainer(
        adapted,
        args,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collator,
        processing_class=tokenizer,
        lora_plus_ratio=options.lora_plus or None,
        patience=options.patience or None,
    )
    console.print(trainer.trainable, *model.layer_states(layers), sep="\n")
    return base, adapted, trainer, answers


def ask(asked: Any, tokenizer: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, str]:
    """Return the tokens of the inputs and the answer, int64 [1, L], and the answer's text."""
    tokens = model.decode(asked, inputs, max_new_tokens=ANSWER)
    return torch.cat([inputs["input_ids"], tokens[None]], dim=1), text_of(tokens, tokenizer)


def save_and_report(
    options: Options, adapted: Any, trainer: LoRATrainer, answers: BaseAnswers, console: Console
) -> list[str]:
    """Save the trained adapter, print the report, and return the names of the checks that fail."""
    tokenizer: Any = trainer.processing_class
    # accelerate leaves forward under autocast, in which logits would not be fp32.
    trainer.accelerator.unwrap_model(adapted, keep_fp32_wrapper=False)

    after = ask(adapted, tokenizer, answers.inputs)[1]
    folder = options.out / "adapter"
    if trainer.args.should_save:
        with keep_adapter(trainer), named_write(folder):
            adapted.save_pretrained(str(folder), save_embedding_layers=False)
            tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()  # all processes read what the first one has written
    with adapted.disable_adapter():
        untouched = torch.equal(logits(adapted, answers.ids), answers.logits)
    facts = answers.facts | {"after": after} | summarize_losses(trainer, options.out)
    size, whole = (folder / "adapter_model.safetensors").stat().st_size, answers.weights
    if model.is_gguf(options.model):
        held = packed_bytes(adapted)
        facts["file"] = (
            f"{options.model.name}, {options.model.stat().st_size / 1e6:.1f} MB; in memory "
            f"{whole / 1e6:.1f} MB, {held / 1e6:.1f} MB of it packed"
        )
    facts["adapter"] = (
        f"{folder}, {size / 1e6:.1f} MB beside the model's {whole / 1e6:.1f} MB "
        f"({size / whole:.2%})"
    )
    facts |= describe_memory(trainer.state.log_history, whole, answers.ids.device)
    checked = {"adapter off": (untouched, UNTOUCHED if untouched else CHANGED)}
    if options.expect:
        checked["taught"] = check_taught(options.expect, facts["before"], after)
    for word, other, told in answers.controls:
        kept = check_kept(word, told, ask(adapted, tokenizer, other)[1])
        checked[f"not forgotten: {word}"] = kept
    console.print(report.facts_table(facts | {name: line for name, (_, line) in checked.items()}))
    return [name for name, (ok, _) in checked.items() if not ok]


def export_run(options: Options, console: Console) -> list[str]:
    """Write the adapter for llama.cpp, print how to serve it, and return the checks that fail.

    If llama-cpp-python is installed and an answer is expected, llama.cpp answers too.
    """
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one writes
        return []
    file = options.out / "adapter.gguf"
    try:
        export_gguf(options.model, options.out / "adapter", file)
    except UsageError as error:
        console.print(f"not written for llama.cpp: {error}")
        return []
    failed = []
    if options.expect and find_spec("llama_cpp") is not None:
        said = ask_llama_cpp(options.model, file, options.prompt, ANSWER)
        ok = options.expect in said
        console.print(report.facts_table({"llama.cpp": f"{said} {'✓' if ok else '✗'}"}))
        failed += [] if ok else ["llama.cpp"]
    console.print(f"to serve it: {serving_command(options.model, file)}", soft_wrap=True)
    return failed


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


def text_of(tokens: Tensor, tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def summarize_losses(trainer: LoRATrainer, out: Path) -> dict[str, str]:
    """Save Trainer's log and plot it; return the report's lines on the losses."""
    trainer.save_state()
    picture = "drawn by the first process"
    if trainer.args.should_save:
        picture = draw_or_explain(plot_losses, out / "losses.png", trainer.state.log_history)
    found = list(losses(trainer.state.log_history).values())
    held_out = losses(trainer.state.log_history, "eval_loss")
    n = max(1, min(10, len(found) // 2))
    first, last = mean(found[:n]), mean(found[-n:])
    facts = {"loss": f"{first:.3f} over the first {n} steps, {last:.3f} over the last"}
    if held_out:
        start, best = min(held_out), min(held_out, key=lambda step: held_out[step])
        at_best = f"{held_out[best]:.3f} at best, after step {best}"
        facts["held out"] = f"{held_out[start]:.3f} after step {start}, {at_best}"
    return facts | {"losses": picture}


def describe_memory(
    log: Sequence[Mapping[str, Any]], weights: int, device: torch.device
) -> dict[str, str]:
    """Return the report's line on the peak memory of the training; none if the log has no peak.

    Args:
        log: Trainer's log.
        weights: bytes of the base model's weights.
        device: the device of the training.
    """
    peaks = [line[PEAK] for line in log if PEAK in line]
    if not peaks:  # an earlier version, which logged no peak, trained all steps
        return {}
    if peaks[-1] is None:
        return {"memory": "the system does not report the peak in training"}
    where = "torch on the GPU" if device.type == "cuda" else "the process"
    most = f"{peaks[-1] / 1e6:,.1f} MB at most in training ({where})"
    return {"memory": f"{most}, {weights / 1e6:,.1f} MB of it the model's weights"}


def check_taught(wanted: str, before: str, after: str) -> tuple[bool, str]:
    """Return True if only the answer after training contains `wanted`, and a line of text."""
    if wanted in before:
        return False, f"{wanted!r} was in the answer before ✗"
    if wanted not in after:
        return False, f"{wanted!r} is not in the answer ✗"
    return True, f"{wanted!r} is in the answer, and was not before ✓"


def check_kept(word: str, before: str, after: str) -> tuple[bool, str]:
    """Return True if both answers contain `word`, and a line of text."""
    ok = word in before and word in after
    return ok, f"{after} {'✓' if ok else '✗'} (before: {before})"


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
    got = logits(model.cast_parameters(stock, torch.float32), ids)
    difference, largest = (got - want).abs().max().item(), want.abs().max().item()
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
    run |= pick(given, SETTLING) | given.trainer
    run = dict(json.loads(json.dumps(run)))  # JSON turns tuples into lists
    file = given.out / "run.json"
    earlier = read_json(file, "out") if file.exists() else {}
    if not isinstance(earlier, dict):
        raise UsageError(f"out: {file} is damaged: it holds no arguments; remove it")
    if earlier != run and newest_checkpoint(given.out):
        names = [*run, *(name for name in earlier if name not in run)]
        differing = [n for n in names if earlier.get(n, earlier) != run.get(n, run)]
        raise UsageError(
            f"out: {given.out} holds a run with another {', '.join(map(flag, differing))}; "
            "give the same arguments to go on with it, or another --out"
        )
    return run


def compare_with_stock(
    base: nn.Module, data: ChatData, options: Options, console: Console
) -> list[str]:
    """Print the table of `compare`, and return the rows that fail."""
    lora = adapter_settings(options)
    with report.show_stages(console, "beside stock PEFT", PIECES) as advance:
        size = options.per_device_train_batch_size
        rows = compare(base, data, lora=lora, batch_size=size, advance=advance)
    name = model.display_name(options.model)
    held = f"{options.dtype}, {options.quant} by bitsandbytes" if options.quant else options.dtype
    console.print(report.comparison_table(rows, f"{name}, rank {lora['preset'].rank}, {held}"))
    if not any(row.what == STEP_MEMORY for row in rows):
        console.print(f"{STEP_MEMORY}: the system does not report it")
    for line in report.load_lines(rows):
        console.print(line)
    return [f"{'control: ' * row.control}{row.what}" for row in rows if row.ok is False]


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
    trainer.add_callback(SpaceCheck())
    trainer.add_callback(PeakMemory())  # after `shown`, which may ask for a checkpoint
    with shown.bar, stop_on_signal() as caught:
        shown.caught = caught
        trainer.train(resume_from_checkpoint=checkpoint is not None)
    early = caught and trainer.state.global_step < trainer.state.max_steps
    return signal.Signals(caught[0]) if early else 0


@contextmanager
def keep_adapter(trainer: LoRATrainer) -> Iterator[None]:
    """Add to an OSError, such as that of a full disk, where the adapter is.

    If no checkpoint holds the last step, the adapter is saved alone: in the run's folder, or else
    in the system's temporary folder.
    """
    try:
        yield
    except OSError as error:
        if not (trainer.state.global_step and trainer.args.should_save):
            raise
        raise OSError(f"{error}; {place_of_adapter(trainer)}") from error


def place_of_adapter(trainer: LoRATrainer) -> str:
    """Return a sentence on where the adapter of the last step is, after it was saved there."""
    out, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
    checkpoint, damaged = find_intact(out)
    rest = f"; the same command goes on from {checkpoint}" if checkpoint else ""
    if checkpoint and steps_done(checkpoint) == step:
        return f"{checkpoint} holds the adapter of step {step}; the same command goes on from it"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # only all processes can save it
        return f"the adapter of step {step} is lost{rest}"
    for path in damaged:
        if steps_done(path) == step:  # the bytes that were written may be all that was free
            shutil.rmtree(path, ignore_errors=True)
    adapted: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    reason = ""
    for parent in (out, None):
        try:
            place = parent or Path(tempfile.mkdtemp(prefix="lora-kernels-"))
            folder = place / f"adapter-step-{step}"
            with write_folder(folder) as partial:
                adapted.save_pretrained(str(partial), save_embedding_layers=False)
            return f"the adapter of step {step} is in {folder}{rest}"
        except OSError as error:
            reason = first_line(error)
    return f"the adapter of step {step} is lost: {reason}{rest}"


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
    training = m.training
    out: Tensor = m.eval()(input_ids=ids).logits
    m.train(training)
    return out
