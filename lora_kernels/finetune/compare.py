"""Compare stock PEFT with the fused model, in one process, on one set of base weights.

Gradients are compared directly, and updates under SGD: a loss curve under AdamW hides a gradient
that is wrong by a factor. Two controls break the fused gradients on purpose, and the comparison
must detect that.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bench import process_memory
from ..bench.timing import TokenClock
from ..core.weights import share
from ..peft import fuse
from ..peft.packed import decode_packed, has_packed
from ..peft.quantize import linears_4bit, rewrite_codes
from .chat import ChatData, Collator
from .errors import TrainingError
from .model import adapters, cast_parameters, decode
from .presets import add_lora_layers
from .provenance import watch_others
from .report import Row

GRADIENT_LIMIT = 1e-4  # relative rms of one adapter's gradient, fp32
UPDATE_LIMIT = 1e-3  # relative rms of one adapter's change over the SGD steps, fp32
SGD_LR, SGD_STEPS = 0.1, 4
ADAPTER_B_STD = 0.02  # a new adapter has B = 0, and then dA = 0 on both sides
ROUNDS = 4  # in which the models are timed in turns, after one that is not counted
MEMORY_ROUNDS = 3  # the smallest counts: on a CPU the peaks of equal steps differ by up to 12 %
# Bytes of a step below which two of them give no ratio. Resident pages are counted in batches: a
# block of known size is seen within 0.3 MB on two cores.
RATIO_BYTES = 1e6
# A row that took less time than this is never marked as under load: Linux accounts CPU time in
# ticks of 10 ms, and may charge several ticks to the wrong process.
JUDGED_SECONDS = 0.5
PROMPT, DECODED = 8, 12  # numbers of tokens
# The calls of `advance` in `compare`.
PIECES = 2 + 2 * SGD_STEPS + 6 * (1 + ROUNDS) + 3 * MEMORY_ROUNDS
STEP_MEMORY = "MB a step adds"

Batch = Mapping[str, Tensor]


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Return ‖got − want‖ / ‖want‖ in float64; NaN if both are 0, which proves nothing."""
    difference = (got.double() - want.double()).norm().item()
    norm = want.double().norm().item()
    return difference / norm if norm else (math.nan if difference == 0 else math.inf)


