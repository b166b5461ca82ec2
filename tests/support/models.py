"""Layers to test: small ones of each kind, and each variant beside its formula in plain PyTorch."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lora_kernels import layers
from lora_kernels.backends.cpu.linear import PreparedCall
from lora_kernels.bench.memory import held
from lora_kernels.choice import choose as selection
from lora_kernels.layers import LoRAConv1D, LoRAEmbedding, LoRALinear, QLoRALinear
from lora_kernels.oracle import tolerance
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
    assert_close_to_reference,
)

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16


# Dense, transposed, 4-bit layers and embeddings


class Kind(NamedTuple):
    cls: Any
    sizes: tuple[int, int]
    options: dict[str, Any] = {}  # noqa: RUF012

    def make(self, seed: int = 0, **options: Any) -> Any:
        """With r = 3 and alpha = 6, as if it had been trained."""
        torch.manual_seed(seed)
        layer = self.cls(*self.sizes, 3, 6, **self.options | options)
        with torch.no_grad():
            for param in [layer.lora_B] if self.cls is QLoRALinear else layer.parameters():
                param.copy_(torch.randint(-4, 5, param.shape))
        return layer

    def input(self, *shape: int, dtype: torch.dtype = f32) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        if self.cls is LoRAEmbedding:
            return torch.randint(self.sizes[0], shape, generator=generator)
        return torch.randint(-4, 5, (*shape, self.sizes[0]), generator=generator).to(dtype)

    def base(self, layer: Any, x: Tensor) -> Tensor:
        """Compute the layer without its adapter."""
        if self.cls is LoRAEmbedding:
            return F.embedding(x, layer.weight)
        if self.cls is QLoRALinear:
            return F.linear(x, layer.weight4bit.dequantize(x.dtype), layer.bias)
        return F.linear(x, layer.weight if self.cls is LoRALinear else layer.weight.T, layer.bias)

    def assert_same(self, got: Any, want: Any) -> None:
        (assert_close_derived if self.cls is QLoRALinear else assert_bitwise_equal)(got, want)


KINDS = {
    "linear": Kind(LoRALinear, (12, 10)),
    "linear_bias": Kind(LoRALinear, (12, 10), {"bias": True}),
    "conv1d": Kind(LoRAConv1D, (12, 10)),
    "quantized": Kind(QLoRALinear, (70, 33)),
    "quantized_bias": Kind(QLoRALinear, (70, 33), {"bias": True}),
    "embedding": Kind(LoRAEmbedding, (53, 72)),
}


def gradients(layer: Any, x: Tensor, run: Any = None) -> dict[str, Tensor | None]:
    """y and the gradients of x and of all parameters, from the same random state."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = (layer if run is None else run)(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | grads


