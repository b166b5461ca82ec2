"""Layers that share their x on the GPU path, on CPU tensors, beside PEFT's own forward.

Every case compares y, dx and each gradient, and says how many down-projections were computed and
how many layers shared one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.backends.eager import siblings as eager_siblings
from lora_kernels.bench import baselines, counter
from lora_kernels.core import forced
from lora_kernels.core.problem import Choice, Strategy
from lora_kernels.integrations import FuseCallback
from lora_kernels.ops import siblings as blocks
from lora_kernels.peft import explain, fuse, siblings, swap, unfuse
from lora_kernels.peft.explain_rows import Row
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    R,
    activate,
    add_adapter,
    count_ops,
    in_float64,
    randomize,
    skip_without_kasa,
)

K, ROWS = 64, (2, 40)  # 80 rows, more than UPCAST_ROWS
SIZES = {"q": 64, "k": 32, "v": 32, "w": 64}
f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
ALL = ("q", "k", "v", "w")
pytestmark = pytest.mark.usefixtures("gpu_path")


class Shared:
    """How many down-projections were computed for siblings, and by how many layers used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts, self._lock = [0, 0], threading.Lock()
        self.is_rounded = False  # whether the last down-projections were rounded to 16 bits
        self.projected = 0  # how many layers' A the last down-projections had
        for i, name in enumerate(("down_projections", "sibling_linear")):
            monkeypatch.setattr(blocks, name, partial(self._count, i, getattr(blocks, name)))

    def _count(self, i: int, function: Any, *args: Any) -> Any:
        with self._lock:
            self.counts[i] += 1
            if i == 0:
                self.projected, self.is_rounded = len(args[1]), args[2]
        return function(*args)

    def take(self) -> tuple[int, int]:
        found, self.counts = tuple(self.counts), [0, 0]
        return found  # type: ignore[return-value]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Shared:
    return Shared(monkeypatch)


# Parents


def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kv = torch.cat([k, v], -1)
    return torch.tanh(q * kv + q)


class Parent(nn.Module):
    """Attention without attention. `way` of the parent and x calls the layers."""

    def __init__(self, way: Any = None, linear: Any = nn.Linear, **kwargs: Any) -> None:
        super().__init__()
        self.way = way or in_order
        for name, size in SIZES.items():
            setattr(self, name, linear(K, size, **kwargs))

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


class Stack(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = parent

    def forward(self, x: Tensor) -> Any:
        return self.parent(x)


def in_order(self: Any, x: Tensor) -> Tensor:
    return self.w(mix(self.q(x), self.k(x), self.v(x)))


def out_of_order(self: Any, x: Tensor) -> Tensor:
    v, q, k = self.v(x), self.q(x), self.k(x)
    return self.w(mix(q, k, v))


def twice(self: Any, x: Tensor) -> Tensor:
    return self.w(mix(self.q(x) + self.q(x), self.k(x), self.v(x) - self.k(x)))


def cross(self: Any, x: Tensor) -> Tensor:
    other = x.flip(1)
    return self.w(mix(self.q(x), self.k(other), self.v(other)))


def own_copies(self: Any, x: Tensor) -> Tensor:
    return self.w(mix(self.q(x), self.k(x.clone()), self.v(x.clone())))


def views(self: Any, x: Tensor) -> Tensor:
    return self.w(mix(self.q(x), self.k(x[:]), self.v(x.view(*ROWS, K))))


def alone(self: Any, x: Tensor) -> Tensor:
    return self.k(x)


def never(self: Any, x: Tensor) -> Tensor:
    return x.square()


def two_of_three(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.q(x), self.v(x)], -1)


def unused_results(self: Any, x: Tensor) -> Tensor:
    self.q(x), self.v(x)
    return self.k(x)


def last_unused(self: Any, x: Tensor) -> Tensor:
    q, k, _ = self.q(x), self.k(x), self.v(x)
    return torch.cat([q, k], -1)


def x_used_elsewhere(self: Any, x: Tensor) -> Tensor:
    return self.w(mix(self.q(x), self.k(x), self.v(x))) + x.tanh() * x


