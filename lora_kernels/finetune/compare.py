"""Compare stock PEFT with the fused model, in one process, on one set of base weights.

Gradients are compared directly, and updates under SGD: a loss curve under AdamW hides a gradient
that is wrong by a factor. The controls at the end break the fused gradients on purpose, and the
comparison must detect that.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import dropout_mask, lora_linear
from ..bench.timing import interleave
from ..peft import fuse
from . import TrainingError, memory
from .chat import ChatData, Collator
from .model import Clock, adapters, cast_parameters, decode, linears_4bit, rewrite_codes, share
from .presets import add_lora_layers

GRADIENT_LIMIT = 1e-4  # relative rms of one adapter's gradient, fp32
UPDATE_LIMIT = 1e-3  # relative rms of one adapter's change over the SGD steps, fp32
BF16_LIMIT = 1.25  # the fused error against fp32 gradients, divided by stock PEFT's
BF16_BATCHES = 5  # on 4-bit weights one batch in ten has 2 to 5 times the error, in PEFT too
SGD_LR = 0.1
ADAPTER_B_STD = 0.02  # a new adapter has B = 0, and then dA = 0 on both sides
MASK_P = 0.1
PROMPT, DECODED = 8, 16  # numbers of tokens

Draw = Callable[[int], Mapping[str, Tensor]]  # the batch of a step


@dataclass(frozen=True)
class Row:
    """One line of the table: `difference` is a relative difference, or with `ratio` a ratio.

    A control is a comparison with a deliberate error. It passes if the limit is exceeded.
    """

    what: str
    difference: float | None = None
    limit: float | None = None
    frozen: str = ""
    peft: str = ""
    fused: str = ""
    ratio: bool = False
    control: bool = False

    @property
    def ok(self) -> bool | None:
        if self.difference is None or self.limit is None:
            return None
        if self.control:
            return self.difference > self.limit
        return self.difference <= self.limit  # NaN fails

    @property
    def difference_text(self) -> str:
        if self.difference is None:
            return ""
        return f"×{self.difference:.3f}" if self.ratio else f"{self.difference:.1e}"


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


def loss_and_gradients(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch, and the adapters' gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in adapters(model).items()
    }
    return loss.item(), grads


def train_sgd(model: nn.Module, draw: Draw, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train by SGD; return the loss of each step, and the change of each adapter."""
    start = {name: p.detach().clone() for name, p in adapters(model).items()}
    optimizer = torch.optim.SGD(adapters(model).values(), lr=SGD_LR)
    losses = []
    for step in range(steps):
        losses.append(loss_and_gradients(model, draw(step))[0])
        optimizer.step()
    return losses, {name: p.detach() - start[name] for name, p in adapters(model).items()}


