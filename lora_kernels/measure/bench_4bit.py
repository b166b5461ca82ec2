"""`lora-kernels bench --quant nf4`: the layer over a 4-bit base, bitsandbytes' and a dense one.

Forward without gradients for M rows of x, and a training step for the largest M. Times are medians
of calls that take turns in one process; cold rotates over as many weights as exceed the last-level
cache, warm repeats one. Ours is a `QLoRALinear`; bitsandbytes' layer is under PEFT's; to the dense
product LoRA is added by PyTorch's own calls, `F.linear(x, W) + s·B(Ax)`. Errors are rms relative to
the layer in float64 on the float32 decode. Ours gets ✗ instead of a time where its error is above
the tolerance's, eager being PyTorch's calls on the decoded weight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import timing
from ..layers import QLoRALinear
from . import compare, tolerance
from .case import kernels

SHAPES = [(4096, 4096), (4096, 14336), (576, 1536)]  # K, N
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
RANK, SCALING = 16, 2.0

Forward = Callable[[Tensor], Tensor]


class Bases:
    """Enough weights of one shape to be cold, in every form that is timed."""

    def __init__(
        self, K: int, N: int, dtype: torch.dtype, quant_type: str, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.count = max(2, min(64, timing.cold_bytes(device) // (N * K // 2)))
        self.lora_A = nn.Parameter(torch.randn(RANK, K).div_(K**0.5).to(device, dtype))
        self.lora_B = nn.Parameter(torch.randn(N, RANK).div_(RANK**0.5).to(device, dtype))
        self.dense = [
            nn.Linear(K, N, bias=False, dtype=dtype, device=device)
            for _ in range(min(4, self.count))
        ]
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

    def _peft(self, linear: nn.Linear, quant_type: str) -> nn.Module:
        """PEFT's layer over bitsandbytes', with the shared adapter."""
        import bitsandbytes
        from peft import LoraConfig, inject_adapter_in_model

        N, K = linear.weight.shape
        bnb: Any = bitsandbytes.nn
        base = bnb.Linear4bit(
            K, N, bias=False, compute_dtype=linear.weight.dtype, quant_type=quant_type
        )
        base.weight = bnb.Params4bit(
            linear.weight.detach(), requires_grad=False, quant_type=quant_type, module=base
        )
        model = nn.ModuleDict({"base": base.to(self.device)})
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers says it
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["base"])
        inject_adapter_in_model(config, model)
        layer: Any = model["base"]
        layer.lora_A["default"].weight = self.lora_A
        layer.lora_B["default"].weight = self.lora_B
        return layer  # type: ignore[no-any-return]

    def candidates(self) -> dict[str, list[Forward]]:
        """Name -> the forward over each of the weights."""
        found: dict[str, list[Forward]] = {"ours": list(self.ours)}
        if self.device != "cpu":
            found["ours"] = [partial(_by_kernels, self.device, layer) for layer in self.ours]
        found |= {f"bitsandbytes, {mode}": list(layers) for mode, layers in self.bnb.items()}
        return found | {"dense": [partial(self._dense, linear.weight) for linear in self.dense]}

    def _dense(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * SCALING

    def eager_error(self, x: Tensor, ref: Tensor) -> float:
        """Of PyTorch's own calls on the weight decoded to x's dtype."""
        got = self._dense(self.ours[0].weight4bit.dequantize(x.dtype), x)
        return _error(got, ref)

    @functools.cached_property
    def decoded(self) -> Tensor:
        """The first weight in float64."""
        return self.ours[0].weight4bit.dequantize(torch.float32).double()

    def reference(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.detach().double(), self.lora_B.detach().double()
        return x.double() @ self.decoded.T + (x.double() @ A.T) @ B.T * SCALING

    def stream(self) -> list[Callable[[], object]]:
        """Reading each weight's packed codes once, and doing next to nothing with them."""
        return [layer.weight.view(torch.int64).sum for layer in self.ours]


def _by_kernels(device: str, layer: QLoRALinear, x: Tensor) -> Tensor:
    with kernels(device):
        return layer(x)  # type: ignore[no-any-return]


