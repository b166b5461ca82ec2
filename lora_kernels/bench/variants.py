"""`lora-kernels bench --variants`: DoRA over LoRA, and its row norm; projections of one x as a
group; several adapters in a batch; hierarchical levels; switching.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..choice import choose as selection
from ..layers import DoRALinear, HierarchicalLoRALinear, LoRAGroup, LoRALinear
from ..ops.linear import lora_linear
from ..ops.norm import dora_norm
from ..oracle import reference, tolerance
from ..oracle.case import dtype_name
from ..quantization import quantize_4bit
from . import baselines
from .baselines import Layers, adapter_names, peft_layer, trained
from .results import Facts, Row, Suite

SIZES = (512, 2048, 2048)  # M, K, N
SERVED = (4096, 4096)  # K, N of the layer that several adapters share
RANK, SCALING = 16, 2.0
LEVELS = (8, 16, 32)


def norm_row(dtype: torch.dtype, seconds: float) -> Row:
    """Norms of the rows of W + s·B·A: ours, by panels of library products, as PEFT writes them."""
    _, K, N = SIZES
    W = torch.randn(N, K).div_(K**0.5).to(dtype)
    A, B = _adapter(K, N)
    codes = quantize_4bit(W)

    def panels() -> Tensor:
        with selection.backend("eager"):
            return dora_norm(W, A, B, SCALING)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: dora_norm(W, A, B, SCALING),
        "panels": panels,
        "PEFT's expression": lambda: torch.linalg.norm(W + SCALING * (B @ A).to(dtype), dim=1),
        "ours on NF4": lambda: dora_norm(codes, A, B, SCALING),
    }
    dense, four_bit = (
        reference.dora_norm(*_double(base, A, B, SCALING))
        for base in (W, codes.dequantize(torch.float32))
    )
    errors = {
        name: tolerance.rms_error(call(), four_bit if "NF4" in name else dense)
        for name, call in calls.items()
    }
    # All that is rounded is rounded to float32.
    row = _row("row norm", dtype, SIZES, errors, errors["panels"], rounded=torch.float32)
    return row.time(calls, seconds)


def dora_row(dtype: torch.dtype, seconds: float) -> Row:
    """A step with DoRA and with LoRA, ours and PEFT's, over the same base."""
    M, K, N = SIZES
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    A, B = _adapter(K, N)
    layers: dict[str, Any] = {
        "ours": DoRALinear.from_linear(copy.deepcopy(linear), RANK, SCALING * RANK),
        "LoRA": LoRALinear.from_linear(copy.deepcopy(linear), RANK, SCALING * RANK),
        "PEFT's DoRA": peft_layer(copy.deepcopy(linear), [RANK], SCALING, use_dora=True),
        "PEFT's LoRA": peft_layer(copy.deepcopy(linear), [RANK], SCALING),
    }
    for layer in layers.values():
        _set(layer, A, B)
    x, dy = torch.randn(M, K, dtype=dtype).requires_grad_(), torch.randn(M, N, dtype=dtype)
    x64, W64, A64, B64 = _double(x, linear.weight, A, B)
    y = reference.lora_linear(x64, W64, A64, B64, SCALING)
    # The magnitudes are those at the start.
    at_start, norm = (reference.dora_norm(W64, A64, B64, scaling) for scaling in (0.0, SCALING))
    want = {name: y if "LoRA" in name else at_start / norm * y for name in layers}
    calls: Layers = {name: (layer, trained(layer)) for name, layer in layers.items()}
    errors = baselines.errors(calls, x, want)
    row = _row("DoRA step", dtype, SIZES, errors, errors["PEFT's DoRA"])
    return row.time(baselines.steps(calls, x, dy), seconds)