@contextmanager
def scale_dA(model: nn.Module, factor: float) -> Iterator[None]:
    """Introduce a deliberate error: multiply every gradient of lora_A by `factor`."""
    handles = [
        p.register_hook(lambda grad: grad * factor)
        for name, p in adapters(model).items()
        if "lora_A" in name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_pair(base: nn.Module, **lora: Any) -> tuple[Any, Any]:
    """Return stock PEFT and the fused model with the same adapters, B random, on base's weights."""
    stock = add_lora_layers(share(base), **lora, fused=False)
    generator = torch.Generator().manual_seed(lora["seed"])
    for name, p in adapters(stock).items():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(ADAPTER_B_STD * torch.randn(p.shape, generator=generator))
    return stock, fuse(share(stock))


def compare(
    base: nn.Module,
    data: ChatData,
    *,
    lora: Mapping[str, Any],
    batch_size: int,
    sgd_steps: int = 20,
    timed_steps: int = 10,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[Row]:
    """Compare the adapters `lora` on base, fused and in stock PEFT; return the table's rows.

    Values are compared in fp32 and bf16. Times and memory are measured in the base's dtype. Dropout
    is off, because PEFT draws other masks; a fused layer is compared with an explicit mask instead.

    Args:
        base: the frozen model.
        data: the rows to draw batches from.
        lora: settings of `add_lora_layers`; the seed also determines the order of the batches.
        batch_size: rows of a batch.
        sgd_steps: the number of SGD steps before losses and updates are compared.
        timed_steps: the number of timed steps of each model.
        on_stage: called with the name of each stage.

    Raises TrainingError if stock PEFT's first loss is not finite, or its gradients are all 0.
    """
    lora = {**lora, "dropout": 0.0}
    seed, weight = lora["seed"], next(base.parameters())
    draw = partial(draw_batch, data, size=batch_size, seed=seed, device=weight.device)
    first = draw(0)

    on_stage("gradients before the first step")
    fp32 = weight.dtype is torch.float32
    base32 = base if fp32 else cast_parameters(copy.deepcopy(base), torch.float32)
    stock, fused = build_pair(base32, **lora)
    loss, want = loss_and_gradients(stock, first)
    if not math.isfinite(loss) or not any(bool(grad.any()) for grad in want.values()):
        raise TrainingError(
            f"comparison with stock PEFT: its first loss is {loss:.4g}, and its gradients are "
            f"{'all 0' if math.isfinite(loss) else 'not finite'}: nothing to compare; check the "
            "base model's weights and its dtype"
        )
    fused_loss, got = loss_and_gradients(fused, first)
    rows = [
        loss_row("loss before the first step", [fused_loss], [loss]),
        Row(f"gradients of {len(want)} adapters", largest_rms(got, want), GRADIENT_LIMIT),
    ]
    controls = []
    for mistake, factor in (("dA doubled", 2.0), ("dA zeroed", 0.0)):
        with scale_dA(fused, factor):
            broken = loss_and_gradients(fused, first)[1]
        controls.append(Row(mistake, largest_rms(broken, want), GRADIENT_LIMIT, control=True))
    mask_row, mask_control = compare_dropout(fused, seed)

    on_stage(f"{sgd_steps} SGD steps each")
    stock_losses, want = train_sgd(stock, draw, sgd_steps)
    fused_losses, got = train_sgd(fused, draw, sgd_steps)
    rows += [
        loss_row(f"losses of {sgd_steps} SGD steps", fused_losses, stock_losses),
        Row(f"updates in {sgd_steps} SGD steps", largest_rms(got, want), UPDATE_LIMIT),
        mask_row,
    ]

    on_stage("bf16 gradients against fp32")
    rows.append(compare_bf16(base, draw, lora))

    on_stage(f"{timed_steps} timed steps each")
    if not fp32:
        stock, fused = build_pair(base, **lora)
    models = {"frozen": base, "peft": stock, "fused": fused}
    rows += compare_cost(models, first, timed_steps)
    if linears_4bit(base):  # let bitsandbytes use its fastest kernel; see `rewrite_codes`
        for name in ("frozen", "peft"):
            models[name] = rewrite_codes(copy.deepcopy(models[name]), True)
    prompt = first["input_ids"][:1, :PROMPT]
    rows.append(compare_decoding(models, prompt, "ms a token, decoding"))
    fuse(models["fused"], linears=True)
    rows.append(compare_decoding(models, prompt, "with fuse(linears=True)"))
    return [*rows, *controls, mask_control]


def loss_row(what: str, fused: list[float], stock: list[float]) -> Row:
    """Return a row with the largest relative difference of the losses, and the last losses."""
    difference = max(abs(f - s) / s for f, s in zip(fused, stock, strict=True))
    return Row(what, difference, peft=f"{stock[-1]:.5f}", fused=f"{fused[-1]:.5f}")


def compare_bf16(base: nn.Module, draw: Draw, lora: Mapping[str, Any]) -> Row:
    """Return |fused bf16 − fp32| / |PEFT bf16 − fp32|, over all adapter gradients together.

    Each norm is the median of BF16_BATCHES batches. The fp32 reference uses the bf16 weights, so
    neither norm includes the rounding of weights.
    """
    base16 = cast_parameters(copy.deepcopy(base), torch.bfloat16)
    stock, fused = build_pair(base16, **lora)
    base32 = cast_parameters(copy.deepcopy(base16), torch.float32)
    reference = add_lora_layers(base32, **lora, fused=False)
    for name, p in adapters(stock).items():
        adapters(reference)[name].data.copy_(p.detach())
    errors: list[tuple[float, float]] = []
    for step in range(BF16_BATCHES):
        batch = draw(step)
        exact, peft, ours = (
            torch.cat([g.float().flatten() for g in loss_and_gradients(m, batch)[1].values()])
            for m in (reference, stock, fused)
        )
        errors.append((relative_rms(peft, exact), relative_rms(ours, exact)))
    peft_error, our_error = torch.tensor(errors).median(0).values  # NaN if an error is NaN
    ratio, cells = float(our_error / peft_error), (f"{peft_error:.4f}", f"{our_error:.4f}")
    return Row("bf16 gradients, off fp32", ratio, BF16_LIMIT, "", *cells, ratio=True)


def compare_dropout(model: nn.Module, seed: int) -> tuple[Row, Row]:
    """Compare dx of one layer with dropout to a reference that multiplies by an explicit mask.

    The control's reference applies the mask in the forward and omits it in the backward.
    """
    from peft.tuners.lora import LoraLayer

    layer: Any = next(m for m in model.modules() if isinstance(m, LoraLayer))
    A, B = (w["default"].weight.detach() for w in (layer.lora_A, layer.lora_B))
    N, K, M = B.shape[0], A.shape[1], 64
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(M, d, generator=generator).to(A.device) for d in (K, N))
    # With a weight of zero, dx is the gradient through the adapter alone, which the mask affects.
    weight = A.new_zeros(N, K)
    rng = torch.tensor([seed, 1])
    kept = dropout_mask(rng, M, K, MASK_P).to(A.device)
    mask = kept / (1 - MASK_P)
    # Eager on a GPU takes the mask instead of a Philox state.
    dropout: dict[str, Any] = {"rng": rng} if A.device.type == "cpu" else {"dropout_mask": kept}

    def dx(forward: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, dy)[0]

    got = dx(lambda x: lora_linear(x, weight, A, B, 2.0, dropout_p=MASK_P, **dropout))
    want = dx(lambda x: (x * mask) @ A.T @ B.T * 2.0)
    unmasked = dx(lambda x: (x + (x * mask - x).detach()) @ A.T @ B.T * 2.0)
    return (
        Row(f"dx with dropout {MASK_P}", relative_rms(got, want), GRADIENT_LIMIT),
        Row("mask off dx", relative_rms(unmasked, want), GRADIENT_LIMIT, control=True),
    )


def compare_cost(models: Mapping[str, Any], batch: Mapping[str, Tensor], steps: int) -> list[Row]:
    """Compare the time of forward and backward, the LoRA tax, and the peak memory.

    The peak memory is the median of three steps, because heap fragmentation changes it by 5%. The
    first layer's input needs a gradient in every model. So the frozen model computes every dx too,
    and the tax is the adapters' alone.
    """

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()

    def row(what: str, cells: Mapping[str, float], form: str, compared: bool = False) -> Row:
        ratio = cells["fused"] / cells["peft"] if compared else None
        frozen, peft, fused = (f"{cells[name]:{form}}" for name in ("frozen", "peft", "fused"))
        return Row(what, ratio, None, frozen, peft, fused, ratio=True)

    for model in models.values():
        model.enable_input_require_grads()
    try:
        device = batch["input_ids"].device
        calls = {name: partial(step, model) for name, model in models.items()}
        times = interleave(calls, seconds=math.inf, most=steps, device=device.type)
        peaks = {name: [peak_memory(m, batch) for _ in range(3)] for name, m in models.items()}
    finally:
        for model in models.values():
            model.disable_input_require_grads()
    rows = []
    for said, p in (("median", "p50"), ("p20", "p20"), ("p80", "p80")):
        seconds = {name: getattr(t, p) for name, t in times.items()}
        rows.append(row(f"seconds a step, {said}", seconds, ".3f", said == "median"))
    tax = {name: t.p50 / times["frozen"].p50 for name, t in times.items()}
    rows.append(row("LoRA tax (step / frozen)", tax, ".3f"))
    what = "peak memory of a step, MB"
    if any(None in found for found in peaks.values()):
        return [*rows, Row(what, None, None, "–", "–", "–")]
    told = {n: statistics.median(p / 1e6 for p in ps if p is not None) for n, ps in peaks.items()}
    return [*rows, row(what, told, ".0f", True)]


def compare_decoding(models: Mapping[str, Any], prompt: Tensor, what: str) -> Row:
    """Compare the milliseconds per token of greedy decoding by `generate`, in eval mode.

    The models take turns, and the first round is a warm-up. prompt: int64 [1, L].
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    for turn in range(4):
        for name, model in models.items():
            clock = Clock()
            decode(model, inputs, max_new_tokens=DECODED, min_new_tokens=DECODED, streamer=clock)
            seconds[name] += clock.steps if turn else []
    median = {name: statistics.median(s) for name, s in seconds.items()}
    frozen, peft, fused = (f"{median[name] * 1e3:.1f}" for name in ("frozen", "peft", "fused"))
    ratio = median["fused"] / median["peft"]
    return Row(what, ratio, None, frozen, peft, fused, ratio=True)


def peak_memory(model: nn.Module, batch: Mapping[str, Tensor]) -> int | None:
    """Return the bytes that one forward and backward need in addition to those in use before.

    None if the system does not report its memory.
    """
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device
    before = memory.reset_peak(device)
    if before is None:
        return None
    try:
        loss_and_gradients(model, batch)
        return memory.peak(device) - before
    finally:
        model.zero_grad(set_to_none=True)