def changed_results(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    q *= 3.0
    k = self.k(x).add_(1.0)
    v = self.v(x)
    v.view(-1, v.shape[-1])[3] = 0.5
    return self.w(mix(q, k, v))


def changed_x_between(self: Any, x: Tensor) -> Tensor:
    """Without gradients of A, whose backward would need what x was."""
    h = x * 1.0
    for layer in (self.q, self.k, self.v, self.w):
        layer.lora_A["default"].weight.requires_grad_(False)
    q = self.q(h)
    h.mul_(2.0)
    return self.w(mix(q, self.k(h), self.v(h)))


def in_two_grad_modes(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        q = self.q(x)
    return self.w(mix(q, self.k(x), self.v(x)))


def one_after_the_other(self: Any, x: Tensor) -> Tensor:
    return self.w(self.q(torch.tanh(self.q(x))) + x.cos())


def each_another_x(self: Any, x: Tensor) -> Tensor:
    return self.w(x.tan()) + mix(self.q(x), self.k(x.sin()), self.v(x.cos()))


def flat_and_not(self: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, K)
    return self.w(mix(self.q(flat), self.k(flat), self.v(flat)))


def strided(self: Any, x: Tensor) -> Tensor:
    h = x.transpose(0, 1)
    return self.w(mix(self.q(h), self.k(h), self.v(h)))


def few_rows(self: Any, x: Tensor) -> Tensor:
    h = x[:, :32]
    return self.w(mix(self.q(h), self.k(h), self.v(h)))


def checkpointed_alone(self: Any, x: Tensor) -> Tensor:
    q: Any = checkpoint(self.q, x, use_reentrant=False)
    return self.w(mix(q, self.k(x), self.v(x)))


def checkpointed_alone_later(self: Any, x: Tensor) -> Tensor:
    q = self.q(x)
    k: Any = checkpoint(self.k, x, use_reentrant=False)
    return self.w(mix(q, k, self.v(x)))


def checkpointed_alone_reentrant(self: Any, x: Tensor) -> Tensor:
    q: Any = checkpoint(self.q, x, use_reentrant=True)
    return self.w(mix(q, self.k(x), self.v(x)))


def hook_on_x(self: Any, x: Tensor) -> Tensor:
    h = x * 1.5
    h.register_hook(lambda grad: grad * 2.0)
    return self.w(mix(self.q(h), self.k(h), self.v(h)))


def hook_on_x_later(self: Any, x: Tensor) -> Tensor:
    h = x * 1.5
    q = self.q(h)
    h.register_hook(lambda grad: grad * 2.0)
    return self.w(mix(q, self.k(h), self.v(h)))


def hook_after_x(self: Any, x: Tensor) -> Tensor:
    h = nn.Parameter(x.detach())
    h.register_post_accumulate_grad_hook(lambda p: None)
    return self.w(mix(self.q(h), self.k(h), self.v(h)))


def kept_gradient(self: Any, x: Tensor) -> Tensor:
    h = x * 1.5
    h.retain_grad()
    return self.w(mix(self.q(h), self.k(h), self.v(h)))


def nested(self: Any, x: Tensor) -> Tensor:
    """The parent is called again in its own forward."""
    if self.way is in_order:
        return in_order(self, x)
    self.way = in_order
    try:
        q = self.q(x)
        return self.w(mix(q, self.k(x), self.v(x))) + self(x)
    finally:
        self.way = nested


WAYS: dict[Callable[..., Any], tuple[int, int]] = {
    in_order: (1, 3),
    out_of_order: (1, 3),
    twice: (1, 3),
    cross: (2, 3),
    own_copies: (2, 2),
    views: (2, 2),
    alone: (1, 1),
    never: (0, 0),
    two_of_three: (1, 2),
    unused_results: (1, 3),
    last_unused: (1, 3),
    x_used_elsewhere: (1, 3),
    changed_results: (1, 3),
    changed_x_between: (2, 3),
    in_two_grad_modes: (2, 3),
    one_after_the_other: (2, 2),
    each_another_x: (2, 2),
    flat_and_not: (1, 3),
    strided: (1, 3),
    few_rows: (0, 0),
    checkpointed_alone: (1, 2),
    checkpointed_alone_later: (1, 2),
    checkpointed_alone_reentrant: (2, 3),
    hook_on_x: (0, 0),
    hook_on_x_later: (1, 1),
    hook_after_x: (0, 0),
    kept_gradient: (1, 3),
    nested: (2, 6),
}


def build(way: Any = in_order, dtype: torch.dtype = f64, base: str = "dense", **config: Any) -> Any:
    """A PEFT model of a parent, its adapters as if trained, and biases that are not zero."""
    torch.manual_seed(0)
    parent = Parent(way).to(dtype)
    if base == "nf4":
        bnb = pytest.importorskip("bitsandbytes").nn
        for name, size in SIZES.items():
            linear = bnb.Linear4bit(K, size, compute_dtype=dtype, quant_type="nf4")
            linear.weight = bnb.Params4bit(getattr(parent, name).weight.data, False)
            linear.bias = nn.Parameter(getattr(parent, name).bias.data)
            setattr(parent, name, linear.to("cpu"))
    settings = {"r": R, "lora_alpha": 7, "target_modules": list(ALL)} | config
    model = get_peft_model(Stack(parent), LoraConfig(**settings), autocast_adapter_dtype=False)
    randomize(model)
    for name, p in model.named_parameters():
        if "lora_" in name and dtype is not f64:  # so that tanh keeps gradients that are not noise
            p.data *= 0.3
    return model.train()


def parent_of(model: Any) -> Any:
    return model.base_model.model.parent


def pair(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    stock = build(*args, **kwargs)
    return stock, fuse(copy.deepcopy(stock))


def batch(dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(*ROWS, K, dtype=f64, generator=torch.Generator().manual_seed(3)).to(dtype)


def step(model: Any, x: Tensor, call: Any = None, times: int = 1) -> dict[str, Tensor]:
    """y, dx and each gradient, the last of `times` backwards of one graph."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = (model if call is None else call)(x)
    if isinstance(y, tuple):
        y = torch.cat(y, -1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    found = {"y": y.detach().clone()}
    for i in range(times):
        model.zero_grad()
        x.grad = None
        if y.requires_grad:
            y.backward(dy, retain_graph=i + 1 < times)
    named = {n: p.grad for n, p in [("x", x), *model.named_parameters()] if p.grad is not None}
    return found | {name: grad.clone() for name, grad in named.items()}


def assert_equal_step(stock: Any, fused: Any, x: Tensor, call: Any = None, **kwargs: Any) -> None:
    want, got = (
        step(model, x, None if call is None else call(model), **kwargs) for model in (stock, fused)
    )
    if x.dtype is f64:
        assert_close_derived(got, want, 1e-12)
    else:
        exact = in_float64(stock)
        ref = step(exact, x.double(), None if call is None else call(exact), **kwargs)
        assert_as_exact(got, ref, want)


@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_siblings_in_any_way_of_calling_equal_peft(way: Any, dtype: Any, shared: Shared) -> None:
    stock, fused = pair(way, dtype)
    assert_equal_step(stock, fused, batch(dtype))
    assert shared.take() == WAYS[way]


@pytest.mark.parametrize(
    "way", [w for w in WAYS if "checkpointed" not in w.__name__], ids=lambda way: way.__name__
)
def test_siblings_second_backward_equals_the_first(way: Any) -> None:
    _, fused = pair(way)
    assert_bitwise_equal(step(fused, batch(), times=2), step(fused, batch()))


# Layers and adapters


def rounded(model: Any) -> Any:
    """The model with adapters in bfloat16."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(bf16)
    return model


CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "rslora": ({"use_rslora": True}, (1, 3)),
    "biases": ({"bias": "all"}, (1, 3)),
    "lora_bias": ({"lora_bias": True}, (1, 3)),
    "ranks": ({"rank_pattern": {"k": 3, "v": 9}}, (1, 3)),
    "scalings": ({"alpha_pattern": {"k": 3, "v": 9}}, (1, 3)),
    "dropout": ({"lora_dropout": 0.3}, (0, 0)),
    "DoRA": ({"use_dora": True}, (0, 0)),
    "two targets": ({"target_modules": ["q", "v"]}, (1, 2)),
    "one target": ({"target_modules": ["q"]}, (0, 0)),
    "aLoRA": ({"alora_invocation_tokens": [1]}, (0, 0)),
}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_siblings_of_any_configuration_equal_peft(name, base, shared, monkeypatch) -> None:
    monkeypatch.setattr(swap, "heavier_reason", lambda layer: None)
    config, want = CONFIGS[name]
    stock, fused = pair(dtype=f32, base=base, **copy.deepcopy(config))
    if name == "dropout":
        with counter._NativeDropout():
            torch.manual_seed(1)
            expected = step(stock, batch(f32))
            torch.manual_seed(1)
            assert_close_derived(step(fused, batch(f32)), expected, layers=4)
        assert shared.take() == (0, 0)
        stock.eval(), fused.eval()
        want = (1, 3)
    assert_equal_step(stock, fused, batch(f32))
    assert shared.take() == want


def test_siblings_with_rank_gates_equal_peft(shared) -> None:
    """KaSA's factors train."""
    skip_without_kasa()
    import peft

    stock = build(dtype=f32, kasa_config=peft.KasaConfig())
    step(stock, batch(f32))  # which truncates the base
    fused = fuse(copy.deepcopy(stock))
    assert_equal_step(stock, fused, batch(f32))
    assert shared.take() == (1, 3)
    assert any("lora_diag" in name for name in step(fused, batch(f32)))


@pytest.mark.parametrize("gated", ["q", "k", "v"])
def test_siblings_with_one_rank_gate_equal_peft(gated, shared) -> None:
    """In 16 bits P is float32 if any layer has a gate."""
    skip_without_kasa()
    import peft

    stock = rounded(build(dtype=bf16, kasa_config=peft.KasaConfig()))
    step(stock, batch(bf16))
    for name in {"q", "k", "v"} - {gated}:
        del getattr(parent_of(stock), name).lora_variant["default"]
    fused = fuse(copy.deepcopy(stock))
    assert_equal_step(stock, fused, batch(bf16))
    assert shared.take() == (1, 3) and not shared.is_rounded


def under_autocast(model: Any) -> Any:
    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", bf16, enabled=x.dtype is not f64):
            return model(x)

    return forward


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("adapters", [f32, bf16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_siblings_in_bfloat16_are_as_exact_as_peft(adapters, base, autocast, shared) -> None:
    stock = build(dtype=bf16, base=base)
    for name, p in stock.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapters)
    fused = fuse(copy.deepcopy(stock))
    assert_equal_step(stock, fused, batch(bf16), under_autocast if autocast else None)
    assert shared.take() == (1, 3)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_siblings_in_float32_under_autocast_are_as_exact_as_peft(x_dtype, base, shared) -> None:
    """Over 4 bits y has x's dtype."""
    stock = build(dtype=f32, base=base)
    assert_equal_step(stock, fuse(copy.deepcopy(stock)), batch(x_dtype), under_autocast)
    assert shared.take() == (1, 3)


def test_siblings_in_and_out_of_autocast_equal_peft(shared) -> None:
    def way(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16, enabled=x.dtype is not f64):
            q = self.q(x)
        return torch.cat([q.to(x.dtype), self.k(x), self.v(x)], -1)

    stock, fused = pair(way, f32)
    results = step(fused, batch(f32)), step(in_float64(stock), batch()), step(stock, batch(f32))
    assert shared.take() == (2, 3)
    assert_as_exact(*results)
    apart = [name for name in results[0] if ".k." in name or ".v." in name]  # not in bfloat16
    assert_as_exact(*({name: found[name] for name in apart} for found in results))


@pytest.mark.parametrize(("x_dtype", "dtype"), [(f32, bf16), (torch.float16, f32)], ids=str)
def test_siblings_over_a_base_of_another_compute_dtype_equal_peft(x_dtype, dtype, shared) -> None:
    """bitsandbytes sets the dtype in the first call, but not for float16."""
    stock = build(dtype=x_dtype, base="nf4")
    for name in ALL:
        base = getattr(parent_of(stock), name).base_layer
        base.compute_dtype, base.compute_type_is_set = dtype, x_dtype is f32
    fused = fuse(copy.deepcopy(stock))
    assert_equal_step(stock, fused, batch(x_dtype))
    assert shared.take() == (0, 0)
    (row,) = explain(fused, x_dtype=x_dtype).blocks
    assert row.state == "x is not shared" and f"computes in {dtype}" in row.reason


@pytest.mark.parametrize("x_grad", [False, True])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "q", "k", "all"])
def test_siblings_with_frozen_parts_equal_peft(frozen, x_grad, shared) -> None:
    stock = build()
    for name, p in stock.named_parameters():
        if f".{frozen}." in name or frozen == "all":
            p.requires_grad_(False)
    fused = fuse(copy.deepcopy(stock))

    def call(model: Any) -> Any:
        return lambda x: model(x if x_grad else x.detach())

    assert_equal_step(stock, fused, batch(), call)
    assert shared.take() == (1, 3)


@pytest.mark.parametrize(
    ("frozen", "shape"),
    [(".lora_A.", [*ROWS, K]), (".lora_B.", [80, R]), ("x", [SIZES["q"], K]), ("", [80, R])],
)
def test_siblings_save_no_tensor_that_no_gradient_needs(frozen, shape) -> None:
    """x for dA, P for dB and the weight for dx; of q, k and v."""
    _, fused = pair(lambda self, x: torch.cat([self.q(x), self.k(x), self.v(x)], -1))
    for name, p in fused.named_parameters():
        p.requires_grad_(p.requires_grad and not (frozen and frozen in name))
    shapes: list[list[int]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append([*t.shape]) or t, id):
        fused(batch().requires_grad_(frozen != "x"))
    assert (shape in shapes) is (frozen == "")
    assert [R, K] in shapes


def test_siblings_without_gradient_of_x_compute_no_dx() -> None:
    _, fused = pair()
    y = fused(batch())
    with count_mm() as found:
        y.sum().backward()
    # Of q, k, v: dB and dP, one dA, no dx. The backward of w is an op of this package.
    assert len(found) == 3 * 2 + 1


@contextlib.contextmanager
def count_mm() -> Iterator[list[str]]:
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.name().split("::")[1].split(".")[0] in ("mm", "addmm", "addmm_"):
                found.append(str(func))
            return func(*args, **kwargs or {})

    with Mode():
        yield found


# States of layers


def with_two_adapters(model: Any) -> Any:
    add_adapter(model)
    return activate(model, "default", "second")


def with_two_adapters_in_k(model: Any) -> Any:
    add_adapter(model, target_modules=["k"])
    return activate(model, "default", "second")


def with_second_adapter(model: Any) -> Any:
    add_adapter(model, r=3)
    return activate(model, "second")


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def merged_k(model: Any) -> Any:
    parent_of(model).k.merge()
    return model


def scaled_by_a_tensor(model: Any) -> Any:
    for name in ALL:
        layer = getattr(parent_of(model), name)
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    return model


def hooked(kind: str, path: str) -> Callable[[Any], Any]:
    def hook(module: Any, *args: Any) -> None:
        return None

    def apply(model: Any) -> Any:
        getattr(parent_of(model).get_submodule(path), f"register_{kind}_hook")(hook)
        return model

    return apply


def doubling_hook(model: Any) -> Any:
    parent_of(model).k.register_forward_hook(lambda module, args, y: 2 * y)
    return model


def doubling_gradient_hook(model: Any) -> Any:
    parent_of(model).k.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    return model


def other_forward(model: Any) -> Any:
    k = parent_of(model).k
    own = k.forward
    k.forward = lambda x: 2 * own(x)
    return model


OFF = "adapters are {}: the base layer's own forward"
HOOKED = "a hook sits on it"
INNER = "adapter 'default': a hook sits on its {}"
# The change, the counts, the layers that do not share x, and the reason.
STATES: dict[str, tuple[Callable[[Any], Any], tuple[int, int], tuple[str, str]]] = {
    "two adapters": (with_two_adapters, (0, 0), ("qkvw", "several adapters are active")),
    "two adapters in k": (with_two_adapters_in_k, (1, 2), ("k", "several adapters are active")),
    "second adapter": (with_second_adapter, (1, 3), ("", "")),
    "disabled": (disabled, (0, 0), ("qkvw", OFF.format("disabled"))),
    "k merged": (merged_k, (1, 2), ("k", OFF.format("merged"))),
    "scaling in a tensor": (scaled_by_a_tensor, (1, 3), ("", "")),
    "forward hook on k": (hooked("forward", "k"), (1, 2), ("k", HOOKED)),
    "forward pre-hook on q": (hooked("forward_pre", "q"), (1, 2), ("q", HOOKED)),
    "backward hook on v": (hooked("full_backward", "v"), (1, 2), ("v", HOOKED)),
    "backward pre-hook on v": (hooked("full_backward_pre", "v"), (1, 2), ("v", HOOKED)),
    "hook on k's lora_A": (
        hooked("forward", "k.lora_A.default"),
        (1, 2),
        ("k", INNER.format("nn.Linear")),
    ),
    "hook on k's lora_B": (
        hooked("forward", "k.lora_B.default"),
        (1, 2),
        ("k", INNER.format("nn.Linear")),
    ),
    "hook on k's base": (
        hooked("forward", "k.base_layer"),
        (1, 2),
        ("k", "a hook sits on its nn.Linear"),
    ),
    "hook on k's dropout": (
        hooked("forward", "k.lora_dropout.default"),
        (1, 2),
        ("k", INNER.format("dropout")),
    ),
    "hook on the parent": (hooked("forward", ""), (1, 3), ("", "")),
    "backward hook on the parent": (hooked("full_backward", ""), (1, 3), ("", "")),
    "hook that doubles": (doubling_hook, (1, 2), ("k", HOOKED)),
    "hook that doubles a gradient": (doubling_gradient_hook, (1, 2), ("k", HOOKED)),
    "other forward": (other_forward, (1, 2), ("k", "")),
}


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("name", STATES)
def test_siblings_in_any_state_equal_peft(name, when, shared) -> None:
    change, want, (apart, reason) = STATES[name]
    stock = build()
    if when == "before fuse":
        fused = fuse(change(copy.deepcopy(stock)))
    else:
        fused = change(fuse(copy.deepcopy(stock)))
    change(stock)
    if name == "other forward" and when == "after fuse":
        want, apart = (1, 3), ""  # it calls the layer's own
    assert explain(fused).blocks == [row_of(apart, reason)]
    assert_equal_step(stock, fused, batch())
    assert shared.take() == want


def row_of(apart: str, reason: str) -> Row:
    """Return the row of a parent. Without a reason it does not name the layers apart."""
    alone = [f"{name} runs its own call: {reason}" for name in ALL if name in apart and reason]
    sharing = [name for name in ALL if name not in apart]
    said = ["x is not shared", "eager", "own calls"]
    if sharing:
        said = ["x is shared", "eager", f"x is threaded through {', '.join(sharing)}"]
        alone = ["for calls with the same x of more than 64 rows", *alone]
    return Row("base_model.model.parent", *said, "; ".join(alone))


def test_siblings_with_an_adapter_of_another_dtype_equal_peft(shared) -> None:
    """A of another dtype is not stacked."""
    stock = build(dtype=f32)
    layer = parent_of(stock).k
    layer.lora_A["default"].to(bf16), layer.lora_B["default"].to(bf16)
    fused = fuse(copy.deepcopy(stock))
    stock.base_model.model.parent.k.to(f32)
    got, want = step(fused, batch(f32)), step(in_float64(stock), batch())
    assert_close_derived({n: t.double() for n, t in got.items()}, want, 2.0**-7)
    assert shared.take() == (1, 2)


def test_siblings_in_a_mixed_batch_equal_peft(shared) -> None:
    stock = with_two_adapters(build()).eval()
    fused = fuse(copy.deepcopy(stock))
    activate(stock, "default"), activate(fused, "default")
    names = ["default", "second"]

    def call(model: Any) -> Any:
        return lambda x: model(x, adapter_names=names)

    assert_equal_step(stock, fused, batch(), call)
    assert shared.take() == (0, 0)
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 3)
    assert all(getattr(parent_of(fused), name).mixed_batch is None for name in ALL)


# Contexts


def checkpointed(reentrant: bool) -> Callable[[Any], Any]:
    return lambda model: partial(checkpoint, model, use_reentrant=reentrant)


def without_grad(model: Any) -> Any:
    return torch.no_grad()(model.forward)


# A reentrant checkpoint runs without gradients first.
NOT_REENTRANT = (
    *(in_two_grad_modes, never, hook_on_x, hook_on_x_later, hook_after_x, kept_gradient),
)
CHECKPOINTED = [
    (way, reentrant)
    for way in WAYS
    for reentrant in (False, True)
    if way is not nested and "checkpointed" not in way.__name__
    if not (reentrant and way in NOT_REENTRANT)
]


@pytest.mark.parametrize(
    ("way", "reentrant"),
    CHECKPOINTED,
    ids=lambda v: v.__name__ if callable(v) else f"reentrant {v}",
)
def test_checkpointed_siblings_equal_peft(way, reentrant) -> None:
    stock, fused = pair(way)
    assert_equal_step(stock, fused, batch(), checkpointed(reentrant))


def test_selectively_checkpointed_siblings_equal_peft(shared) -> None:
    """A saved result of an op must not change in place."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        is_saved = op.name().startswith(("aten::mm", "aten::addmm"))
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, policy)
    stock, fused = pair()
    kwargs = {"use_reentrant": False, "context_fn": context_fn}
    assert_equal_step(stock, fused, batch(), lambda model: partial(checkpoint, model, **kwargs))
    assert shared.take() == (0, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_siblings_without_gradients_equal_peft(mode, shared) -> None:
    stock, fused = pair()
    x = batch()
    with mode():
        got, want = fused(x), stock(x)
        assert_close_derived(got, want, 1e-12)
        assert shared.take() == (1, 3)
        made_here = x + 0.0
        got, want = fused(made_here), stock(made_here)
    assert_close_derived(got, want, 1e-12)
    assert shared.take() == ((0, 0) if mode is torch.inference_mode else (1, 3))
    assert_equal_step(stock, fused, x)


def test_siblings_in_a_compiled_model_equal_peft(shared) -> None:
    stock, fused = pair(dtype=f32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_equal_step(stock, fused, batch(f32), lambda m: compiled if m is fused else m)
    assert shared.take() == (0, 0)
    assert_equal_step(stock, fused, batch(f32))
    assert shared.take() == (1, 3)


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "forward-mode AD"])
def test_siblings_in_a_transform_equal_peft(name, shared) -> None:
    from tests.interop.test_contexts import TRANSFORMS

    stock, fused = pair(dtype=f32)
    x, call = batch(f32), TRANSFORMS[name]
    x = x if name != "vmap" else x.expand(3, *x.shape)
    assert_bitwise_equal(call(fused, x), call(stock, x))
    assert shared.take() == (0, 0)


def test_siblings_under_a_dispatch_mode_do_not_share(shared) -> None:
    _, fused = pair()
    assert count_ops(lambda: fused(batch()))["lora_linear"] == 4
    assert shared.take() == (0, 0)


def test_siblings_of_another_backend_do_not_share(shared) -> None:
    stock, fused = pair(dtype=f32)
    with lora_kernels.backend("cpu"):
        assert_equal_step(stock, fused, batch(f32))
    assert shared.take() == (0, 0)


def test_siblings_while_a_thread_forces_a_backend_do_not_share(shared) -> None:
    """Autograd's thread, where checkpoints are recomputed, knows `forced.entered` alone."""
    stock, fused = pair()
    with pytest.MonkeyPatch.context() as patch:  # ends before the fixture that forces a backend
        patch.setattr(forced, "entered", "triton")
        assert_equal_step(stock, fused, batch())
    assert shared.take() == (0, 0)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist: Any = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", [in_order, cross, last_unused, unused_results])
def test_siblings_under_ddp_equal_peft(way, shared, one_process) -> None:
    stock, fused = pair(way)
    want = step(stock, batch())
    shared.take()
    model = nn.parallel.DistributedDataParallel(fused, find_unused_parameters=way is not in_order)
    for _ in range(2):  # DDP arranges its buckets after the first step
        got = {n.removeprefix("module."): t for n, t in step(model, batch()).items()}
        # DDP gives parameters without a gradient zeros.
        assert all(not t.any() for n, t in got.items() if n not in want)
        assert_close_derived({n: got[n] for n in want}, want, 1e-12)
    assert shared.take()[0] == 2 * WAYS[way][0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("around", ["model", "parent", "layers", "k"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_siblings_under_fsdp2_equal_peft(
    dimensions, around, recompute, shared, one_process
) -> None:
    """Shared where one gather brings all parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stock, fused = pair()
    call = checkpointed(False) if recompute else lambda model: model
    want = step(stock, batch(), call(stock))
    parent = parent_of(fused)
    inner = {"model": [], "parent": [parent], "k": [parent.k]}
    names = ("replicated", "sharded")[-dimensions:]
    mesh = init_device_mesh("cpu", (1,) * dimensions, mesh_dim_names=names)
    for module in inner.get(around, [getattr(parent, name) for name in ALL]):
        fully_shard(module, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    (row,) = explain(fused).blocks
    assert all("PEFT" not in each.state for each in explain(fused).rows)
    got = step(fused, batch(), call(fused))
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in got.items()}
    assert_close_derived(whole, want, 1e-12)
    counts = {"layers": (0, 0), "k": (1, 2)}.get(around, (1, 3))
    assert shared.take() == tuple(n * (1 + recompute) for n in counts)
    assert row.state == ("x is not shared" if around == "layers" else "x is shared"), row


def test_siblings_that_a_verdict_gives_to_kernels_do_not_share(shared, monkeypatch) -> None:
    """Only that of k."""
    from lora_kernels.choice import choose as selection

    stock, fused = pair(dtype=f32)
    own = selection.choose

    def choose(problem: Any, requested: Any = None) -> Any:
        choice = own(problem, requested)
        if problem.columns == SIZES["k"] and requested is None:
            return Choice("cpu", Strategy.LIBRARY, "measured")
        return choice

    monkeypatch.setattr(selection, "choose", choose)
    (row,) = explain(fused).blocks
    assert "x is threaded through q, w" in row.strategy
    assert "k runs its own call: cpu computes its call" in row.reason
    assert_equal_step(stock, fused, batch(f32))
    assert shared.take() == (1, 1)


def test_siblings_differentiated_twice_raise_the_remedy() -> None:
    _, fused = pair()
    x = batch().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(fused(x).square().sum(), x)
    assert torch.equal(dx, want)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("way", [in_order, last_unused, unused_results])
def test_siblings_gradients_of_single_tensors_equal_peft(way) -> None:
    """Only one gradient is wanted."""
    stock, fused = pair(way)
    names = [n for n, p in stock.named_parameters() if p.requires_grad and ".w." not in n]
    for name in ["x", *names]:
        found = []
        for model in (stock, fused):
            x = batch().requires_grad_()
            wanted = x if name == "x" else model.get_parameter(name)
            found += torch.autograd.grad(model(x).square().sum(), wanted, allow_unused=True)
        assert (found[0] is None) == (found[1] is None), name
        if found[0] is not None:
            assert_close_derived(found[1], found[0], 1e-12)


def test_siblings_gradients_of_several_dy_at_once_equal_each() -> None:
    _, fused = pair()
    x = batch().requires_grad_()
    y, wanted = fused(x), [x, *(p for p in fused.parameters() if p.requires_grad)]
    dys = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    kwargs: dict[str, Any] = {"retain_graph": True}
    together = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, **kwargs)
    for i, dy in enumerate(dys):
        for found, want in zip(together, torch.autograd.grad(y, wanted, dy, **kwargs), strict=True):
            assert_close_derived(found[i], want, 1e-12)


@pytest.mark.parametrize("call", ["hooks", "save_on_cpu"])
def test_siblings_under_saved_tensor_hooks_equal_peft(call, shared) -> None:
    stock, fused = pair()

    def under(model: Any) -> Any:
        def forward(x: Tensor) -> Any:
            hooks: Any = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
            with hooks if call == "hooks" else torch.autograd.graph.save_on_cpu():
                return model(x)

        return forward

    assert_equal_step(stock, fused, batch(), under)
    assert shared.take() == (1, 3)


# Nothing is held


class Failure(Exception):
    pass


def fails(self: Any, x: Tensor) -> Tensor:
    self.q(x)
    raise Failure


def held(self: Any, x: Tensor) -> Tensor:
    raise NotImplementedError


def test_siblings_hold_nothing_after_an_exception(shared) -> None:
    stock, fused = pair(fails)
    x = batch()
    seen, count = weakref.ref(x), len(gc.get_objects())
    del count
    for _ in range(2):
        with pytest.raises(Failure):
            fused(x)
        assert not siblings._frames.by_siblings
        assert shared.take() == (1, 1)
    del x
    assert seen() is None
    for model in (stock, fused):
        parent_of(model).way = in_order
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 3)


@pytest.mark.parametrize("way", [in_order, alone, two_of_three, cross, never])
@pytest.mark.parametrize("grad", [False, True])
def test_siblings_hold_nothing_after_the_parent(way, grad) -> None:
    _, fused = pair(way)
    x = batch()
    seen = weakref.ref(x)
    with torch.set_grad_enabled(grad):
        y = fused(x)
    assert not siblings._frames.by_siblings
    del x, y
    assert seen() is None


def test_last_sibling_drops_the_slot() -> None:
    seen = []

    def way(self: Any, x: Tensor) -> Tensor:
        found = mix(self.q(x), self.k(x), self.v(x))
        self.w(x)
        (frame,) = siblings._frames.by_siblings.values()
        seen.append(frame.slot)
        return found

    _, fused = pair(way)
    fused(batch())
    assert seen == [None]


def test_siblings_outside_of_the_parent_equal_peft(shared) -> None:
    stock, fused = pair()
    fused(batch())
    shared.take()
    calls: list[Callable[[Any], Any]] = [
        lambda model: lambda x: mix(*(getattr(parent_of(model), n)(x) for n in "qkv")),
        lambda model: parent_of(model).forward,
        lambda model: parent_of(model).v,
    ]
    for call in calls:
        assert_equal_step(stock, fused, batch(), call)
        assert not siblings._frames.by_siblings
    assert shared.take() == (0, 0)


def test_siblings_in_four_threads_equal_peft(shared) -> None:
    stock, fused = pair()
    want, got, errors = [], [None] * 4, []
    xs = [batch() * (i + 1) for i in range(4)]
    weights = [p for p in fused.parameters() if p.requires_grad]
    barrier = threading.Barrier(4)

    def waiting(self: Any, x: Tensor) -> Tensor:
        q = self.q(x)
        barrier.wait()
        k = self.k(x)
        barrier.wait()
        return self.w(mix(q, k, self.v(x)))

    def run(i: int) -> None:
        try:
            with lora_kernels.backend("eager"):
                for _ in range(5):
                    x = xs[i].clone().requires_grad_()
                    y = fused(x)
                    got[i] = (y, *torch.autograd.grad(y.sum(), [x, *weights]))
                assert not siblings._frames.by_siblings
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    for x in xs:
        x = x.clone().requires_grad_()
        y = stock(x)
        trained = [p for p in stock.parameters() if p.requires_grad]
        want.append((y, *torch.autograd.grad(y.sum(), [x, *trained])))
    parent_of(fused).way = waiting
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_close_derived(got, want, 1e-12)
    assert shared.take() == (4 * 5, 4 * 5 * 3)


def test_siblings_of_replaced_values_equal_peft(shared) -> None:
    """An optimizer's step, and one that moves no version."""
    stock, fused = pair()
    for _ in range(3):
        assert_close_derived(step(fused, batch()), step(stock, batch()))
        for model in (stock, fused):
            for p in model.parameters():
                if p.grad is not None:
                    p.data -= 1e-4 * p.grad
    assert shared.take() == (3, 9)


def test_adapter_that_changes_between_siblings_is_read(shared) -> None:
    def way(self: Any, x: Tensor) -> Tensor:
        q = self.q(x)
        with torch.no_grad():
            self.k.lora_A["default"].weight.mul_(2.0)
        k, v = self.k(x), self.v(x)
        with torch.no_grad():
            self.k.lora_A["default"].weight.mul_(0.5)
        return self.w(mix(q, k, v))

    stock, fused = pair(way)
    with torch.no_grad():
        assert_close_derived(fused(batch()), stock(batch()), 1e-12)


# fuse, unfuse, explain


def hooks_in(model: nn.Module) -> int:
    found = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return found + sum(len(m._forward_hooks_always_called) for m in model.modules())


def test_unfuse_and_blocks_false_remove_all(shared) -> None:
    stock = build()
    fused = fuse(copy.deepcopy(stock))
    assert hooks_in(fused) == 3
    assert hooks_in(fuse(fused)) == 3
    assert hooks_in(fuse(fused, blocks=False)) == 0
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (0, 0) and explain(fused).blocks == []
    fuse(fused)
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 3)
    assert hooks_in(unfuse(fused)) == 0
    assert not any("_siblings" in vars(m) for m in fused.modules())
    assert_bitwise_equal(step(fused, batch()), step(stock, batch()))


def test_unfuse_leaves_other_hooks() -> None:
    model = hooked("forward", "")(hooked("forward_pre", "")(build()))
    assert hooks_in(unfuse(fuse(model))) == 2


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_fused_model_share(way, shared) -> None:
    stock, fused = pair()
    found = copy.deepcopy(fused) if way == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert_equal_step(stock, found, batch())
    assert shared.take() == (1, 3)
    (own,), (other,) = (
        {vars(m)["_siblings"] for m in each.modules() if "_siblings" in vars(m)}
        for each in (fused, found)
    )
    assert own is not other and own.names == other.names == ALL
    unfuse(found)
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 3)


def test_layer_copied_out_of_its_parent_equals_peft(shared) -> None:
    stock, fused = pair()
    layer = copy.deepcopy(parent_of(fused).k)
    assert_equal_step(parent_of(stock).k, layer, batch())
    assert shared.take() == (0, 0)


def test_unloaded_and_merged_models_equal_peft() -> None:
    stock, fused = pair()
    stock.eval(), fused.eval()
    want, got = (m.merge_and_unload()(batch()) for m in (stock, fused))
    assert_close_derived(got, want, 1e-12)


def test_children_of_a_sequential_are_not_siblings() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)).double()
    model = fuse(get_peft_model(base, LoraConfig(r=R, target_modules=["0", "1"])))
    assert explain(model).blocks == [] and hooks_in(model) == 0