def largest_rms(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Return the largest relative rms over tensors of the same name; NaN if any is NaN.

    Pairs of zeros, such as the gradients of an expert without a token, do not count. NaN if there
    are no others.
    """
    if got.keys() != want.keys():
        raise ValueError(f"got other names than wanted: {sorted(got.keys() ^ want.keys())}")
    pairs = [(got[name], want[name]) for name in want]
    found = [relative_rms(a, b) for a, b in pairs if bool(a.any()) or bool(b.any())]
    return torch.tensor(found or [math.nan]).max().item()


def draw_batch(
    data: ChatData, step: int, size: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Draw the batch of one step, `size` rows, as determined by (seed, step)."""
    generator = torch.Generator().manual_seed((seed << 16) + step)
    rows = torch.randint(len(data), (size,), generator=generator).tolist()
    return {name: t.to(device) for name, t in Collator(0)([data[i] for i in rows]).items()}


def loss_and_gradients(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch, and the adapters' gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in adapters(model).items()
    }
    return loss.item(), grads


def train_sgd(
    model: nn.Module, batches: list[Batch], advance: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Train by SGD, a step for each batch, and return the change of each adapter."""
    start = {name: p.detach().clone() for name, p in adapters(model).items()}
    optimizer = torch.optim.SGD(adapters(model).values(), lr=SGD_LR)
    for batch in batches:
        loss_and_gradients(model, batch)
        optimizer.step()
        advance()
    return {name: p.detach() - start[name] for name, p in adapters(model).items()}


def build_pair(base: nn.Module, plain: nn.Module, **lora: Any) -> tuple[Any, Any]:
    """Return stock PEFT on `plain` and the fused model on `base`, with the same adapters, B random.

    plain: the base, or its decoded copy if the base has packed weights.
    """
    stock = add_lora_layers(share(plain), **lora, fused=False)
    generator = torch.Generator().manual_seed(lora["seed"])
    for name, p in adapters(stock).items():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(ADAPTER_B_STD * torch.randn(p.shape, generator=generator))
    if plain is base:
        return stock, fuse(share(stock))
    fused = add_lora_layers(share(base), **lora, fused=False)
    with torch.no_grad():
        for name, p in adapters(fused).items():
            p.copy_(stock.get_parameter(name))
    return stock, fuse(fused)


def decoded(base: nn.Module) -> nn.Module:
    """Return the base, or its decoded copy if it has packed weights."""
    return decode_packed(share(base)) if has_packed(base) else base


def compare(
    base: nn.Module,
    data: ChatData,
    *,
    lora: Mapping[str, Any],
    batch_size: int,
    advance: Callable[[str], None] = lambda stage: None,
) -> list[Row]:
    """Compare the adapters `lora` on base, fused and in stock PEFT; return the table's rows.

    The rows are gradients, updates under SGD, time and memory of a step, and the time of a decoded
    token. If the base has packed weights, PEFT's model has decoded ones, which people would load
    for it. There is no row of memory if the system does not report it. Rows of times note the load
    by other programs. Values are compared in fp32; times and memory are measured in the base's
    dtype. Dropout is off, because PEFT draws other masks.

    Args:
        base: the frozen model.
        data: the rows to draw batches from.
        lora: settings of `add_lora_layers`; the seed also determines the batches.
        batch_size: rows of a batch.
        advance: called with the name of the stage after each of `PIECES` pieces of the work.

    Raises TrainingError if stock PEFT's first loss is not finite, or its gradients are all 0.
    """
    lora = {**lora, "dropout": 0.0}
    weight = next(base.parameters())
    batches: list[Batch] = [
        draw_batch(data, step, batch_size, lora["seed"], weight.device) for step in range(SGD_STEPS)
    ]
    fp32 = weight.dtype is torch.float32
    base32 = base if fp32 else cast_parameters(copy.deepcopy(base), torch.float32)
    plain = decoded(base32)
    stock, fused = build_pair(base32, plain, **lora)
    loss, want = loss_and_gradients(stock, batches[0])
    if not math.isfinite(loss) or not any(bool(grad.any()) for grad in want.values()):
        raise TrainingError(
            f"comparison with stock PEFT: its first loss is {loss:.4g}, and its gradients are "
            f"{'all 0' if math.isfinite(loss) else 'not finite'}: nothing to compare; check the "
            "base model's weights and its dtype"
        )
    advance("gradients")
    got = loss_and_gradients(fused, batches[0])[1]
    advance("gradients")
    rows = [Row(f"gradients of {len(want)} adapters", largest_rms(got, want), GRADIENT_LIMIT)]
    for mistake, factor in (("dA doubled", 2.0), ("dA zeroed", 0.0)):
        broken = {name: g * (factor if "lora_A" in name else 1.0) for name, g in got.items()}
        rows.append(Row(mistake, largest_rms(broken, want), GRADIENT_LIMIT, control=True))

    want, got = (train_sgd(m, batches, lambda: advance("SGD updates")) for m in (stock, fused))
    rows.append(Row(f"updates in {SGD_STEPS} SGD steps", largest_rms(got, want), UPDATE_LIMIT))

    if not fp32:
        del base32, plain, stock, fused, want, got  # the weights of float32 make room
        plain = decoded(base)
        stock, fused = build_pair(base, plain, **lora)
    models = {"frozen": plain, "peft": stock, "fused": fused}
    rows.append(note_load(time_steps, models, batches[0], lambda: advance("times of a step")))
    step_memory = measure_steps(models, batches[0], lambda: advance("memory of a step"))
    rows += [step_memory] if step_memory else []
    # Let bitsandbytes use its fastest CPU kernel; see `rewrite_codes`.
    if weight.device.type == "cpu" and linears_4bit(base):
        for name in ("frozen", "peft"):
            models[name] = rewrite_codes(copy.deepcopy(models[name]), True)
    fuse(fused, linears=True)
    prompt = batches[0]["input_ids"][:1, :PROMPT]
    rows.append(note_load(time_tokens, models, prompt, lambda: advance("times of a token")))
    return rows


def note_load(time_calls: Callable[..., Row], *args: Any) -> Row:
    """Return the row of `time_calls` with the share of CPU time that other programs took meanwhile.

    The load average, which `bench` notes, lags by a minute, which is longer than most rows take.
    """
    start, others = time.perf_counter(), watch_others()
    row = time_calls(*args)
    share = others()
    return replace(row, others=share) if time.perf_counter() - start >= JUDGED_SECONDS else row


@contextmanager
def input_gradients(models: Mapping[str, Any]) -> Iterator[None]:
    """Let the first layer's input need a gradient, so that the frozen model computes every dx."""
    for model in models.values():
        model.enable_input_require_grads()
    try:
        yield
    finally:
        for model in models.values():
            model.disable_input_require_grads()
            model.zero_grad(set_to_none=True)


def time_steps(models: Mapping[str, Any], batch: Batch, advance: Callable[[], None]) -> Row:
    """Compare the median seconds of forward and backward; the models take turns."""
    device = torch.get_device_module(batch["input_ids"].device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with input_gradients(models):
        for turn in range(1 + ROUNDS):
            for name, model in models.items():
                model.zero_grad(set_to_none=True)
                device.synchronize()
                start = time.perf_counter()
                model(**batch, use_cache=False).loss.backward()
                device.synchronize()
                seconds[name] += [time.perf_counter() - start] if turn else []
                advance()
    return timed_row("milliseconds a step", seconds, 1e3, ".1f")


def measure_steps(
    models: Mapping[str, Any], batch: Batch, advance: Callable[[], None]
) -> Row | None:
    """Compare the memory that forward and backward add at their peak; None if it is not reported.

    The models share the base's weights, so each step's peak is counted from what was in use before
    it: resident memory of the process, or on a GPU what torch allocated. Call this after
    `time_steps`, because a model's first step makes buffers that it keeps.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    with input_gradients(models):
        for _ in range(MEMORY_ROUNDS):
            for name, model in models.items():
                model.zero_grad(set_to_none=True)
                found[name].append(added_memory(model, batch))
                advance()
    frozen, peft, fused = (min(found[name]) for name in ("frozen", "peft", "fused"))
    if math.isnan(frozen + peft + fused):
        return None
    ratio = fused / peft if min(fused, peft) >= RATIO_BYTES else None
    cells = [f"{size / 1e6:.1f}" for size in (frozen, peft, fused)]
    return Row(STEP_MEMORY, ratio, None, cells[0], cells[1], cells[2], ratio=True)


def added_memory(model: Any, batch: Batch) -> float:
    """Return the bytes that a step adds at its peak; NaN if the system does not report them."""
    device = batch["input_ids"].device
    before = process_memory.reset_peak(device)
    if before is None:
        return math.nan
    model(**batch, use_cache=False).loss.backward()
    return process_memory.peak(device) - before


def time_tokens(models: Mapping[str, Any], prompt: Tensor, advance: Callable[[], None]) -> Row:
    """Compare the median milliseconds of a greedily decoded token; the models take turns.

    prompt: int64 [1, L].
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    for turn in range(1 + ROUNDS):
        for name, model in models.items():
            clock = TokenClock()
            decode(model, inputs, max_new_tokens=DECODED, min_new_tokens=DECODED, streamer=clock)
            seconds[name] += clock.steps if turn else []
            advance()
    return timed_row("milliseconds a token", seconds, 1e3, ".1f")


def timed_row(what: str, seconds: Mapping[str, list[float]], unit: float, form: str) -> Row:
    """Return a row with the medians, and the fused model's over stock PEFT's."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    frozen, peft, fused = (f"{median[name] * unit:{form}}" for name in ("frozen", "peft", "fused"))
    return Row(what, median["fused"] / median["peft"], None, frozen, peft, fused, ratio=True)