def watch_prepared_calls(patch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Record the results of prepared calls from here on, None for a cache miss."""
    answers: list[Tensor | None] = []
    whole = PreparedCall.__call__

    def record(self: PreparedCall, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        answers.append(whole(self, x, bias))
        return answers[-1]

    patch.setattr(PreparedCall, "__call__", record)
    return answers


# Variants of LoRA

K, N, M = 67, 72, 33  # N times the smallest rank and N itself: two draws are 256 elements and more
Params = dict[str, Tensor]
# Float32 sums of at most 72 products of order 1 err by less than 72 · 2⁻²⁴ < 2⁻¹⁷; a result is made
# of no more than four, added in two orders.
CLOSE = {"rtol": 2.0**-14, "atol": 2.0**-14}


def lora(p: Params, x: Tensor, W: Tensor, scaling: float) -> Tensor:
    return x @ W.T + (x @ p["lora_A"].T) @ p["lora_B"].T * scaling


def dora(
    p: Params, x: Tensor, W: Tensor, scaling: float, z_dtype: torch.dtype | None = None
) -> Tensor:
    norm = (W + scaling * p["lora_B"] @ p["lora_A"]).detach().norm(dim=1)
    z = lora(p, x, W, scaling)
    return p["magnitude"] / norm * (z if z_dtype is None else z.to(z_dtype).to(z.dtype))


def adalora(p: Params, x: Tensor, W: Tensor, scaling: float) -> Tensor:
    return x @ W.T + (x @ p["lora_A"].T * p["lora_E"]) @ p["lora_B"].T * scaling


def hierarchical(p: Params, x: Tensor, W: Tensor, scaling: float) -> Tensor:
    y, first = x @ W.T, 0
    for weight, rank in zip(p["level_weights"], (4, 3), strict=True):
        part = slice(first, first + rank)
        y = y + weight * 10 / rank * (x @ p["lora_A"][part].T) @ p["lora_B"][:, part].T
        first += rank
    return y


# Name -> formula, and what the class takes beside sizes, alpha and dtypes.
VARIANTS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "LoRALinear": (lora, {"r": 5, "scaling": "rslora"}),
    "StableLoRALinear": (lora, {"r": 5}),
    "MemoryEfficientLoRALinear": (lora, {"r": 5}),
    "LoRAPlusLinear": (lora, {"r": 5}),
    "DoRALinear": (dora, {"r": 5}),
    "AdaLoRALinear": (adalora, {"r": 5}),
    "HierarchicalLoRALinear": (hierarchical, {"ranks": (4, 3), "weights": (0.7, -0.4)}),
    "LoRAConv1D": (lora, {"r": 5}),
}
NAMES = [*VARIANTS, *(f"Q{name}" for name in VARIANTS if hasattr(layers, f"Q{name}"))]
every_variant = pytest.mark.parametrize("name", NAMES)


def make(name: str, seed: int = 0, moved: bool = True, inner: int = K, **options: Any) -> Any:
    """A layer whose adapter is no longer at its start, unless it is to be."""
    torch.manual_seed(seed)
    _, own = VARIANTS[name.removeprefix("Q")]
    layer = getattr(layers, name)(inner, N, alpha=10, **{**own, **options})
    if moved:
        with torch.no_grad():
            for key, param in layer.named_parameters():
                if key in ("lora_B", "lora_E"):
                    param.copy_(torch.randn_like(param) / 3)
                elif key == "magnitude":
                    param.mul_(1 + torch.rand_like(param) / 2)
    return layer


def formula(name: str, layer: LoRALinear, dtype: torch.dtype) -> Callable[[Params, Tensor], Tensor]:
    function, _ = VARIANTS[name.removeprefix("Q")]
    W = layer._dense_weight().to(dtype)
    return lambda params, x: function(params, x, W, layer.scaling)


def adapter(layer: LoRALinear, dtype: torch.dtype) -> Params:
    return {
        name: param.detach().to(dtype).requires_grad_()
        for name, param in layer.named_parameters()
        if param.requires_grad
    }


def results(y: Tensor, x: Tensor, params: Params, dy: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(y, [x, *params.values()], dy)
    return dict(zip(["y", "x", *params], [y.detach(), *grads], strict=True))


def check(name: str, dtype: torch.dtype, inner: int = K) -> None:
    """Compare y and every gradient on the forced backend, adapters in float32, the default beside
    bfloat16."""
    function, _ = VARIANTS[name.removeprefix("Q")]
    drawn: list[list[Params]] = []
    for seed in range(60):  # 256 elements of the smallest, the weights of two levels aside
        layer = make(name, seed, inner=inner, dtype=dtype)
        x, dy = torch.randn(M, inner).to(dtype), torch.randn(M, N).to(dtype)
        with selection.backend("eager"):
            W = layer.weight4bit.dequantize(f32) if name[0] == "Q" else layer._dense_weight()
        params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        x_ = x.clone().requires_grad_()
        drawn.append([results(layer(x_), x_, params, dy)])
        for wide in (f64, f32):
            params, x_ = adapter(layer, wide), x.to(wide).requires_grad_()
            # As plain PyTorch would keep z.
            z = {"z_dtype": dtype} if function is dora and wide is f32 else {}
            y = function(params, x_, W.to(wide), layer.scaling, **z)
            drawn[-1].append(results(y, x_, params, dy.to(y.dtype)))
        # Plain PyTorch's result: rounded to x's dtype where that is the result's.
        drawn[-1][2] |= {key: drawn[-1][2][key].to(dtype) for key in ("x", "y")}
        if len(drawn) * min(t.numel() for t in drawn[0][1].values()) >= tolerance.POOL:
            break
    # The base GEMM rounds once more where the library makes it, and z where it is kept.
    assert_close_to_reference(
        *({key: [each[of][key] for each in drawn] for key in drawn[0][0]} for of in range(3)),
        lambda key, _: tolerance.unit_roundoff(dtype if key in ("x", "y", "magnitude") else f32),
        lambda _: (M, max(N, inner)) if dtype is f32 else (M, N, inner),
    )


def check_memory(
    name: str,
    dtype: torch.dtype,
    dropout: float = 0.25,
    cycles: bool = False,
    sizes: tuple[int, int] = (M, K),
) -> None:
    """The tensors alive between forward and backward, on the forced backend and strategy:
    x, P [M, R] in float32 and 16 bytes (for eager-gpu the mask), z in addition where c trains;
    beside them nothing but the vectors that c and g are. Counted twice: by hooks on what autograd
    saves, and as what the forward allocated and did not free, which sees also what a context would
    hide. cycles: the backend leaves garbage in cycles of references, as Triton's interpreter does.
    sizes: rows of x, and K."""
    rows, inner = sizes
    layer = make(name, inner=inner, dtype=dtype, dropout=dropout)
    x = torch.randn(rows, inner).to(dtype).requires_grad_()
    R, x_bytes = layer.lora_A.shape[0], rows * inner * dtype.itemsize
    want = x_bytes
    if dropout:  # the state of the mask, or the mask
        want += rows * inner if selection.is_eager_on_gpu("cpu") else 16
    if "MemoryEfficient" not in name:  # which makes P again
        want += rows * R * 4
    if "DoRA" in name:  # z; c, and the norm that the magnitude is divided by
        want += rows * N * dtype.itemsize + 2 * N * 4
    elif name.removeprefix("Q") in ("AdaLoRALinear", "HierarchicalLoRALinear"):
        want += R * 4  # g
    kept = held(lambda: layer(x), layer)  # a first call, which may make buffers to keep
    assert sum(kept.values()) == want, kept
    if cycles:
        gc.collect()
    gc.disable()  # what earlier tests left in cycles must not go just now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = layer(x)
        if cycles:
            gc.collect()
    gc.enable()
    alive = sum(event.self_cpu_memory_usage for event in profiled.events())
    # Of each level's weight · s PyTorch keeps s, a float64 for which it calls no hook.
    numbers = 8 * len(layer.ranks) if "Hierarchical" in name else 0
    assert alive == y.numel() * y.itemsize + want + numbers - x_bytes
    assert not hidden(y)


def hidden(y: Tensor) -> list[str]:
    """The attributes of the graph's nodes that hold a tensor, however deep."""

    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(inside, value.values()))
        if isinstance(value, (tuple, list, set)):
            return any(map(inside, value))
        return isinstance(value, Tensor)

    found, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad":  # of a parameter or of x
            continue
        own = getattr(node, "__dict__", {})
        found += [f"{node.name()}.{key}" for key, value in own.items() if inside(value)]
    return found