def test_model_on_a_cpu_has_no_siblings() -> None:
    from lora_kernels.backends import library

    stock = build()
    library.emulates_gpu = False
    try:
        assert explain(fuse(stock)).blocks == [] and hooks_in(stock) == 0
    finally:
        library.emulates_gpu = True


def test_explain_has_a_line_for_each_parent() -> None:
    stock = build()
    assert explain(stock).blocks == []
    fused = fuse(stock)
    (row,) = explain(fused).blocks
    assert row == (
        "base_model.model.parent",
        "x is shared",
        "eager",
        "x is threaded through q, k, v, w",
        "for calls with the same x of more than 64 rows",
    )
    assert row.strategy in str(explain(fused)) and '"blocks"' in explain(fused).json()
    explain(fused).assert_fused()
    hooked("forward", "k")(fused)
    (row,) = explain(fused).blocks
    assert row.strategy.endswith("through q, v, w")
    assert row.reason.endswith("; k runs its own call: a hook sits on it")
    disabled(fused)
    (row,) = explain(fused).blocks
    assert (
        row.state == "x is not shared"
        and "v runs its own call: adapters are disabled" in row.reason
    )
    with lora_kernels.backend("cpu"):
        (row,) = explain(fused).blocks
    assert row.state == "x is not shared"