def group_rows(dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """q, k and v with adapters as a group, as three layers, as three of PEFT's: a step, and one row
    of x without gradients."""
    M, K, N = SIZES
    sizes = {"q": N, "k": N // 4, "v": N // 4}  # grouped-query attention
    linears = {name: nn.Linear(K, size, bias=False, dtype=dtype) for name, size in sizes.items()}
    group = LoRAGroup.from_linears(linears, RANK, SCALING * RANK)
    copies = [copy.deepcopy(linear) for linear in linears.values()]
    apart = [LoRALinear.from_linear(linear, RANK, SCALING * RANK) for linear in copies]
    pefts = [peft_layer(copy.deepcopy(linear), [RANK], SCALING) for linear in linears.values()]
    x, want = torch.randn(M, K, dtype=dtype).requires_grad_(), []
    for (name, linear), *three in zip(linears.items(), apart, pefts, strict=True):
        A, B = _adapter(K, sizes[name])
        for layer in (group.member(name), *three):
            _set(layer, A, B)
        want.append(reference.lora_linear(*_double(x, linear.weight, A, B, SCALING)))
    calls: Layers = {
        "ours": (group, trained(group)),
        "three LoRALinear": (lambda x: [layer(x) for layer in apart], trained(*apart)),
        "PEFT's": (lambda x: [layer(x) for layer in pefts], trained(*pefts)),
    }
    errors = baselines.errors(calls, x, torch.cat(want, dim=1))
    row = partial(_row, dtype=dtype, errors=errors, eager=errors["PEFT's"])
    width, dys = sum(sizes.values()), [torch.randn(M, size, dtype=dtype) for size in sizes.values()]
    yield row("q, k, v step", sizes=(M, K, width)).time(baselines.steps(calls, x, dys), seconds)
    for module in (group, *apart, *pefts):
        module.eval()
    decoding = {name: partial(call, x[:1].detach()) for name, (call, _) in calls.items()}
    with torch.no_grad():
        token = row("q, k, v of a token", sizes=(1, K, width)).time(decoding, seconds)
    yield token


def adapters_row(dtype: torch.dtype, M: int, seconds: float) -> Row:
    """16 sequences of M/16 rows, without gradients, with 16, 4 and 1 adapters in turn: ours in one
    call, PEFT's loop."""
    from ..peft import fuse

    K, N = SERVED
    linear, x = nn.Linear(K, N, bias=False, dtype=dtype), torch.randn(16, M // 16, K, dtype=dtype)
    adapters, names = [_adapter(K, N) for _ in range(16)], adapter_names(16)
    stock = peft_layer(linear, [RANK] * 16, SCALING).eval()
    for name, (A, B) in zip(names, adapters, strict=True):
        _set(stock, A, B, name)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(stock)))[0], "PEFT's": stock}
    x64, W64 = _double(x, linear.weight)
    calls, errors = {}, {}
    with torch.no_grad():
        for E in (16, 4, 1):
            index = torch.arange(16)[:, None].expand(16, M // 16) % E
            As, Bs = ([pair[i].double() for pair in adapters[:E]] for i in range(2))
            want = reference.multi_lora_linear(x64, W64, As, Bs, index, [SCALING] * E)
            served = [names[i % E] for i in range(16)]
            for name, layer in layers.items():
                key = f"{name}, {E}" if E < 16 else name
                calls[key] = partial(layer, x, adapter_names=served)
                errors[key] = tolerance.rms_error(calls[key](), want)
        row = _row("16 adapters", dtype, (M, K, N), errors, errors["PEFT's"])
        return row.time(calls, seconds)


def levels_row(dtype: torch.dtype, seconds: float) -> Row:
    """A step with hierarchical levels of rank 8, 16 and 32: in one call, as a call each, as three
    active adapters of PEFT's."""
    M, K, N = SIZES
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    layer = HierarchicalLoRALinear.from_linear(copy.deepcopy(linear), LEVELS, 16.0)
    peft = peft_layer(copy.deepcopy(linear), LEVELS, SCALING)
    x, dy = torch.randn(M, K, dtype=dtype).requires_grad_(), torch.randn(M, N, dtype=dtype)
    A, B = torch.randn(sum(LEVELS), K) / K**0.5, torch.randn(N, sum(LEVELS)) / 4
    scales = [w * s for w, s in zip(layer.weights, layer.level_scales, strict=True)]
    _set(layer, A, B)
    As, Bs = A.split(LEVELS), B.split(LEVELS, dim=1)
    for name, a, b, scale in zip(adapter_names(3), As, Bs, scales, strict=True):
        _set(peft, a, b, name)
        peft.scaling[name] = scale
    leaves = [t.clone().requires_grad_() for t in (*As, *Bs)]

    def apart(x: Tensor) -> Tensor:
        y = lora_linear(x, linear.weight.detach(), leaves[0], leaves[3], scales[0])
        for i in (1, 2):
            y = y + lora_linear(x, None, leaves[i], leaves[3 + i], scales[i])
        return y

    calls: Layers = {
        "ours": (layer, trained(layer)),
        "three calls": (apart, leaves),
        "PEFT's": (peft, trained(peft)),
    }
    gate = torch.cat([torch.full((r,), s) for r, s in zip(LEVELS, scales, strict=True)])
    want = reference.lora_linear(*_double(x, linear.weight, A, B), rank_gate=gate.double())
    errors = baselines.errors(calls, x, want)
    row = _row("three levels step", dtype, SIZES, errors, errors["PEFT's"], ranks=sum(LEVELS))
    return row.time(baselines.steps(calls, x, dy), seconds)


def switching_row(seconds: float) -> Row:
    """Another of 16 adapters made the active one, by PEFT's `set_adapter`; microseconds a layer."""
    from ..peft import fuse

    _, K, N = SIZES
    stock = peft_layer(nn.Linear(K, N, bias=False), [RANK] * 16, SCALING)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(stock)))[0], "PEFT's": stock}
    turn = itertools.cycle(adapter_names(16))
    calls = {
        name: lambda layer=layer: layer.set_adapter(next(turn)) for name, layer in layers.items()
    }
    return _row("switching", torch.float32, (0, K, N), {}, 0.0).time(calls, seconds)


