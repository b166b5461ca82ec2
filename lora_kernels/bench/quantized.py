"""`lora-kernels bench --quant nf4`: the layer over a 4-bit base, bitsandbytes' and a dense one.

Forward without gradients for M rows of x, and a training step for the largest M. Cold rotates over
as many weights as exceed the last-level cache, warm repeats one. Ours is a `QLoRALinear`;
bitsandbytes' layer is under PEFT's; to the dense GEMM, PyTorch's own calls add LoRA:
`F.linear(x, W) + s·B(Ax)`. The reference reads the float32 decode, eager the decoded weight.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QLoRALinear
from ..oracle import reference, tolerance
from ..oracle.case import kernels
from . import baselines, models, timing
from .baselines import Forward
from .results import Facts, Row, Suite

SHAPES = ((4096, 4096), (4096, 14336), (576, 1536))  # K, N
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
RANK, SCALING = 16, 2.0


def rows_of(
    K: int, N: int, counts: list[int], dtype: str, quant_type: str, seconds: float, device: str
) -> Iterator[Row]:
    """Yield forwards for each number of rows, and steps for the last, with a cold cache too."""
    torch.manual_seed(0)
    on: Any = {"dtype": getattr(torch, dtype), "device": device}
    A = nn.Parameter(torch.randn(RANK, K).div_(K**0.5).to(**on))
    B = nn.Parameter(torch.randn(N, RANK).div_(RANK**0.5).to(**on))
    count = max(2, min(64, timing.cold_bytes(device) // (N * K // 2)))
    dense = [nn.Linear(K, N, bias=False, **on) for _ in range(min(4, count))]
    for linear in dense:
        nn.init.normal_(linear.weight, std=K**-0.5)
    linears = [dense[i % len(dense)] for i in range(count)]
    ours = [_ours(linear, quant_type, A, B) for linear in linears]

    def eager(weight: Tensor, x: Tensor) -> Tensor:
        args = {"lora_A": A, "lora_B": B, "scaling": SCALING}
        return baselines.eager(args)(x, weight, **args)

    forwards: dict[str, list[Forward]] = {"ours": [*ours]}
    if device != "cpu":
        forwards["ours"] = [partial(_by_kernels, device, layer) for layer in ours]
    if device == "cpu" or all(map(find_spec, ("bitsandbytes", "peft"))):
        for mode in ("eval", "train"):
            layers = [_peft(linear, quant_type, A, B).train(mode == "train") for linear in linears]
            forwards[f"bitsandbytes, {mode}"] = [*layers]
    forwards["dense"] = [partial(eager, linear.weight) for linear in dense]

    row = partial(Row, dtype=dtype, quant_type=quant_type, K=K, N=N, R=RANK)
    stream = [layer.weight.view(torch.int64).sum for layer in ours]  # little more is done
    weight = ours[0].weight4bit
    for M in counts:
        x = torch.randn(M, K).to(**on)
        with torch.no_grad():
            x64, W64 = x.double(), weight.dequantize(torch.float32).double()
            ref = reference.lora_linear(x64, W64, A.double(), B.double(), SCALING)
            errors = {name: tolerance.rms_error(f[0](x), ref) for name, f in forwards.items()}
            by_eager = tolerance.rms_error(eager(weight.dequantize(x.dtype), x), ref)
            calls: dict[str, list[Callable[[], object]]] = {
                name: [partial(forward, x) for forward in each] for name, each in forwards.items()
            }
            for call in itertools.chain(*calls.values()):
                call()  # in its first call bitsandbytes may rewrite the codes
            calls["stream"] = [*stream]
            for cache, used in (("cold", slice(None)), ("warm", slice(1))):
                found = row(M=M, mode="forward", cache=cache)
                found.judge(errors, by_eager, tolerance.unit_roundoff(x.dtype), (K,))
                turns = {name: baselines.cycle_through(each[used]) for name, each in calls.items()}
                yield found.time(turns, seconds, device)
    dy = torch.randn(M, N).to(**on)
    x.requires_grad_()
    steps = {
        name: baselines.cycle_through([baselines.step(forward, (x, A, B), dy) for forward in each])
        for name, each in forwards.items()
        if name != "bitsandbytes, eval"
    }
    last = row(M=M, mode="step", cache="cold", misses=found.misses, judged=[])
    yield last.time(steps, seconds, device)


def _ours(linear: nn.Linear, quant_type: str, A: nn.Parameter, B: nn.Parameter) -> QLoRALinear:
    layer = QLoRALinear.from_linear(linear, RANK, SCALING * RANK, quant_type=quant_type)
    layer.lora_A, layer.lora_B = A, B
    return layer.eval()


def _peft(linear: nn.Linear, quant_type: str, A: Tensor, B: Tensor) -> Any:
    """PEFT's layer over bitsandbytes', with the shared adapter."""
    layer = baselines.peft_layer(baselines.linear_4bit(linear, quant_type), [RANK], SCALING)
    baselines.set_adapter(layer, A, B)
    return layer


def _by_kernels(device: str, layer: QLoRALinear, x: Tensor) -> Tensor:
    with kernels(device):
        return layer(x)  # type: ignore[no-any-return]


class Codes(Suite):
    """Layers over a 4-bit base."""

    kind, option, unused = "4-bit", "quant", "ranks dropout baseline"

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        requested = models.requested_shapes(args) or []
        shapes = list(dict.fromkeys((K, N) for _, K, N in requested)) or SHAPES
        counts = sorted({M for M, _, _ in requested}) or list(ROWS)
        for dtype, (K, N) in itertools.product(args.dtypes, shapes):
            yield from rows_of(K, N, counts, dtype, args.quant, args.seconds, args.device)