def test_fuse_callback_hands_blocks_on() -> None:
    assert FuseCallback().settings["blocks"] is True
    model = build()
    FuseCallback(blocks=False).on_init_end(None, None, None, model=model)
    assert hooks_in(model) == 0
    FuseCallback().on_init_end(None, None, None, model=model)
    assert hooks_in(model) == 3


# Counts


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in zip("qkv", (4096, 1024, 1024), strict=True):
            linear = nn.Linear(4096, size, bias=False, device="meta", dtype=bf16)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(
    ("base", "megabytes", "kernels", "peak"), [("dense", 1600, 24, 172), ("nf4", 1740, 44, 207)]
)
def test_step_of_siblings_moves_few_bytes(base, megabytes, kernels, peak) -> None:
    parent = QKV()
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        for name in "qkv":
            setattr(parent, name, baselines.linear_4bit(getattr(parent, name), "nf4"))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list("qkv"))
    model = fuse(get_peft_model(parent, config, autocast_adapter_dtype=False))
    adapters = [p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n]
    for p in adapters:  # PEFT 0.17 makes those beside 4 bits in float32
        p.data = p.data.to(bf16)
    for _ in range(2):  # the first call fills what the process caches
        x = torch.empty(8192, 4096, dtype=bf16, device="meta", requires_grad=True)
        count = counter._Counter([])
        y = count.run(lambda x=x: model(x))
        forward = count.traffic()
        dy = [torch.empty_like(each) for each in y]
        grads = count.run(lambda x=x, y=y, dy=dy: torch.autograd.grad(y, [x, *adapters], dy))
        backward = count.traffic()
        del grads, y
    assert forward.bytes + backward.bytes <= megabytes * 1e6
    assert forward.kernels + backward.kernels <= kernels
    assert max(forward.peak, backward.peak) <= peak * 1e6


