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
from ..oracle import reference
from ..oracle.case import dtype_name
from ..quantization import quantize_4bit
from .baselines import adapter_names, peft_layer
from .results import Facts, Row
from .table import Call, Entry, Suite, layer_call, set_checks, timed

SIZES = (512, 2048, 2048)  # M, K, N
SERVED = (4096, 4096)  # K, N of the layer that several adapters share
RANK, SCALING = 16, 2.0
LEVELS = (8, 16, 32)


def norm_entry(dtype: torch.dtype) -> Entry:
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
    timed = {name: Call(forwards=[call]) for name, call in calls.items()}
    want = {name: four_bit if "NF4" in name else dense for name in calls}
    # All that is rounded is rounded to float32; PEFT's expression rounds to W's dtype.
    set_checks(timed, want, "panels", torch.float32, (K,))
    return _entry("row norm", dtype, SIZES, timed, "call")


def dora_entry(dtype: torch.dtype) -> Entry:
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
    calls = {name: layer_call(layer, x, dy) for name, layer in layers.items()}
    set_checks(calls, want, "PEFT's DoRA", dtype, (K,))
    return _entry("DoRA", dtype, SIZES, calls, "step")


def group_entries(dtype: torch.dtype) -> Iterator[Entry]:
    """q, k and v with adapters as a group, as three layers, as three of PEFT's: a step, and one row
    of x without gradients."""
    M, K, N = SIZES
    sizes = {"q": N, "k": N // 4, "v": N // 4}  # grouped-query attention
    linears = {name: nn.Linear(K, size, bias=False, dtype=dtype) for name, size in sizes.items()}
    group = LoRAGroup.from_linears(linears, RANK, SCALING * RANK)
    copies = [copy.deepcopy(linear) for linear in linears.values()]
    apart = _SideBySide(LoRALinear.from_linear(linear, RANK, SCALING * RANK) for linear in copies)
    pefts = _SideBySide(
        peft_layer(copy.deepcopy(linear), [RANK], SCALING) for linear in linears.values()
    )
    x, want = torch.randn(M, K, dtype=dtype).requires_grad_(), []
    for (name, linear), *three in zip(linears.items(), apart, pefts, strict=True):
        A, B = _adapter(K, sizes[name])
        for layer in (group.member(name), *three):
            _set(layer, A, B)
        want.append(reference.lora_linear(*_double(x, linear.weight, A, B, SCALING)))
    width, dys = sum(sizes.values()), [torch.randn(M, size, dtype=dtype) for size in sizes.values()]

    def build_calls(x: Tensor, want: Tensor) -> dict[str, Call]:
        """q, k and v of x side by side."""
        calls = {
            "ours": layer_call(group, x, dys),
            "three LoRALinear": layer_call(apart, x, dys),
            "PEFT's": layer_call(pefts, x, dys),
        }
        return set_checks(calls, want, "PEFT's", dtype, (K,))

    y = torch.cat(want, dim=1)
    yield _entry("q, k, v", dtype, (M, K, width), build_calls(x, y), "step")
    for module in (group, apart, pefts):
        module.eval()
    yield _entry("q, k, v", dtype, (1, K, width), build_calls(x[:1].detach(), y[:1]), "decoding")


class _SideBySide(nn.ModuleList):
    """Layers of one x."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def adapters_entry(dtype: torch.dtype, M: int) -> Entry:
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
    calls, wants = {}, {}
    with torch.no_grad():
        for E in (16, 4, 1):
            index = torch.arange(16)[:, None].expand(16, M // 16) % E
            As, Bs = ([pair[i].double() for pair in adapters[:E]] for i in range(2))
            want = reference.multi_lora_linear(x64, W64, As, Bs, index, [SCALING] * E)
            served = [names[i % E] for i in range(16)]
            for name, layer in layers.items():
                key = f"{name}, {E}" if E < 16 else name
                calls[key] = Call(forwards=[partial(layer, x, adapter_names=served)])
                wants[key] = want
        set_checks(calls, wants, "PEFT's", dtype, (K,))
    return _entry("16 adapters", dtype, (M, K, N), calls, "decoding")


def levels_entry(dtype: torch.dtype) -> Entry:
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

    calls = {
        "ours": layer_call(layer, x, dy),
        "three calls": layer_call(apart, x, dy, leaves, frozen=[linear.weight]),
        "PEFT's": layer_call(peft, x, dy),
    }
    gate = torch.cat([torch.full((r,), s) for r, s in zip(LEVELS, scales, strict=True)])
    want = reference.lora_linear(*_double(x, linear.weight, A, B), rank_gate=gate.double())
    # The adapter makes the larger part of y, a sum over the ranks.
    set_checks(calls, want, "PEFT's", dtype, (K, sum(LEVELS)))
    return _entry("three levels", dtype, SIZES, calls, "step")


def switching_entry() -> Entry:
    """Another of 16 adapters made the active one, by PEFT's `set_adapter`; nothing is computed."""
    from ..peft import fuse

    _, K, N = SIZES
    stock = peft_layer(nn.Linear(K, N, bias=False), [RANK] * 16, SCALING)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(stock)))[0], "PEFT's": stock}
    turn = itertools.cycle(adapter_names(16))
    calls = {name: Call(forwards=[partial(_switch, layer, turn)]) for name, layer in layers.items()}
    return _entry("switching", torch.float32, (0, K, N), calls, "call")


def _switch(layer: Any, names: Iterator[str]) -> None:
    layer.set_adapter(next(names))


def _entry(
    what: str, dtype: torch.dtype, sizes: tuple[int, int, int], calls: dict[str, Call], mode: str
) -> Entry:
    M, K, N = sizes
    key = Row(what=what, dtype=dtype_name(dtype), M=M, K=K, N=N, R=RANK)
    return Entry(key=key, calls=calls, modes=[(mode, "warm")])


def _adapter(K: int, N: int) -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / RANK**0.5


def _set(layer: Any, A: Tensor, B: Tensor, name: str = "default") -> None:
    """Have a layer of ours or of PEFT's an adapter of these numbers, in the dtype that it has."""
    with torch.no_grad():
        for factor, t in ((layer.lora_A, A), (layer.lora_B, B)):
            (factor if isinstance(factor, Tensor) else factor[name].weight).copy_(t)


def _double(*args: Any) -> list[Any]:
    return [t.detach().double() if isinstance(t, Tensor) else t for t in args]


def entries(args: argparse.Namespace, facts: Facts) -> Iterator[Entry]:
    """Yield DoRA, groups, several adapters, levels, and switching."""
    torch.manual_seed(0)
    for name in args.dtypes:
        dtype: torch.dtype = getattr(torch, name)
        yield norm_entry(dtype)
        yield dora_entry(dtype)
        yield from group_entries(dtype)
        for M in (16, 512):
            yield adapters_entry(dtype, M)
        yield levels_entry(dtype)
    yield switching_entry()


SUITE = Suite(
    kind="variants",
    option="variants",
    unused="shapes model rows ranks dropout device baseline",
    rows=timed(entries),
)
