"""Layers to test: small ones of each kind, and each variant beside its formula in plain PyTorch."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lora_kernels import layers
from lora_kernels.backends.cpu.heuristics import few_rows
from lora_kernels.bench.memory import held
from lora_kernels.choice import choose as selection
from lora_kernels.layers import LoRAConv1D, LoRAEmbedding, LoRALinear, QLoRALinear
from lora_kernels.ops import direct
from lora_kernels.oracle import tolerance
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
    assert_close_to_reference,
)

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16


# Formulas of a layer without its bias. x_dropped is D(x) / (1 - p) in the adapter's branch.

Params = dict[str, Tensor]


def lora(p: Params, x: Tensor, W: Tensor, scaling: float, x_dropped: Any = None) -> Tensor:
    x_dropped = x if x_dropped is None else x_dropped
    return x @ W.T + (x_dropped @ p["lora_A"].T) @ p["lora_B"].T * scaling


def dora(
    p: Params,
    x: Tensor,
    W: Tensor,
    scaling: float,
    x_dropped: Any = None,
    z_dtype: torch.dtype | None = None,
) -> Tensor:
    norm = (W + scaling * p["lora_B"] @ p["lora_A"]).detach().norm(dim=1)
    z = lora(p, x, W, scaling, x_dropped)
    return p["magnitude"] / norm * (z if z_dtype is None else z.to(z_dtype).to(z.dtype))


def adalora(p: Params, x: Tensor, W: Tensor, scaling: float, x_dropped: Any = None) -> Tensor:
    gate = p["lora_E"] * p["rank_mask"] if "rank_mask" in p else p["lora_E"]
    return lora(p | {"lora_B": p["lora_B"] * gate}, x, W, scaling, x_dropped)


def levels_of(*ranks: int, alpha: float) -> Callable[[Params, Tensor, Tensor, float, Any], Tensor]:
    def hierarchical(
        p: Params, x: Tensor, W: Tensor, scaling: float, x_dropped: Any = None
    ) -> Tensor:
        y, first = x @ W.T, 0
        x = x if x_dropped is None else x_dropped
        for weight, rank in zip(p["level_weights"], ranks, strict=True):
            part = slice(first, first + rank)
            y = y + weight * alpha / rank * (x @ p["lora_A"][part].T) @ p["lora_B"][:, part].T
            first += rank
        return y

    return hierarchical


# Of a group: k has no adapter.
MEMBERS, TARGETS = {"q": 5, "k": 3, "v": 4}, ("q", "v")


def group(p: Params, x: Tensor, W: Tensor, scaling: float, x_dropped: Any = None) -> Tensor:
    """Each member by itself, concatenated."""
    A, B, weights = [*p["lora_A"].split(3)], [*p["lora_B"].split([5, 4])], W.split([5, 3, 4])
    ys = [
        lora({"lora_A": A.pop(0), "lora_B": B.pop(0)}, x, w, scaling, x_dropped)
        if name in TARGETS
        else x @ w.T
        for name, w in zip(MEMBERS, weights, strict=True)
    ]
    return torch.cat(ys, dim=-1)


def embedding(p: Params, x: Tensor, W: Tensor, scaling: float, x_dropped: Any = None) -> Tensor:
    return W[x] + scaling * p["lora_A"].T[x] @ p["lora_B"].T


# Every layer of one x


class Kind(NamedTuple):
    """A class of layers with a configuration, and what it has to compute."""

    cls: Any
    sizes: Any
    options: dict[str, Any] = {}  # noqa: RUF012
    formula: Callable[..., Tensor] = lora
    rank: Any = 3
    start: str = "lora_B"  # the parameter that starts at zero

    @property
    def is_quantized(self) -> bool:
        return issubclass(self.cls, layers.QLoRALayer)

    @property
    def is_embedding(self) -> bool:
        return self.cls is LoRAEmbedding

    @property
    def out_features(self) -> int:
        size = self.sizes[1]
        return size if isinstance(size, int) else sum(size.values())

    def build(self, **options: Any) -> Any:
        """Build an untrained layer."""
        return self.cls(*self.sizes, self.rank, 6, **self.options | options)

    def make(self, seed: int = 0, **options: Any) -> Any:
        """Build a layer with r = 3 and alpha = 6, as if it had been trained, one rank pruned."""
        torch.manual_seed(seed)
        layer = self.build(**options)
        with torch.no_grad():
            for name, param in layer.named_parameters():
                if not self.is_quantized or name in ("lora_B", "lora_E", "level_weights"):
                    param.copy_(torch.randint(-4, 5, param.shape))
                if name in ("magnitude", "level_weights"):  # where zeros leave no adapter
                    param.copy_(torch.randint(1, 5, param.shape))
            if issubclass(self.cls, layers.AdaLoRALinear):
                layer.rank_mask[1] = False
        return layer

    def input(self, *shape: int, dtype: torch.dtype = f32) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        if self.is_embedding:
            return torch.randint(self.sizes[0], shape, generator=generator)
        return torch.randint(-4, 5, (*shape, self.sizes[0]), generator=generator).to(dtype)

    def weight(self, layer: Any, dtype: torch.dtype = f32) -> Tensor:
        """Return W [N, K]; of an embedding [K, N]."""
        if self.is_quantized:
            W: Tensor = layer.quantized.dequantize(layer.quantized.dtype).to(dtype)
            return W
        W = layer.weight.detach().to(dtype)
        return W.T if self.cls is LoRAConv1D else W

    def base(self, layer: Any, x: Tensor) -> Tensor:
        """Compute the layer without its adapter."""
        if self.is_embedding:
            return F.embedding(x, layer.weight)
        return F.linear(x, self.weight(layer).to(x.dtype), layer.bias)

    def result(
        self, layer: Any, x: Tensor, x_dropped: Any = None, dtype: torch.dtype = f32
    ) -> Tensor:
        """Compute the formula in plain PyTorch. x_dropped: in the adapter's branch."""
        named = [*layer.named_parameters(), *layer.named_buffers()]
        p = {name: t.detach() for name, t in named}
        p = {name: t.to(dtype) if t.is_floating_point() else t for name, t in p.items()}
        y = self.formula(p, x, self.weight(layer, dtype), layer.alpha / 3, x_dropped)
        return y if p.get("bias") is None else y + p["bias"]

    def assert_same(self, got: Any, want: Any) -> None:
        """Integers are summed exactly in any order. 4-bit weights and DoRA's norm are none."""
        is_exact = not self.is_quantized and not issubclass(self.cls, layers.DoRALinear)
        (assert_bitwise_equal if is_exact else assert_close_derived)(got, want)