def test_backward_of_siblings_copies_dy_to_float32_once() -> None:
    """Beside float32 adapters, where no 16-bit parts are taken: 8 rows for each rank."""
    M, N, K, rank = 512, 4096, 4096, 64
    rows, dy = (torch.empty(M, each, dtype=bf16, device="meta") for each in (K, N))
    W = torch.empty(N, K, dtype=bf16, device="meta")
    B, p = (torch.empty(each, rank, device="meta").requires_grad_() for each in (N, M))
    rows.requires_grad_()
    counted = []
    for _ in range(2):  # the first call fills what the process caches
        count = counter._Counter([])
        y, _ = blocks.sibling_linear(rows, p, W, B, 0.5, None, None, [M])
        count.run(lambda y=y: torch.autograd.grad(y, [rows, p, B], dy))
        counted.append(count.traffic().bytes)
    size = 2 * (M * N + N * K + M * K)  # dx = dy·W
    size += M * N * (2 + 4) + 4 * (2 * M * N + 2 * N * rank + 2 * M * rank)  # the copy, dB and dP
    assert counted[-1] <= 1.05 * size, (counted, size)


class Marked(Tensor):
    """A tensor of a class of its own, as another library's."""


def test_siblings_called_with_a_tensor_of_tensors_do_not_share(shared) -> None:
    """Another library runs the ops of such a tensor, as of a DTensor."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    stock, fused = pair()
    x = two_tensor.TwoTensor(batch(), 2 * batch())
    with torch.no_grad():
        got = fused(x)
    assert shared.take() == (0, 0)
    assert_close_derived(got.a, stock(batch()))
    assert_close_derived(got.b, stock(2 * batch()))


def test_siblings_called_with_a_subclass_equal_peft(shared) -> None:
    stock, fused = pair()
    x = batch().as_subclass(Marked)
    with torch.no_grad():
        got, want = fused(x), stock(x)
    assert shared.take() == (0, 0)
    assert type(got) is type(want) is Marked
    assert_close_derived(got.as_subclass(Tensor), want.as_subclass(Tensor))


def test_siblings_with_inference_tensors_equal_peft(shared) -> None:
    """A server may load adapters inside `inference_mode`."""
    stock, fused = pair()
    with torch.inference_mode():
        for model in (stock, fused):
            for module in model.modules():
                for name, p in list(module._parameters.items()):
                    if p is not None and p.requires_grad:
                        module._parameters[name] = nn.Parameter(p.clone(), requires_grad=False)
    assert parent_of(fused).k.lora_A["default"].weight.is_inference()
    with torch.no_grad():
        got, want = fused(batch()), stock(batch())
    assert shared.take() == (0, 0)
    assert_close_derived(got, want)


@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_gradient_of_p_is_rounded_as_p_is(gated: bool, adapter: torch.dtype) -> None:
    """With float32 adapters beside a bfloat16 x, dP keeps float32."""
    M, N = 70, 48
    make = torch.Generator().manual_seed(0)
    dy, B = torch.randn(M, N, generator=make).bfloat16(), torch.randn(N, R, generator=make)
    B, gate = B.to(adapter), torch.rand(R, generator=make) if gated else None
    sibling = eager_siblings.Sibling(None, None, B, 2.0, gate)
    p_dtype = bf16 if adapter is bf16 and not gated else f32
    found = eager_siblings.sibling_linear_backward(
        dy, None, sibling, K, p_dtype, (False, True, False, False, False)
    )
    want = 2.0 * dy.double() @ B.double() * (1.0 if gate is None else gate.double())
    assert found.p is not None and found.p.dtype is p_dtype
    bound = 2.0**-8 if p_dtype is bf16 else 2.0**-17  # B in parts of bfloat16
    assert (found.p.double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize(
    ("dtype", "adapter"), [(f64, f64), (f32, f32), (bf16, f32), (f32, bf16), (bf16, bf16)], ids=str
)
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_several_dy_at_once_equal_each_of_all_operands(
    gated: bool, adapter: torch.dtype, dtype: torch.dtype
) -> None:
    """The operands of `blocks.sibling_linear`: x, lora_A, lora_B, the bias and the gate."""
    make = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = adapter) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=f64).to(dtype).requires_grad_()

    x, A, B = leaf(70, K, dtype=dtype), leaf(R, K), leaf(32, R)
    bias, weight = leaf(32), leaf(32, K, dtype=dtype).detach()
    gate = leaf(R, dtype=f64 if dtype is f64 else f32) if gated else None
    leaves = [x, A, B, bias, *([gate] if gate is not None else [])]
    rows, (p,) = blocks.down_projections(x, [A], adapter is dtype is bf16 and not gated)
    y, _ = blocks.sibling_linear(rows, p, weight, B, 2.0, bias, gate, (70,))
    dy = torch.randn(3, *y.shape, generator=make, dtype=f64).to(dtype)
    got = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    # In bfloat16 dP and dx are rounded to 2⁻⁹ in either, and each dA and dB.
    within = {f64: 1e-12, f32: 1e-5}.get(dtype if adapter is not bf16 else bf16, 2.0**-6)
    for i, each in enumerate(dy):
        want = torch.autograd.grad(y, leaves, each, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert b.norm() > 0 and a.dtype is b.dtype
            error = (a[i].double() - b.double()).norm() / b.double().norm()
            assert error <= within, float(error)


def test_linears_that_share_x_add_no_gradients_of_x() -> None:
    """x is threaded through `shared_linears`: each dx is added in its GEMM."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(70, K, generator=make, dtype=f64).requires_grad_()
    linears = [
        blocks.LinearArguments(
            torch.randn(n, K, generator=make, dtype=f64),
            torch.randn(R, K, generator=make, dtype=f64).requires_grad_(),
            torch.randn(n, R, generator=make, dtype=f64).requires_grad_(),
            2.0,
        )
        for n in (32, 48, 64)
    ]
    total = torch.cat(blocks.shared_linears(x, linears), 1).sum()
    with torch.profiler.profile(record_shapes=True) as profile:
        total.backward()
    sums = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::add", "aten::add_") and [70, K] in event.input_shapes
    ]
    assert sums == [], sums


