"""`lora-kernels bench --variants`: what DoRA costs over LoRA, and its row norm by itself.

Times are medians of calls that take turns in one process, warm. A step is forward and backward with
x needing a gradient. Errors are rms, relative to float64 on the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference, select
from ..layers import DoRALinear, LoRALinear
from ..quantization import quantize_4bit
from . import timing

SIZES = (512, 2048, 2048)  # M, K, N
RANK, SCALING = 16, 2.0


def rows(dtypes: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The table, a row at a time."""
    for name in dtypes:
        yield norm_row(getattr(torch, name), seconds)
        yield step_row(getattr(torch, name), seconds)


def norm_row(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Norms of the rows of W + s·B·A: ours, by panels of library products, as PEFT writes them."""
    torch.manual_seed(0)
    _, K, N = SIZES
    W = torch.randn(N, K).div_(K**0.5).to(dtype)
    A, B = torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / RANK**0.5
    codes = quantize_4bit(W)

    def panels() -> Tensor:
        with select.backend("eager"):
            return functional.dora_norm(W, A, B, SCALING)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: functional.dora_norm(W, A, B, SCALING),
        "panels": panels,
        "PEFT's expression": lambda: torch.linalg.norm(W + SCALING * (B @ A).to(dtype), dim=1),
        "ours on NF4": lambda: functional.dora_norm(codes, A, B, SCALING),
    }
    decoded = codes.dequantize(torch.float32)
    errors = {}
    for name, call in calls.items():
        base = decoded if "NF4" in name else W
        ref = reference.dora_norm(base.double(), A.double(), B.double(), SCALING)
        errors[name] = ((call() - ref).norm() / ref.norm()).item()
    return _row("row norm", dtype, calls, seconds) | {"errors": errors}


def step_row(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A step with DoRA and with LoRA, ours and PEFT's, over the same base."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    M, K, N = SIZES
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    alpha = SCALING * RANK
    config = {"r": RANK, "lora_alpha": int(alpha), "target_modules": ["0"]}
    x, dy = torch.randn(M, K, dtype=dtype).requires_grad_(), torch.randn(M, N, dtype=dtype)

    def peft(dora: bool) -> nn.Module:
        model = nn.Sequential(copy.deepcopy(linear))
        return inject_adapter_in_model(LoraConfig(**config, use_dora=dora), model)[0].train()  # type: ignore[arg-type,index,no-any-return]

    def step(layer: nn.Module) -> Callable[[], object]:
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), inputs, dy)

    layers = {
        "ours": DoRALinear.from_linear(copy.deepcopy(linear), RANK, alpha),
        "LoRA": LoRALinear.from_linear(copy.deepcopy(linear), RANK, alpha),
        "PEFT's DoRA": peft(True),
        "PEFT's LoRA": peft(False),
    }
    A, B = torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / RANK**0.5
    x64, W64, A64, B64 = (t.detach().double() for t in (x, linear.weight, A, B))
    y64 = reference.lora_linear(x64, W64, A64, B64, SCALING)
    scale = reference.dora_norm(W64, A64, B64, 0.0) / reference.dora_norm(W64, A64, B64, SCALING)
    ref = {"LoRA": y64, "DoRA": scale * y64}  # the magnitudes are those at the start
    errors = {}
    with torch.no_grad():
        for name, layer in layers.items():
            for key, value in (("lora_A", A), ("lora_B", B)):
                held = getattr(layer, key)
                (held["default"].weight if "PEFT" in name else held).copy_(value)
            want = ref["LoRA" if "LoRA" in name else "DoRA"]
            errors[name] = ((layer(x) - want).norm() / want.norm()).item()
    calls = {name: step(layer) for name, layer in layers.items()}
    return _row("DoRA step", dtype, calls, seconds) | {"errors": errors}


def _row(
    what: str, dtype: torch.dtype, calls: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, Any]:
    M, K, N = SIZES
    times = timing.interleave(calls, seconds=seconds)
    return {
        "what": what, "dtype": str(dtype).removeprefix("torch."), "M": M, "K": K, "N": N,
        "R": RANK, "seconds": {name: asdict(t) for name, t in times.items()},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row as text: ratios before milliseconds."""
    seconds = {name: times["p50"] for name, times in row["seconds"].items()}
    shape = f"{row['M']}×{row['K']}×{row['N']} r={row['R']}"
    words = [f"{row['what']}, {row['dtype']} {shape}:"]
    if "LoRA" in seconds:
        peft = seconds["PEFT's DoRA"] / seconds["PEFT's LoRA"]
        words.append(f"over LoRA {seconds['ours'] / seconds['LoRA']:.2f} (PEFT's {peft:.2f});")
    ours = seconds["ours"]
    words += [f"{name} {t / ours:.2f} ({t * 1e3:.2f} ms)" for name, t in seconds.items()]
    words += [f"rms {name} {error:.1e}" for name, error in row["errors"].items()]
    return "  ".join(words)