def _step(forward: Forward, x: Tensor, inputs: tuple[Tensor, ...], dy: Tensor) -> object:
    return torch.autograd.grad(forward(x), inputs, dy)


def _in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    each = itertools.cycle(calls)
    return lambda: next(each)()


def _error(got: Tensor, ref: Tensor) -> float:
    return float((got - ref).norm() / ref.norm())


def rows(
    quant_type: str,
    dtypes: list[str],
    seconds: float,
    device: str = "cpu",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    counts: Sequence[int] = ROWS,
) -> Iterator[dict[str, Any]]:
    """The table, a row at a time. shapes: K, N; counts: rows of x, of which the last makes steps
    too."""
    for dtype, (K, N) in itertools.product(dtypes, shapes):
        bases = Bases(K, N, getattr(torch, dtype), quant_type, device)
        common = {"dtype": dtype, "K": K, "N": N, "R": RANK, "quant_type": quant_type}
        for M in counts:
            x = torch.randn(M, K).to(device, getattr(torch, dtype))
            ref = bases.reference(x)
            forwards = bases.candidates()
            with torch.no_grad():
                errors = {name: _error(each[0](x), ref) for name, each in forwards.items()}
                u = tolerance.unit_roundoff(x.dtype)
                limit = tolerance.rms_limit(bases.eager_error(x, ref), u, (K,))
                misses = {}
                if not errors["ours"] <= limit:  # NaN is not
                    misses["ours"] = (
                        f"y MISS: rms {errors['ours'] / u:.3g} u, limit {limit / u:.3g} u"
                    )
                    del forwards["ours"]
                for each in forwards.values():
                    for forward in each:  # in its first call bitsandbytes may rewrite the codes
                        forward(x)
                for cache in ("cold", "warm"):
                    used = slice(None) if cache == "cold" else slice(1)
                    calls = {
                        name: _in_turn([partial(f, x) for f in each[used]])
                        for name, each in forwards.items()
                    }
                    calls["stream"] = _in_turn(bases.stream()[used])
                    row = {**common, "M": M, "mode": "forward", "cache": cache}
                    yield {
                        **row, "errors": errors, "misses": misses, "judged": ["ours"],
                        **_times(row, calls, seconds, device),
                    }  # fmt: skip
        x = torch.randn(counts[-1], K).to(device, getattr(torch, dtype)).requires_grad_()
        dy = torch.randn(counts[-1], N).to(device, getattr(torch, dtype))
        inputs = (x, bases.lora_A, bases.lora_B)
        calls = {
            name: _in_turn([partial(_step, f, x, inputs, dy) for f in each])
            for name, each in bases.candidates().items()
            if name != "bitsandbytes, eval"
        }
        row = {**common, "M": counts[-1], "mode": "step", "cache": "cold"}
        if misses:
            calls.pop("ours")
        yield {
            **row, "errors": {}, "misses": misses, "judged": [],
            **_times(row, calls, seconds, device),
        }  # fmt: skip


def _times(
    row: dict[str, Any], calls: dict[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, Any]:
    yardstick = compare.yardstick(row)
    times = timing.interleave(calls, seconds=seconds, device=device, yardstick=yardstick)
    return {"seconds": {name: asdict(t) for name, t in times.items()}}


def line(row: dict[str, Any]) -> str:
    """One row as text: ratios to ours before milliseconds."""
    seconds = {name: times["p50"] for name, times in row["seconds"].items()}
    shape = f"{row['dtype']} {row['quant_type']} K={row['K']} N={row['N']} M={row['M']}"
    words = [f"{shape} {row['mode']}, {row['cache']}:"]
    if row["misses"]:
        words += [f"{name} ✗ ({text})" for name, text in row["misses"].items()]
        words += [f"{name} {t * 1e3:.3f} ms" for name, t in seconds.items()]
    else:
        ours = seconds.pop("ours")
        times = row["seconds"]["ours"]
        three = "/".join(f"{times[key] * 1e3:.3f}" for key in ("p20", "p50", "p80"))
        words.append(f"ours {three} ms (p20/p50/p80); over ours:")
        words += [f"{name} {t / ours:.2f}" for name, t in seconds.items()]
    words += [f"rms {name} {error:.1e}" for name, error in row["errors"].items()]
    return "  ".join(words)