def kinds_of(
    name: str, options: Any = None, formula: Any = lora, second: Any = None, **fields: Any
) -> dict[str, Kind]:
    """Return the dense layer and, if there is one, its 4-bit form. second: of the sizes."""
    dense = Kind(getattr(layers, name), (12, second or 10), options or {}, formula, **fields)
    found = {name: dense}
    if hasattr(layers, f"Q{name}"):
        cls, sizes = getattr(layers, f"Q{name}"), (70, second or 33)
        found[f"Q{name}"] = dense._replace(cls=cls, sizes=sizes)
    return found


KINDS: dict[str, Kind] = {
    "linear": Kind(LoRALinear, (12, 10)),
    "linear_bias": Kind(LoRALinear, (12, 10), {"bias": True}),
    "conv1d": Kind(LoRAConv1D, (12, 10)),
    "quantized": Kind(QLoRALinear, (70, 33)),
    "quantized_bias": Kind(QLoRALinear, (70, 33), {"bias": True}),
    "embedding": Kind(LoRAEmbedding, (53, 72), {}, embedding, start="lora_A"),
    **kinds_of("StableLoRALinear"),
    **kinds_of("MemoryEfficientLoRALinear"),
    **kinds_of("LoRAPlusLinear"),
    **kinds_of("DoRALinear", {"bias": True}, dora),
    **kinds_of("AdaLoRALinear", {"bias": True}, adalora, start="lora_E"),
    **kinds_of(
        "HierarchicalLoRALinear", {"weights": (0.7, -0.4)}, levels_of(2, 1, alpha=6), rank=(2, 1)
    ),
    **kinds_of("LoRAGroup", {"bias": True, "targets": TARGETS}, group, MEMBERS),
}


def concatenated(y: Any) -> Tensor:
    """Return a layer's result, or a group's results as one tensor."""
    return torch.cat(y, dim=-1) if isinstance(y, tuple) else y


def run(layer: Any, x: Tensor) -> Tensor:
    return concatenated(layer(x))


def gradients(layer: Any, x: Tensor, call: Any = None) -> dict[str, Tensor | None]:
    """y and the gradients of x and of all parameters, from the same random state."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = run(layer if call is None else call, x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | grads


def skip_unless_few(rows: int, dtype: torch.dtype, is_quantized: bool = False) -> None:
    """Skip a test of the GEMV kernel if it takes fewer rows, as scalar code may."""
    if rows > few_rows(dtype, is_quantized, 0):
        pytest.skip("this machine or build lacks the instruction set")


def watch_direct_calls(patch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """List what `ops.direct.call` returns: None if `lora_linear` has to be called."""
    answers, whole = [], direct.call

    def record(*args: Any, **kwargs: Any) -> Tensor | None:
        answers.append(whole(*args, **kwargs))
        return answers[-1]

    patch.setattr(direct, "call", record)
    return answers


@contextmanager
def general_way() -> Iterator[None]:
    """Make layers call `lora_linear`, or PEFT's their plan, in place of `ops.direct.call`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "call", lambda *args, **kwargs: None)
        yield


# Variants of LoRA

K, N, M = 67, 72, 33  # N times the smallest rank and N itself: two draws are 256 elements and more
# Float32 sums of at most 72 products of order 1 err by less than 72 · 2⁻²⁴ < 2⁻¹⁷; a result is made
# of no more than four, added in two orders.
CLOSE = {"rtol": 2.0**-14, "atol": 2.0**-14}


# Name -> formula, and what the class takes beside sizes, alpha and dtypes.
VARIANTS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "LoRALinear": (lora, {"r": 5, "scaling": "rslora"}),
    "StableLoRALinear": (lora, {"r": 5}),
    "MemoryEfficientLoRALinear": (lora, {"r": 5}),
    "LoRAPlusLinear": (lora, {"r": 5}),
    "DoRALinear": (dora, {"r": 5}),
    "AdaLoRALinear": (adalora, {"r": 5}),
    "HierarchicalLoRALinear": (
        levels_of(4, 3, alpha=10),
        {"ranks": (4, 3), "weights": (0.7, -0.4)},
    ),
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
    W = layer.dense_weight().to(dtype)
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
            W = layer.quantized.dequantize(f32) if name[0] == "Q" else layer.dense_weight()
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
    assert not hidden(y, [*layer.parameters(), *layer.buffers()])


def hidden(y: Tensor, known: Iterable[Tensor] = ()) -> list[str]:
    """The attributes of the graph's nodes that hold a tensor, however deep, in other memory than
    that of the known ones."""
    memory = {t.untyped_storage().data_ptr() for t in known}

    def inside(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(inside, value.values()))
        if isinstance(value, (tuple, list, set)):
            return any(map(inside, value))
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in memory

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
        found += [
            f"{node.name()}.{key}"
            for key, value in own.items()
            if key not in ("layer", "block") and inside(value)
        ]
    return found