def _row(
    what: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    errors: dict[str, float],
    eager: float,
    *,
    rounded: torch.dtype | None = None,
    ranks: int = 0,
) -> Row:
    """A row whose errors are judged; eager: plain PyTorch's; rounded: to what, x's dtype if None;
    ranks: those that are added up, where the adapter makes the larger part of the result."""
    M, K, N = sizes
    row = Row(what=what, dtype=dtype_name(dtype), M=M, K=K, N=N, R=RANK)
    row.judge(errors, eager, tolerance.unit_roundoff(rounded or dtype), (K, ranks))
    return row


def _adapter(K: int, N: int) -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / RANK**0.5


def _set(layer: Any, A: Tensor, B: Tensor, name: str = "default") -> None:
    """Have a layer of ours or of PEFT's an adapter of these numbers, in the dtype that it has."""
    with torch.no_grad():
        for held, t in ((layer.lora_A, A), (layer.lora_B, B)):
            (held if isinstance(held, Tensor) else held[name].weight).copy_(t)


def _double(*args: Any) -> list[Any]:
    return [t.detach().double() if isinstance(t, Tensor) else t for t in args]


class Variants(Suite):
    """DoRA, groups, several adapters, levels."""

    kind, option = "variants", "variants"
    unused = "shapes model rows ranks dropout device baseline"

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        torch.manual_seed(0)
        for name in args.dtypes:
            dtype: torch.dtype = getattr(torch, name)
            yield norm_row(dtype, args.seconds)
            yield dora_row(dtype, args.seconds)
            yield from group_rows(dtype, args.seconds)
            for M in (16, 512):
                yield adapters_row(dtype, M, args.seconds)
            yield levels_row(dtype, args.seconds)
        yield switching_row(args.seconds)
