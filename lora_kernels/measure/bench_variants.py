"""`lora-kernels bench --variants`: DoRA over LoRA, and its row norm; projections of one x as a
group; several adapters in a batch; hierarchical levels; switching.

Times are medians of calls that take turns in one process, warm. A step is forward and backward with
x needing a gradient. Errors are rms, relative to float64 on the same numbers; a call of ours whose
error is above the tolerance's, beside that of plain PyTorch, gets ✗ instead of a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, selection, timing
from ..core import reference
from ..layers import DoRALinear, HierarchicalLoRALinear, LoRAGroup, LoRALinear
from ..quantization import quantize_4bit
from . import compare, tolerance
from .case import dtype_name

SIZES = (512, 2048, 2048)  # M, K, N
SERVED = (4096, 4096)  # K, N of the layer that several adapters share
RANK, SCALING = 16, 2.0


def rows(dtypes: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The table, a row at a time."""
    for name in dtypes:
        dtype: torch.dtype = getattr(torch, name)
        yield norm_row(dtype, seconds)
        yield step_row(dtype, seconds)
        yield from group_rows(dtype, seconds)
        for M in (16, 512):
            yield adapters_row(dtype, M, seconds)
        yield levels_row(dtype, seconds)
    yield switching_row(seconds)


def norm_row(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Norms of the rows of W + s·B·A: ours, by panels of library products, as PEFT writes them."""
    torch.manual_seed(0)
    _, K, N = SIZES
    W = torch.randn(N, K).div_(K**0.5).to(dtype)
    A, B = torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / RANK**0.5
    codes = quantize_4bit(W)

    def panels() -> Tensor:
        with selection.backend("eager"):
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
    # All that is rounded is rounded to float32.
    u = tolerance.unit_roundoff(torch.float32)
    return _row("row norm", dtype, SIZES, calls, seconds, errors, "panels", u)


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
    return _row("DoRA step", dtype, SIZES, calls, seconds, errors, "PEFT's DoRA")


def group_rows(dtype: torch.dtype, seconds: float) -> Iterator[dict[str, Any]]:
    """q, k and v with adapters as a group, as three layers, as three of PEFT's: a step, and one row
    of x without gradients."""
    torch.manual_seed(0)
    M, K, N = SIZES
    sizes = {"q": N, "k": N // 4, "v": N // 4}  # grouped-query attention
    linears = {name: nn.Linear(K, size, bias=False, dtype=dtype) for name, size in sizes.items()}
    alpha = SCALING * RANK
    group = LoRAGroup.from_linears(linears, RANK, alpha)
    apart = [LoRALinear.from_linear(copy.deepcopy(m), RANK, alpha) for m in linears.values()]
    pefts = [_peft(copy.deepcopy(m), [RANK]) for m in linears.values()]
    dys = [torch.randn(M, size, dtype=dtype) for size in sizes.values()]
    x, want = torch.randn(M, K, dtype=dtype).requires_grad_(), []
    with torch.no_grad():
        for linear, name, one, peft in zip(linears.values(), sizes, apart, pefts, strict=True):
            A, B = torch.randn(RANK, K) / K**0.5, torch.randn(sizes[name], RANK) / RANK**0.5
            for held in (group.member(name), one):
                held.lora_A.copy_(A), held.lora_B.copy_(B)  # type: ignore[union-attr]
            _set_peft(peft, [A], [B])
            x64, W64, A64, B64 = (t.double() for t in (x, linear.weight, A, B))
            want.append(reference.lora_linear(x64, W64, A64, B64, SCALING))

    def step(call: Callable[[Tensor], Any], *modules: nn.Module) -> Callable[[], object]:
        inputs = [x, *(p for m in modules for p in m.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(call(x), inputs, dys)

    forwards: dict[str, tuple[Callable[[Tensor], Any], list[nn.Module]]] = {
        "ours": (group, [group]),
        "three LoRALinear": (lambda x: [layer(x) for layer in apart], [*apart]),
        "PEFT's": (lambda x: [layer(x) for layer in pefts], pefts),
    }
    calls = {name: step(call, *modules) for name, (call, modules) in forwards.items()}
    errors = {
        name: _error(torch.cat([*call(x)], dim=1), torch.cat(want, dim=1))
        for name, (call, _) in forwards.items()
    }
    whole = M, K, sum(sizes.values())
    yield _row("q, k, v step", dtype, whole, calls, seconds, errors, "PEFT's")
    token = x[:1].detach()

    def decode(call: Callable[[Tensor], Any]) -> Callable[[], object]:
        def decoding() -> object:
            with torch.no_grad():
                return call(token)

        return decoding

    for module in (group, *apart, *pefts):
        module.eval()
    calls = {name: decode(call) for name, (call, _) in forwards.items()}
    whole = 1, *whole[1:]
    yield _row("q, k, v of a token", dtype, whole, calls, seconds, errors, "PEFT's")


def adapters_row(dtype: torch.dtype, M: int, seconds: float) -> dict[str, Any]:
    """16 sequences of M/16 rows, without gradients, with 16, 4 and 1 adapters in turn: ours in one
    call, PEFT's loop."""
    from ..peft import fuse

    torch.manual_seed(0)
    K, N = SERVED
    linear, x = nn.Linear(K, N, bias=False, dtype=dtype), torch.randn(16, M // 16, K, dtype=dtype)
    A = [torch.randn(RANK, K) / K**0.5 for _ in range(16)]
    B = [torch.randn(N, RANK) / RANK**0.5 for _ in range(16)]
    stock = _peft(linear, [RANK] * 16).eval()
    with torch.no_grad():
        _set_peft(stock, A, B)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(stock)))[0], "PEFT's": stock}
    calls: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    for name, layer in layers.items():
        for E in (16, 4, 1):
            names = [f"a{i % E}" for i in range(16)]
            key = f"{name}, {E}" if E < 16 else name

            def call(layer: nn.Module = layer, names: list[str] = names) -> Tensor:
                with torch.no_grad():
                    y: Tensor = layer(x, adapter_names=names)
                return y

            index = torch.arange(16)[:, None].expand(16, M // 16) % E
            A64, B64 = ([t.double() for t in ts[:E]] for ts in (A, B))
            W64, scales = linear.weight.detach().double(), [SCALING] * E
            want = reference.multi_lora_linear(x.double(), W64, A64, B64, index, scales)
            calls[key], errors[key] = call, _error(call(), want)
    return _row("16 adapters", dtype, (M, K, N), calls, seconds, errors, "PEFT's")


def levels_row(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A step with hierarchical levels of rank 8, 16 and 32: in one call, as a call each, as three
    active adapters of PEFT's."""
    torch.manual_seed(0)
    M, K, N = SIZES
    ranks = (8, 16, 32)
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    layer = HierarchicalLoRALinear.from_linear(copy.deepcopy(linear), ranks, 16.0)
    peft = _peft(copy.deepcopy(linear), list(ranks))
    x, dy = torch.randn(M, K, dtype=dtype).requires_grad_(), torch.randn(M, N, dtype=dtype)
    A, B = torch.randn(sum(ranks), K) / K**0.5, torch.randn(N, sum(ranks)) / 4
    scales = [w * s for w, s in zip(layer.weights, layer.level_scales, strict=True)]
    As, Bs = A.split(ranks), B.split(ranks, dim=1)
    with torch.no_grad():
        layer.lora_A.copy_(A), layer.lora_B.copy_(B)
        _set_peft(peft, As, Bs)
        peft.scaling.update({f"a{i}": scale for i, scale in enumerate(scales)})  # type: ignore[operator,union-attr]
    leaves = [t.clone().requires_grad_() for t in (*As, *Bs)]

    def apart(x: Tensor) -> Tensor:
        y = functional.lora_linear(x, linear.weight.detach(), leaves[0], leaves[3], scales[0])
        for i in (1, 2):
            y = y + functional.lora_linear(x, None, leaves[i], leaves[3 + i], scales[i])
        return y

    forwards: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "ours": (layer, [p for p in layer.parameters() if p.requires_grad]),
        "three calls": (apart, leaves),
        "PEFT's": (peft, [p for p in peft.parameters() if p.requires_grad]),
    }
    gate = torch.cat([torch.full((r,), s) for r, s in zip(ranks, scales, strict=True)])
    x64, W64, A64, B64 = (t.detach().double() for t in (x, linear.weight, A, B))
    want = reference.lora_linear(x64, W64, A64, B64, rank_gate=gate.double())
    calls = {
        name: lambda call=call, inputs=inputs: torch.autograd.grad(call(x), [x, *inputs], dy)
        for name, (call, inputs) in forwards.items()
    }
    errors = {name: _error(call(x), want) for name, (call, _) in forwards.items()}
    return _row(
        "three levels step", dtype, SIZES, calls, seconds, errors, "PEFT's", ranks=sum(ranks)
    )  # fmt: skip


def switching_row(seconds: float) -> dict[str, Any]:
    """Another of 16 adapters made the active one, by PEFT's `set_adapter`; microseconds a layer."""
    from ..peft import fuse

    _, K, N = SIZES
    stock = _peft(nn.Linear(K, N, bias=False), [RANK] * 16)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(stock)))[0], "PEFT's": stock}
    turn = itertools.count()
    calls = {
        name: lambda layer=layer: layer.set_adapter(f"a{next(turn) % 16}")
        for name, layer in layers.items()
    }
    return _row("switching", torch.float32, (0, K, N), calls, seconds, {}, "PEFT's")


