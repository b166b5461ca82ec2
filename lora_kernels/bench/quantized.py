"""`lora-kernels bench --quant nf4`: the layer over a 4-bit base, bitsandbytes' and a dense one.

Forward without gradients for M rows of x, and a training step for the largest M. Times are medians
of calls that take turns in one process; cold rotates over as many weights as exceed the last-level
cache, warm repeats one. Ours is a `QLoRALinear`; bitsandbytes' layer is under PEFT's; to the dense
product LoRA is added by PyTorch's own calls, `F.linear(x, W) + s·B(Ax)`. Errors are rms relative to
the layer in float64 on the float32 decode. Ours gets ✗ instead of a time where its error is above
the tolerance's, eager being PyTorch's calls on the decoded weight.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .. import timing
from ..core import reference
from ..layers import QLoRALinear
from . import baselines, models, tolerance
from .case import dtype_name, kernels
from .results import Facts, Row, Suite

SHAPES = ((4096, 4096), (4096, 14336), (576, 1536))  # K, N
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
RANK, SCALING = 16, 2.0

Forward = Callable[[Tensor], Tensor]


class Bases:
    """Enough weights of one shape to be cold, in every form that is timed."""

    def __init__(self, K: int, N: int, dtype: torch.dtype, quant_type: str, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.common: dict[str, Any] = {"dtype": dtype_name(dtype), "quant_type": quant_type}
        self.count = max(2, min(64, timing.cold_bytes(device) // (N * K // 2)))
        self.lora_A = nn.Parameter(torch.randn(RANK, K).div_(K**0.5).to(device, dtype))
        self.lora_B = nn.Parameter(torch.randn(N, RANK).div_(RANK**0.5).to(device, dtype))
        on = {"dtype": dtype, "device": device}
        self.dense = [nn.Linear(K, N, bias=False, **on) for _ in range(min(4, self.count))]
        for linear in self.dense:
            nn.init.normal_(linear.weight, std=K**-0.5)
        linears = [self.dense[i % len(self.dense)] for i in range(self.count)]
        self.ours = [self._ours(linear, quant_type) for linear in linears]
        self.bnb = {}
        if device == "cpu" or all(map(find_spec, ("bitsandbytes", "peft"))):
            self.bnb = {
                mode: [self._peft(linear, quant_type).train(mode == "train") for linear in linears]
                for mode in ("eval", "train")
            }

    def _ours(self, linear: nn.Linear, quant_type: str) -> QLoRALinear:
        layer = QLoRALinear.from_linear(linear, RANK, SCALING * RANK, quant_type=quant_type)
        layer.lora_A, layer.lora_B = self.lora_A, self.lora_B
        return layer.eval()

    def _peft(self, linear: nn.Linear, quant_type: str) -> Any:
        """PEFT's layer over bitsandbytes', with the shared adapter."""
        base = baselines.linear_4bit(linear, quant_type)
        layer = baselines.peft_layer(base, [RANK], SCALING)
        baselines.set_adapter(layer, self.lora_A, self.lora_B)
        return layer

    def candidates(self) -> dict[str, list[Forward]]:
        """Name -> the forward over each of the weights."""
        found: dict[str, list[Forward]] = {"ours": list(self.ours)}
        if self.device != "cpu":
            found["ours"] = [partial(_by_kernels, self.device, layer) for layer in self.ours]
        found |= {f"bitsandbytes, {mode}": list(layers) for mode, layers in self.bnb.items()}
        return found | {"dense": [partial(self._dense, linear.weight) for linear in self.dense]}

    def _dense(self, weight: Tensor, x: Tensor) -> Tensor:
        args = {"lora_A": self.lora_A, "lora_B": self.lora_B, "scaling": SCALING}
        return baselines.eager(args)(x, weight, **args)

    def errors(self, x: Tensor) -> tuple[dict[str, float], float]:
        """Of each candidate, and of PyTorch's own calls on the weight decoded to x's dtype."""
        weight = self.ours[0].weight4bit
        A, B, W = (t.double() for t in (self.lora_A, self.lora_B, weight.dequantize(torch.float32)))
        ref = reference.lora_linear(x.double(), W, A, B, SCALING)
        got = {name: each[0](x) for name, each in self.candidates().items()}
        got["eager"] = self._dense(weight.dequantize(x.dtype), x)
        errors = {name: float((y - ref).norm() / ref.norm()) for name, y in got.items()}
        return errors, errors.pop("eager")

    def rows(self, counts: list[int], seconds: float) -> Iterator[Row]:
        """Forwards of so many rows of x, and steps of the last."""
        K, N = self.lora_A.shape[1], self.lora_B.shape[0]
        stream = [layer.weight.view(torch.int64).sum for layer in self.ours]  # little more is done
        for M in counts:
            x = torch.randn(M, K).to(self.device, self.dtype)
            with torch.no_grad():
                errors, eager = self.errors(x)
                forwards: dict[str, list[Callable[[], object]]] = {
                    name: [partial(forward, x) for forward in each]
                    for name, each in self.candidates().items()
                }
                for call in itertools.chain(*forwards.values()):
                    call()  # in its first call bitsandbytes may rewrite the codes
                for cache, used in (("cold", slice(None)), ("warm", slice(1))):
                    row = Row(**self.common, M=M, K=K, N=N, R=RANK, mode="forward", cache=cache)
                    calls = (forwards | {"stream": stream}).items()
                    turns = {name: baselines.cycle_through(each[used]) for name, each in calls}
                    row.judge(errors, eager, tolerance.unit_roundoff(self.dtype), (K,))
                    yield row.time(turns, seconds, self.device)
        x.requires_grad_()
        dy = torch.randn(M, N).to(self.device, self.dtype)
        inputs = (x, self.lora_A, self.lora_B)
        steps = {
            name: baselines.cycle_through([partial(_step, forward, inputs, dy) for forward in each])
            for name, each in self.candidates().items()
            if name != "bitsandbytes, eval"
        }
        last = Row(**self.common, M=M, K=K, N=N, R=RANK, mode="step", cache="cold")
        last.errors, last.misses, last.judged = {}, row.misses, []
        yield last.time(steps, seconds, self.device)


def _by_kernels(device: str, layer: QLoRALinear, x: Tensor) -> Tensor:
    with kernels(device):
        return layer(x)  # type: ignore[no-any-return]


def _step(forward: Forward, inputs: tuple[Tensor, ...], dy: Tensor) -> object:
    return torch.autograd.grad(forward(inputs[0]), inputs, dy)


class Codes(Suite):
    """Layers over a 4-bit base."""

    kind, option, unused = "4-bit", "quant", "ranks dropout"

    def rows(self, args: argparse.Namespace, facts: Facts, only: Collection[str]) -> Iterator[Row]:
        asked = models.requested_shapes(args) or []
        shapes = list(dict.fromkeys((K, N) for _, K, N in asked)) or SHAPES
        counts = sorted({M for M, _, _ in asked}) or list(ROWS)
        for dtype, (K, N) in itertools.product(args.dtypes, shapes):
            bases = Bases(K, N, getattr(torch, dtype), args.quant, args.device)
            yield from bases.rows(counts, args.seconds)