def inference_k(model: Any) -> Any:
    with torch.inference_mode():
        weight = parent_of(model).k.lora_A["default"].weight.clone()
    parent_of(model).k.lora_A["default"]._parameters["weight"] = nn.Parameter(weight, False)
    return model


def without_k(model: Any) -> Any:
    parent_of(model).k = nn.Linear(K, SIZES["k"], dtype=f64)
    return model


def only_q(model: Any) -> Any:
    for name in "kvw":
        hooked("forward", name)(model)
    return model


# The configuration, a change before `fuse` or after it, and the layers apart with the reason.
REASONS: dict[str, tuple[dict[str, Any], Any, Any, tuple[str, str]]] = {
    "DoRA": ({"use_dora": True}, None, None, ("qkvw", "adapter 'default' is DoRA")),
    "aLoRA": (
        {"alora_invocation_tokens": [1]}, None, None, ("qkvw", "adapter 'default' is an aLoRA"),
    ),
    "inference tensor": ({}, None, inference_k, ("k", "its lora_A is an inference tensor")),
    "another module": ({}, None, without_k, ("k", "it is a Linear")),
    "unfused": (
        {}, None, lambda m: unfuse(parent_of(m).k) and m, ("k", "it is a Linear"),
    ),
    "fused by itself": (
        {}, None, lambda m: fuse(parent_of(m).k) and m, ("k", "it was fused or unfused by itself"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_explain_says_why_a_layer_does_not_share(name) -> None:
    config, before, after, (apart, reason) = REASONS[name]
    model = build(**config)
    model = fuse(before(model) if before else model)
    model = after(model) if after else model
    assert explain(model).blocks == [row_of(apart, reason)]


def test_explain_says_that_a_layer_has_no_other_to_share_with() -> None:
    (row,) = explain(only_q(fuse(build()))).blocks
    alone = [f"{name} runs its own call: a hook sits on it" for name in "kvw"]
    said = ["x is not shared", "eager", "own calls"]
    of_q = "q has no other to share with"
    assert row == Row("base_model.model.parent", *said, "; ".join([*alone, of_q]))


def test_explain_says_which_base_computes_in_another_dtype() -> None:
    model = build(dtype=f32, base="nf4")
    base = parent_of(model).k.base_layer
    base.compute_dtype, base.compute_type_is_set = bf16, True
    said = "its base computes in torch.bfloat16, x has torch.float32"
    assert explain(fuse(model), x_dtype=f32).blocks == [row_of("k", said)]
    with torch.autocast("cpu", bf16):
        assert explain(model, x_dtype=f32).blocks == [row_of("", "")]


def test_explain_of_adapters_in_two_dtypes_says_what_is_shared(shared: Shared) -> None:
    model = build(dtype=bf16, target_modules=["q", "k"])
    q = parent_of(model).q
    for p in (q.lora_A["default"].weight, q.lora_B["default"].weight):
        p.data = p.data.float()
    fused = fuse(model)
    fused(batch(bf16))
    assert shared.take() == (0, 0)
    (row,) = [row for row in explain(fused).blocks if "shared" in row.state]
    assert row.state == "x is not shared"
    of_k = "k runs its own call: its lora_A has torch.bfloat16, that of the first torch.float32"
    assert of_k in row.reason


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_siblings_with_rank_gates_and_frozen_factors_equal_peft(frozen: str) -> None:
    """KaSA's factors train where P, or B, needs no gradient."""
    skip_without_kasa()
    import peft

    stock = build(dtype=f32, kasa_config=peft.KasaConfig())
    step(stock, batch(f32))  # which truncates the base
    for name, p in stock.named_parameters():
        if f".{frozen}." in name:
            p.requires_grad_(False)
    fused = fuse(copy.deepcopy(stock))

    def call(model: Any) -> Any:
        return lambda x: model(x.detach())

    assert_equal_step(stock, fused, batch(f32), call)
    assert any("lora_diag" in name for name in step(fused, batch(f32), call(fused)))


def three_alone(self: Any, x: Tensor) -> Tensor:
    return mix(self.q(x), self.k(x), self.v(x))


def test_siblings_beside_an_x_of_another_dtype_raise_as_their_own_calls_do() -> None:
    """A base in float32 is not rounded for an x in bfloat16 without autocast; PEFT raises too."""
    stock, fused = pair(three_alone, dtype=f32)
    with pytest.raises(RuntimeError, match="same dtype"):
        stock(batch(bf16))
    with pytest.raises(TypeError, match=r"weight: got torch.float32, want x's torch.bfloat16"):
        fused(batch(bf16))


def test_gradient_of_a_bias_beside_bfloat16_keeps_float32() -> None:
    """lora_bias is float32 beside a bfloat16 base: its gradient is not rounded to 16 bits."""
    make = torch.Generator().manual_seed(0)
    dy, B = torch.randn(70, 48, generator=make).to(bf16), torch.randn(48, R, generator=make)
    sibling = eager_siblings.Sibling(None, None, B, 2.0, None)
    needs = (False, False, False, False, True)
    found = eager_siblings.sibling_linear_backward(dy, None, sibling, K, f32, needs).bias
    want = dy.double().sum(0)
    assert found is not None and found.dtype is f32
    assert (found.double() - want).norm() <= 2.0**-20 * want.norm()


@pytest.mark.parametrize(
    ("A", "B", "autocast", "is_rounded"),
    [
        (bf16, bf16, False, True),
        (bf16, f32, False, False),
        (f32, bf16, False, False),
        (f32, f32, False, False),
        (f32, f32, True, True),
    ],
    ids=str,
)
def test_p_is_rounded_where_all_that_reads_it_has_16_bits(A, B, autocast, is_rounded, shared):
    stock = build(dtype=bf16)
    for name, p in stock.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * p.data.to(A if "lora_A" in name else B)
    fused = fuse(stock)
    (under_autocast(fused) if autocast else fused)(batch(bf16))
    assert shared.take() == (1, 3) and shared.is_rounded is is_rounded


def test_parameter_that_is_replaced_between_siblings_is_read() -> None:
    """The other one has the same version."""

    def way(self: Any, x: Tensor) -> Tensor:
        q, linear = self.q(x), self.k.lora_A["default"]
        kept = linear.weight
        linear.weight = nn.Parameter(2.0 * kept.detach())
        k = self.k(x)
        linear.weight = kept
        return self.w(mix(q, k, self.v(x)))

    stock, fused = pair(way)
    for model in (stock, fused):
        linear = parent_of(model).k.lora_A["default"]
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    assert_equal_step(stock, fused, batch())


def test_result_of_a_frozen_sibling_needs_no_gradient() -> None:
    def way(self: Any, x: Tensor) -> Any:
        return self.q(x), self.k(x), self.v(x)

    stock = build(way)
    for name, p in stock.named_parameters():
        if ".k." in name:
            p.requires_grad_(False)
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        assert [y.requires_grad for y in model(batch())] == [True, False, True]


def test_sibling_whose_adapter_is_not_rounded_as_the_others_are_runs_its_own_call(shared) -> None:
    stock = build(three_alone, dtype=bf16)
    for name, p in stock.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * p.data.float()
    fused = fuse(stock, cast_adapters=True)
    parent_of(fused).k.casts_adapters = False
    found = step(fused, batch(bf16))
    assert shared.take() == (1, 2)
    (row,) = [row for row in explain(fused).blocks if "shared" in row.state]
    assert "k runs its own call: its adapter is rounded, or that of the first is" in row.reason
    siblings.remove_siblings(fused)
    apart = step(fused, batch(bf16))
    of_k = [(found[name], apart[name]) for name in apart if ".k." in name]
    assert len(of_k) == 2
    for got, want in of_k:
        assert torch.equal(got, want)


def test_x_that_needs_a_gradient_from_the_second_sibling_on_gets_its_gradient() -> None:
    def way(self: Any, x: Tensor) -> Tensor:
        h = x.detach().clone()
        q = self.q(h)
        self.seen = h.requires_grad_()
        return self.w(mix(q, self.k(h), self.v(h)))

    stock, fused = pair(way)
    assert_equal_step(stock, fused, batch())
    got, want = (parent_of(model).seen.grad for model in (fused, stock))
    assert_close_derived(got, want, 1e-12, layers=4)


def test_layer_that_is_fused_again_by_itself_leaves_its_siblings(shared: Shared) -> None:
    stock, fused = pair(three_alone)
    fuse(parent_of(fused).k)
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 2) and shared.projected == 3  # w is not called
    (row,) = [row for row in explain(fused).blocks if "shared" in row.state]
    assert "k runs its own call: it was fused or unfused by itself" in row.reason


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "o", "wo", "dense", "c_proj"])
def test_output_projection_of_attention_is_no_sibling(name: str, shared: Shared) -> None:
    """Its P of q's x would be computed for nothing."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for each in ("q", "k", name):
                setattr(self, each, nn.Linear(K, K, dtype=f64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, name)(torch.tanh(self.q(x) * self.k(x)))
            return y

    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=["q", "k", name])
    stock = get_peft_model(Stack(Attention()), config, autocast_adapter_dtype=False)
    randomize(stock)
    fused = fuse(copy.deepcopy(stock))
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 2) and shared.projected == 2


class Pairs(nn.Module):
    """Three pairs of layers, each with an x of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdef":
            setattr(self, name, nn.Linear(K, K, dtype=f64))

    def forward(self, x: Tensor) -> Tensor:
        h = mix(self.a(x), self.b(x)[..., :32], self.a.base_layer(x)[..., 32:])
        h = mix(self.c(h), self.d(h)[..., :32], h[..., 32:])
        y: Tensor = self.e(h) * self.f(h)
        return y


