"""`lora-kernels bench --head`: a training step of a language model's head with LoRA.

A step is forward and backward of the loss, with gradients of x and of the adapter. "loss" is the
cross-entropy, "log_probs" the labels' log-probabilities. Beside ours:

- "pytorch": the head of PEFT, unfused, and PyTorch's loss of its logits in float32;
- "torch.compile": the same expressions;
- "trl, no adapter": TRL's chunked head, which reads the weight and drops an adapter; "ours, no
  adapter" does the same work.

Liger's loss has no CPU kernel. Errors are rms of dx, relative to float64 on the first rows.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.head import lora_linear_cross_entropy, lora_linear_log_probs
from ..oracle import case as cases
from ..oracle import reference, tolerance
from ..oracle.case import dtype_name
from . import baselines
from .results import Facts, Row
from .table import Call, Entry, Suite, Tolerance, timed

RANK, SCALING = 16, 2.0
JUDGED_ROWS = 16  # of x, for the errors


class Shape(NamedTuple):
    """A model's head: rows of x in a step, hidden size, vocabulary."""

    model: str
    M: int
    K: int
    V: int


SHAPES = (Shape("smollm2-135m", 2048, 576, 49152), Shape("qwen2.5-0.5b", 1024, 896, 151936))
MODES = ("loss", "log_probs")
Loss = Callable[[Tensor], Tensor]


def inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Return x, weight, adapters in float32 as PEFT has them, and labels."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator) / math.sqrt(sizes[-1])

    return {
        "x": draw(shape.M, shape.K).to(dtype).requires_grad_(),
        "weight": draw(shape.V, shape.K).to(dtype),
        "lora_A": draw(RANK, shape.K).requires_grad_(),
        "lora_B": draw(shape.V, RANK).requires_grad_(),
        "labels": torch.randint(0, shape.V, (shape.M,), generator=generator),
    }


def loss_of_logits(logits: Tensor, labels: Tensor, mode: str) -> Tensor:
    """Return PyTorch's loss: the cross-entropy, or the mean of the negative log-probabilities."""
    if mode == "loss":
        loss: Tensor = F.cross_entropy(logits.float(), labels)
        return loss
    log_probs: Tensor = logits.float().log_softmax(-1).gather(1, labels[:, None])
    return -log_probs.mean()


def losses(args: dict[str, Any], mode: str) -> dict[str, Loss]:
    """Return each call as a function of x."""
    weight, A, B, labels = (args[name] for name in ("weight", "lora_A", "lora_B", "labels"))
    whole = {**args, "scaling": SCALING, "bias": None, "dropout_p": 0.0}
    peft, eager = baselines.build_layer(whole), baselines.eager(whole)
    arguments = {name: whole[name] for name in ("weight", "lora_A", "lora_B", "scaling")}

    def pytorch(x: Tensor) -> Tensor:
        return loss_of_logits(peft(x), labels, mode)

    def as_written(x: Tensor) -> Tensor:
        return loss_of_logits(eager(x, **arguments), labels, mode)

    def ours(x: Tensor, A: Tensor | None = A, B: Tensor | None = B) -> Tensor:
        if mode == "loss":
            return lora_linear_cross_entropy(x, weight, A, B, labels, SCALING)
        return -lora_linear_log_probs(x, weight, A, B, labels, SCALING, outputs=()).log_probs.mean()

    calls: dict[str, Loss] = {"ours": ours, "pytorch": pytorch}
    if baselines.no_compiler("cpu") is None and args["x"].dtype is torch.float32:
        calls["torch.compile"] = baselines.compile_static(as_written)
    calls["ours, no adapter"] = partial(ours, A=None, B=None)
    if find_spec("trl") is not None:
        calls["trl, no adapter"] = partial(_trl, weight=weight, labels=labels)
    return calls


def _trl(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(
        x, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )
    loss: Tensor = -log_probs.mean()
    return loss


def entries_of(shape: Shape, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield a step of each mode. Errors are those of dx on few rows."""
    args = inputs(shape, dtype)
    leaves = [args[name] for name in ("x", "lora_A", "lora_B")]
    existing = [t for name, t in args.items() if isinstance(t, Tensor) and name != "x"]
    judged = {**args, **{name: args[name].detach()[:JUDGED_ROWS] for name in ("x", "labels")}}
    judged["x"].requires_grad_()
    frozen = {**judged, "lora_A": None, "lora_B": None}
    want = {"": _oracle(judged), "no adapter": _oracle(frozen)}
    for mode in MODES:
        judged_losses = losses(judged, mode)
        eager = tolerance.rms_error(_dx(judged_losses["pytorch"], judged["x"]), want[""])
        limit = Tolerance(eager, dtype, (shape.K, shape.V, shape.V))
        calls = {}
        for name, loss in losses(args, mode).items():
            variant = "no adapter" if name.endswith("no adapter") else ""
            dx = partial(_dx, judged_losses[name], judged["x"])
            calls[name] = Call(
                forwards=[partial(loss, args["x"])],
                leaves=leaves[:1] if variant else leaves,
                existing=existing,
                check=partial(limit.check, dx, want[variant]),
            )
        what = f"head {shape.model} {mode}"
        sizes: dict[str, Any] = {"M": shape.M, "K": shape.K, "N": shape.V, "R": RANK}
        key = Row(what=what, dtype=dtype_name(dtype), **sizes)
        yield Entry(key=key, calls=calls, modes=[("step", "warm")])


def _dx(loss: Loss, x: Tensor) -> Tensor:
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(loss(x), x)
    return dx


def _oracle(args: dict[str, Any]) -> Tensor:
    """Return dx in float64."""
    wide = {name: cases.widen(args[name]) for name in ("x", "weight", "lora_A", "lora_B")}
    loss = reference.lora_linear_cross_entropy(**wide, labels=args["labels"], scaling=SCALING)
    dx: Tensor = torch.autograd.grad(loss, wide["x"])[0]
    return dx


def entries(args: argparse.Namespace, facts: Facts) -> Iterator[Entry]:
    """Yield LoRA on language models' heads, with their loss."""
    for name, shape in itertools.product(args.dtypes, SHAPES):
        yield from entries_of(shape, getattr(torch, name))


SUITE = Suite(
    kind="head",
    option="head",
    unused="shapes model rows ranks dropout device baseline",
    rows=timed(entries),
)