def _peft(linear: nn.Linear, ranks: list[int]) -> nn.Module:
    """PEFT's layer over it with adapters a0, a1, ..., all active, each scaled by SCALING."""
    from peft import LoraConfig, inject_adapter_in_model

    model: nn.Module = nn.Sequential(linear)
    for i, r in enumerate(ranks):
        config = LoraConfig(r=r, lora_alpha=int(SCALING * r), target_modules=["0"])
        model = inject_adapter_in_model(config, model, f"a{i}")
    layer: Any = model[0]  # type: ignore[index]
    layer.set_adapter([f"a{i}" for i in range(len(ranks))])
    return layer.train()  # type: ignore[no-any-return]


def _set_peft(layer: Any, A: Sequence[Tensor], B: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        layer.lora_A[f"a{i}"].weight.copy_(a)
        layer.lora_B[f"a{i}"].weight.copy_(b)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().view(want.shape) - want).norm() / want.norm())


def _row(
    what: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    calls: Mapping[str, Callable[..., Any]],
    seconds: float,
    errors: dict[str, float],
    eager: str,
    unit_roundoff: float | None = None,
    ranks: int = 0,
) -> dict[str, Any]:
    """eager: of which call the error is plain PyTorch's; unit_roundoff: dtype's where None; ranks:
    that are added up, where the adapter makes the larger part of the result."""
    M, K, N = sizes
    row = {
        "what": what, "dtype": dtype_name(dtype), "M": M, "K": K, "N": N, "R": RANK
    }  # fmt: skip
    u = unit_roundoff or tolerance.unit_roundoff(dtype)
    limit = tolerance.rms_limit(errors.get(eager, 0.0), u, (K, ranks))
    judged = [name for name in errors if compare.is_ours(name)]
    misses = {
        name: f"y MISS: rms {errors[name] / u:.3g} u, limit {limit / u:.3g} u"
        for name in judged
        if not errors[name] <= limit  # NaN is not
    }
    calls = {name: call for name, call in calls.items() if name not in misses}
    times = timing.interleave(calls, seconds=seconds, yardstick=compare.yardstick(row))
    return {
        **row, "seconds": {name: asdict(t) for name, t in times.items()}, "errors": errors,
        "misses": misses, "judged": judged,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row as text: ratios before milliseconds."""
    seconds = {name: times["p50"] for name, times in row["seconds"].items()}
    shape = f"{row['M']}×{row['K']}×{row['N']} r={row['R']}"
    words = [f"{row['what']}, {row['dtype']} {shape}:"]
    if {"LoRA", "ours"} <= seconds.keys():
        peft = seconds["PEFT's DoRA"] / seconds["PEFT's LoRA"]
        words.append(f"over LoRA {seconds['ours'] / seconds['LoRA']:.2f} (PEFT's {peft:.2f});")
    if {"ours, 1", "ours"} <= seconds.keys():
        peft = seconds["PEFT's"] / seconds["PEFT's, 1"]
        words.append(f"over one {seconds['ours'] / seconds['ours, 1']:.2f} (PEFT's {peft:.2f});")
    for name, t in seconds.items():
        ratio = f"{t / seconds['ours']:.2f} " if "ours" in seconds else ""
        words.append(f"{name} {ratio}({t * 1e3:.3g} ms)")
    words += [f"{name} ✗ ({text})" for name, text in row["misses"].items()]
    words += [f"rms {name} {error:.1e}" for name, error in row["errors"].items()]
    return "  ".join(words)