def pair_of(parent: Callable[[], nn.Module], names: str) -> tuple[Any, Any]:
    """A stack of such a parent with adapters on these layers, and its fused copy."""
    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=list(names))
    stock = get_peft_model(Stack(parent()), config, autocast_adapter_dtype=False)
    randomize(stock)
    return stock, fuse(copy.deepcopy(stock))


def test_pairs_that_each_share_an_x_of_their_own_all_share(shared: Shared) -> None:
    stock, fused = pair_of(Pairs, "abcdef")
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (3, 6)


def test_linears_that_share_x_under_autocast_round_their_adapters(monkeypatch) -> None:
    """P is then rounded too, as `lora_linear` does."""
    given: list[Any] = []
    monkeypatch.setattr(blocks, "down_projections", partial(_record, given))
    torch.manual_seed(0)
    linears = [
        blocks.LinearArguments(torch.randn(N, K), torch.randn(R, K), torch.randn(N, R), 0.5)
        for N in (32, 48)
    ]
    x = batch(f32)
    with torch.autocast("cpu", bf16):
        found = blocks.shared_linears(x, linears)
        apart = [lora_kernels.lora_linear(x, *each) for each in linears]
    ((rows, lora_A, is_rounded),) = given
    assert {t.dtype for t in (rows, *lora_A)} == {bf16} and is_rounded
    for got, want in zip(found, apart, strict=True):
        assert got.dtype is bf16
        assert_close_derived(got.float(), want.float(), 2.0**-7)  # y, P and S, to 2⁻⁹ each


