"""The whole run: compare with stock PEFT, train, save the adapter, load it again.

What --out holds afterwards: adapter/ (PEFT's format), loss.png, losses.json, compare.json,
layers.txt (what is fused, and why), run.json (the arguments) and the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn

from ..peft import explain, fuse
from . import UsageError, model, report
from .compare import Row, compare
from .data import batch, token_blocks
from .options import ChatOptions, Options, flag
from .train import newest_checkpoint, save_adapter, steps_done, train

# The arguments that settle the trained adapter, beside the model and the text.
SETTLING = (
    "rank", "alpha", "dropout", "target_modules",
    "batch", "seq_len", "steps", "lr", "dtype", "quant", "seed",
)  # fmt: skip
LOGITS_LIMIT = 1e-4  # largest difference over largest logit; fp32 products reordered, all layers


def finetune(options: Options) -> int:
    """Run it; returns the exit status that `command.run` documents."""
    console = Console(markup=False, highlight=False)  # answers hold brackets of their own
    device = model.usable_device(options.device)
    dtype = model.DTYPES[options.dtype]
    prepare_out(options)

    tokenizer = model.load_tokenizer(options.model)
    blocks = token_blocks(options.data, tokenizer, options.seq_len).to(device)
    console.print(f"text: {blocks.numel():,} tokens in blocks of {options.seq_len}")
    base = model.load_base(options.model, dtype, device, options.quant)
    model.check_targets(base, options.target_modules)

    rows, peft_losses = comparison(base, blocks, options, console) if options.compare else ([], [])

    fused = fuse(model.add_adapters(base, **options.lora, seed=options.seed))
    before = model.answer(fused, tokenizer, options.prompt)  # B is zero: the base model's
    trainable, total = fused.get_nb_trainable_parameters()
    console.print(f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    layers = explain(fused, x_dtype=dtype)
    (options.out / "layers.txt").write_text(f"{layers}\n")
    for line in model.layer_states(layers):
        console.print(line)

    losses, signum = training(fused, blocks, options, console)
    if len(losses) < options.steps:
        console.print(
            f"stopped after step {len(losses)} of {options.steps} and saved; "
            "the same command goes on from there"
        )
        return 128 + signum

    after = model.answer(fused, tokenizer, options.prompt)
    adapter = options.out / "adapter"
    save_adapter(fused, adapter)
    write_json(options.out / "losses.json", {"fused": losses, "peft": peft_losses})
    name = model.display_name(options.model)
    png = options.out / "loss.png"
    report.plot_losses(png, f"{name}, LoRA rank {options.rank}", losses, peft_losses)

    # In fp32 whatever the run's dtype, so that one limit holds: the weights are the run's.
    ids = batch(blocks, 0, 1, options.seed)
    want = logits(fused, ids)
    model_bytes = model.parameter_bytes(base)
    del base, fused
    gc.collect()
    same, said = loaded_again(options, adapter, ids, want)

    n = max(1, min(10, len(losses) // 2))
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    facts = {
        "prompt": options.prompt,
        "before": before,
        "after": after,
        "loss": f"{mean(losses[:n]):.3f} over the first {n} steps, {mean(losses[-n:]):.3f} over "
        "the last",
    }
    if peft_losses:
        gap = max(abs(f - p) for f, p in zip(losses, peft_losses, strict=False))
        facts["losses"] = f"at most {gap:.2g} from stock PEFT's over {len(peft_losses)} steps" + (
            ", whose dropout masks are other ones" if options.dropout else ""
        )
    facts |= {
        "curves": str(png),
        "adapter": f"{adapter}, {adapter_bytes / 1e6:.1f} MB beside the model's "
        f"{model_bytes / 1e6:.1f} MB ({adapter_bytes / model_bytes:.2%})",
        "loaded again": said,
    }
    console.print(report.facts(facts))
    failed = [row.what for row in rows if row.ok is False] + ["loaded again"] * (not same)
    if failed:
        console.print(f"failed: {'; '.join(failed)}", style="red")
    return 1 if failed else 0


def loaded_again(
    options: Options | ChatOptions, adapter: Path, ids: Tensor, want: Tensor
) -> tuple[bool, str]:
    """Whether the saved adapter in stock PEFT on a fresh base gives the logits wanted, in fp32."""
    dtype = model.DTYPES[options.dtype]
    base = model.load_base(options.model, dtype, want.device, options.quant)
    stock = PeftModel.from_pretrained(base, str(adapter), torch_device=str(want.device))
    difference, largest = (logits(stock, ids) - want).abs().max().item(), want.abs().max().item()
    same = difference <= LOGITS_LIMIT * largest
    return same, (
        f"in stock PEFT: logits differ by at most {difference:.2g}, the largest is {largest:.3g} "
        f"{'✓' if same else '✗'}"
    )


def prepare_out(options: Options | ChatOptions, settling: Sequence[str] = SETTLING) -> None:
    """Make --out; refuse one that holds a checkpoint of a run with other arguments."""
    text = hashlib.sha256()
    for file in options.data:
        text.update(file.read_bytes())
    settled = {name: getattr(options, name) for name in settling}
    run = {"model": str(options.model.resolve()), "data": text.hexdigest(), **settled}
    run = json.loads(json.dumps(run))  # tuples become what they are when read back
    file = options.out / "run.json"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(file.read_text()) if file.exists() else None
    except OSError as error:
        raise UsageError(f"--out: {error}; give a folder that can be written") from None
    if earlier == run:
        return
    if newest_checkpoint(options.out):
        differing = [name for name in run if earlier is None or run[name] != earlier.get(name)]
        raise UsageError(
            f"--out: {options.out} holds a run with another {', '.join(map(flag, differing))}; "
            "give the same arguments to go on with it, or another --out"
        )
    (options.out / "compare.json").unlink(missing_ok=True)
    write_json(file, run)


def comparison(
    base: nn.Module, blocks: Tensor, options: Options, console: Console
) -> tuple[list[Row], list[float]]:
    """The proof table, printed, and stock PEFT's training losses; done once for a run."""
    results = options.out / "compare.json"
    if results.exists():
        saved = json.loads(results.read_text())
        rows, losses = [Row(**row) for row in saved["rows"]], saved["peft_losses"]
    else:
        rows = compare(
            base,
            blocks,
            lora=options.lora,
            batch_size=options.batch,
            seed=options.seed,
            sgd_steps=options.sgd_steps,
            timed_steps=options.timed_steps,
            on_stage=lambda stage: console.print(f"comparing with stock PEFT: {stage}"),
        )
        steps = min(options.peft_steps, options.steps)
        stock = model.add_adapters(base, **options.lora, seed=options.seed)
        with report.progress(console, "stock PEFT", steps, 0, options.tokens_per_step) as on_step:
            losses = train(
                stock, blocks, **options.loop, stop=lambda done: done >= steps, on_step=on_step
            )
        write_json(results, {"rows": [dataclasses.asdict(r) for r in rows], "peft_losses": losses})
    name = model.display_name(options.model)
    held = f"{options.dtype}, {options.quant} by bitsandbytes" if options.quant else options.dtype
    console.print(report.comparison(rows, f"{name}, rank {options.rank}, {held}"))
    return rows, losses


def training(
    fused: Any, blocks: Tensor, options: Options, console: Console
) -> tuple[list[float], int]:
    """The losses of all steps done, and the signal that ended them early, or 0."""
    checkpoint = newest_checkpoint(options.out)
    done = steps_done(checkpoint) if checkpoint else 0
    if done:
        console.print(f"going on after step {done} of {options.steps}")
    bar = report.progress(console, "fused", options.steps, done, options.tokens_per_step)
    with stop_on_signal() as caught, bar as on_step:
        losses = train(
            fused,
            blocks,
            **options.loop,
            out=options.out,
            save_every=options.save_every,
            stop=lambda done: bool(caught),
            on_step=on_step,
        )
    return losses, caught[0] if caught else 0


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Yields a list that SIGINT and SIGTERM are noted in; a second one acts as usual."""
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


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(file)