def _record(given: list[Any], *args: Any) -> Any:
    given.append(args)
    rows, p = args[0].reshape(-1, K), [args[0].reshape(-1, K) @ A.T for A in args[1]]
    return rows, p


@pytest.mark.parametrize("shape", [(80, K + 1), (80, 1), (), (0,)], ids=str)
def test_siblings_refuse_an_x_that_does_not_fit_in_the_words_of_their_own_call(shape: Any) -> None:
    found = []
    for blocks_on in (True, False):
        model = fuse(build(three_alone), blocks=blocks_on)
        with pytest.raises(ValueError, match="x: got shape") as refused:
            model(torch.ones(shape, dtype=f64))
        found.append(str(refused.value))
    assert found[0] == found[1]


def test_layer_under_two_names_is_one_sibling(shared: Shared) -> None:
    """P of it would be computed twice."""
    stock = build(three_alone)
    parent_of(stock).alias = parent_of(stock).k
    fused = fuse(copy.deepcopy(stock))
    assert [row.strategy for row in explain(fused).blocks] == ["x is threaded through q, k, v, w"]
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (1, 3) and shared.projected == 4


class TwoWidths(nn.Module):
    """Layers of another width between those that share x."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("a", K), ("b", 32), ("c", K), ("d", 32)):
            setattr(self, name, nn.Linear(size, K, dtype=f64))

    def forward(self, x: Tensor) -> Tensor:
        half = torch.tanh(x[..., :32].contiguous())
        return self.a(x) * self.c(x) + self.b(half) * self.d(half)


def test_layers_of_two_widths_are_two_groups(shared: Shared) -> None:
    stock, fused = pair_of(TwoWidths, "abcd")
    said = [row.strategy for row in explain(fused).blocks]
    assert said == ["x is threaded through a, c", "x is threaded through b, d"]
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (2, 4)


def test_model_of_zero3_has_no_siblings(monkeypatch: pytest.MonkeyPatch, shared: Shared) -> None:
    """Each layer is gathered for its own call."""
    from lora_kernels.peft import zero3

    stock, fused = pair(three_alone)
    monkeypatch.setattr(swap, "is_zero3", lambda model: True)
    fuse(fused)
    assert explain(fused).blocks == []
    assert all(zero3.is_gathered_in_call(getattr(parent_of(fused), name)) for name in ALL)
    assert_equal_step(stock, fused, batch())
    assert shared.take() == (0, 0)
    assert hooks_in(unfuse(fused)) == 0


def test_siblings_keep_nothing_that_a_later_step_frees() -> None:
    """A graph is dropped without a backward, or after it."""
    _, fused = pair()
    for with_backward in (False, True):
        x = batch().requires_grad_()
        y = fused(x)
        seen = [weakref.ref(t) for t in (x, y)]
        if with_backward:
            y.sum().backward()
        del x, y
        assert [ref() for ref in seen] == [None, None]


def test_siblings_in_inference_mode_and_out_of_it_equal_peft(shared: Shared) -> None:
    """Both without gradients."""

    def way(self: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            q = self.q(x)
        k = self.k(x)
        with torch.inference_mode():
            v = self.v(x)
        assert [t.is_inference() for t in (q, k, v)] == [True, False, True]
        return mix(q, k, v)

    stock, fused = pair(way)
    with torch.no_grad():
        assert_close_derived(fused(batch()), stock(batch()), 1e-12)
    assert shared.take() == (1, 3)


@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_explain_of_siblings_is_of_the_dtype_of_x_that_it_is_told(x_dtype: Any) -> None:
    """A 4-bit base has no dtype that tells x's, and the adapters are float32."""
    model = build(dtype=f32, base="nf4")
    for name in ALL:
        base = getattr(parent_of(model), name).base_layer
        base.compute_dtype, base.compute_type_is_set = bf16, True
    said = "its base computes in torch.bfloat16, x has torch.float32"
    (row,) = explain(fuse(model), x_dtype=x_dtype).blocks
    assert row == (row_of("", "") if x_dtype is bf16 else row_of(ALL, said))


@pytest.mark.parametrize("B", [bf16, f32], ids=str)
def test_p_of_linears_that_share_x_is_rounded_where_all_that_reads_it_has_16_bits(
    B: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(blocks, "down_projections", partial(_record, given))
    linears = [
        blocks.LinearArguments(
            torch.randn(columns, K, dtype=bf16),
            torch.randn(R, K, dtype=bf16),
            torch.randn(columns, R, dtype=B),
            0.5,
        )
        for columns in (32, 48)
    ]
    blocks.shared_linears(batch(bf16), linears)
    ((*_, is_rounded),) = given
    assert is_rounded is (B is bf16)


def test_siblings_save_x_and_no_copy_of_its_rows() -> None:
    _, fused = pair(lambda self, x: torch.cat([self.q(x), self.k(x), self.v(x)], -1))
    x = batch().transpose(0, 1)  # whose rows [M, K] are a copy
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        parent_of(fused)(x)
    (found,) = [t for t in saved if t.numel() == x.numel() and t.shape[-1] == K]
    assert found.data_ptr() == x.data_ptr()
