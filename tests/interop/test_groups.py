"""Layers that a forward calls with one x, computed together on the path of a GPU, beside PEFT's."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import linecache
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_kernels
from lora_kernels.backends.eager import blocks as eager_blocks
from lora_kernels.bench import baselines, counter
from lora_kernels.core import forced
from lora_kernels.integrations import FuseCallback
from lora_kernels.peft import explain, explain_rows, fuse, groups, swap, unfuse
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    OpCounter,
    activate,
    add_adapter,
    in_float64,
    randomize,
    skip_without_kasa,
)

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, ROWS, R = 64, (2, 40), 5  # 80 rows, more than MANY_ROWS
SIZES = {"q": 64, "k": 32, "v": 48}
pytestmark = pytest.mark.usefixtures("gpu_path")


# Which layers a forward calls with one x, read from its source

THREE = "q = self.q(x)\nk = self.k(x)\nv = self.v(x)"
FORWARDS: dict[str, tuple[str, list[str]]] = {
    "in order": (THREE, ["q k v"]),
    "out of order": ("v = self.v(x)\nq, k = self.q(x), self.k(x)", ["v q k"]),
    "nested": ("return self.q(x) + f(self.k(x), (self.v(x),))", ["q k v"]),
    "called twice": (THREE + "\nreturn self.k(x)", ["q v"]),
    "called of another object": (THREE + "\nreturn other.k(x)", ["q v"]),
    "read": (THREE + "\nreturn self.k.weight", ["q v"]),
    "getattr": (THREE + "\nreturn getattr(self, 'v')", ["q k"]),
    "local name": ("q, layer = self.q(x), self.k\nk, v = layer(x), self.v(x)", ["q v"]),
    "in a condition": ("q = self.q(x)\nif x:\n  k = self.k(x)\nv = self.v(x)", ["q v"]),
    "in one branch": ("q = self.q(x)\nif x:\n  k = self.k(x)\n  v = self.v(x)", ["k v"]),
    "first in a branch": ("if x:\n  q = self.q(x)\nk = self.k(x)\nv = self.v(x)", ["q k v"]),
    "in two branches": ("if x:\n  q = self.q(x)\nelse:\n  k = self.k(x)", []),
    "in a condition's test": ("if self.q(x):\n  k = self.k(x)\nv = self.v(x)", ["q v"]),
    "in an expression": ("q, k = self.q(x), self.k(x) if x else x\nv = x and self.v(x)", []),
    "in a loop": ("q = self.q(x)\nfor i in x:\n  k = self.k(x)\nv = self.v(x)", ["q v"]),
    "in a while": ("while x:\n  q = self.q(x)\nk = self.k(x)\nv = self.v(x)", ["k v"]),
    "in a try": ("try:\n  q = self.q(x)\nfinally:\n  k = self.k(x)\nv = self.v(x)", []),
    "comprehension": ("q, k = self.q(x), self.k(x)\nv = [self.v(x) for i in x]", ["q k"]),
    "lambda": ("q, k = self.q(x), self.k(x)\nreturn lambda x: self.v(x)", ["q k"]),
    "function": ("def f(x):\n  return self.v(x)\nq, k = self.q(x), self.k(x)", ["q k"]),
    "keyword": ("q, k, v = self.q(x), self.k(x=x), self.v(x)", ["q v"]),
    "two arguments": ("q, k, v = self.q(x, 1), self.k(x), self.v(x)", ["k v"]),
    "no name": ("q, k, v = self.q(x[0]), self.k(x), self.v(*x)", []),
    "another x": ("q, k, v = self.q(x), self.k(y), self.v(y)", ["k v"]),
    "assigned between": ("q = self.q(x)\nx = f(x)\nk, v = self.k(x), self.v(x)", ["k v"]),
    "assigned in a loop": ("q = self.q(x)\nfor x in y: pass\nk, v = self.k(x), self.v(x)", ["k v"]),
    "assigned by itself": ("x = self.q(x)\nk, v = self.k(x), self.v(x)", ["k v"]),
    "assigned with others": ("x, k = self.q(x), self.k(x)\nreturn self.v(x)", ["q k"]),
    "annotated": ("x: T = self.q(x)\nk: T = self.k(x)\nv: T = self.v(x)", ["k v"]),
    "added to": ("x += self.q(x)\nk, v = self.k(x), self.v(x)", ["k v"]),
    "walrus": ("k, v = self.k(x := self.q(x)), self.v(x)", []),
    "with": ("with f():\n  q = self.q(x)\nk, v = self.k(x), self.v(x)", ["q k v"]),
    "with as x": ("q = self.q(x)\nwith f(x) as x:\n  k, v = self.k(x), self.v(x)", ["k v"]),
    "early return": ("q = self.q(x)\nif q: return q\nk, v = self.k(x), self.v(x)", ["k v"]),
    "last return": ("q, k = self.q(x), self.k(x)\nreturn q + k + self.v(x)", ["q k v"]),
    "two pairs": ("q, k = self.q(x), self.k(x)\nreturn self.v(y) + self.w(y)", ["q k", "v w"]),
    "alone": ("return self.q(x)", []),
}


def forward_of(body: str, file: str = "") -> Any:
    """The function with this body; its source is in `file`, if one is named."""
    source = "def forward(own, x, y, *more):\n  " + body.replace("self", "own").replace(
        "\n", "\n  "
    )
    if file:
        linecache.cache[file] = len(source), None, source.splitlines(True), file
    found: dict[str, Any] = {}
    exec(compile(source, file or "<nowhere>", "exec", dont_inherit=True), found)
    return found["forward"]


def names_of(forward: Any, layers: Any = None) -> list[str]:
    cls = type("Module", (), {"forward": forward})
    layers = layers or {name: SimpleNamespace(in_features=K) for name in "qkvw"}
    return [" ".join(names) for names in groups.shared_calls(cls, layers)]


@pytest.mark.parametrize("name", FORWARDS)
def test_shared_calls_of_a_forward_are_those_with_one_x(name: str) -> None:
    body, want = FORWARDS[name]
    assert names_of(forward_of(body, f"<{name}>")) == want


def test_shared_calls_of_a_wrapped_forward_are_its_own() -> None:
    inner = forward_of(THREE, "<wrapped>")
    assert names_of(functools.wraps(inner)(lambda *args: None)) == ["q k v"]


def test_shared_calls_without_source_are_none() -> None:
    assert names_of(forward_of(THREE)) == names_of(torch.relu) == names_of(partial(print)) == []


def test_shared_calls_are_of_distinct_fused_layers_of_one_width() -> None:
    forward = forward_of(THREE, "<layers>")
    q, k, narrow = (SimpleNamespace(in_features=n) for n in (K, K, 32))
    assert names_of(forward, {"q": q, "k": k}) == ["q k"]
    assert names_of(forward, {"q": q, "k": k, "v": narrow}) == ["q k"]
    assert names_of(forward, {"q": q, "k": k, "v": k}) == []  # one layer under two names


# Models


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(K, size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.cat([q, k, v], -1)


def build(dtype: torch.dtype = f64, adapter: Any = None, nf4: Any = False, **config: Any) -> Any:
    """A PEFT model of a parent, its adapters as if trained, and biases that are not zero.

    nf4: whether the bases are 4-bit, or the names of those that are.
    """
    torch.manual_seed(0)
    parent: Any = Parent().to(dtype)
    for name in SIZES if nf4 is True else nf4 or ():
        pytest.importorskip("bitsandbytes")
        base = baselines.linear_4bit(getattr(parent, name), "nf4")
        base.compute_dtype, base.compute_type_is_set = dtype, True
        setattr(parent, name, base)
    settings = {"r": R, "lora_alpha": 7, "target_modules": list(SIZES)} | config
    model = get_peft_model(nn.Sequential(parent), LoraConfig(**settings))
    randomize(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter or dtype)
    return model.train()


def parent_of(model: Any) -> Any:
    return model.base_model.model[0]


def pair(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    stock = build(*args, **kwargs)
    return stock, fuse(copy.deepcopy(stock))


def batch(dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(*ROWS, K, dtype=f64, generator=torch.Generator().manual_seed(3)).to(dtype)


def step(model: Any, x: Tensor, call: Any = None, times: int = 1) -> dict[str, Tensor]:
    """y, dx and each gradient, of the last of `times` backwards. call: of the parent and x."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = model(x) if call is None else call(parent_of(model), x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=f64).to(y.dtype)
    for i in range(times):
        model.zero_grad()
        x.grad = None
        if y.requires_grad:
            y.backward(dy, retain_graph=i + 1 < times)
    named = {n: p.grad for n, p in [("x", x), *model.named_parameters()] if p.grad is not None}
    return {"y": y.detach().clone()} | {name: grad.clone() for name, grad in named.items()}


def assert_pefts(stock: Any, fused: Any, x: Tensor, call: Any = None, times: int = 1) -> None:
    got, want = step(fused, x, call, times), step(stock, x, call, times)
    if x.dtype is f64:
        assert_close_derived(got, want, 1e-12)
    else:
        exact = x.detach().double().requires_grad_(x.requires_grad)
        assert_as_exact(got, step(in_float64(stock), exact, call, times), want)
    drop(fused)


def drop(model: Any) -> None:
    """The next call of a layer drops what was not taken, whether its x is shared or not."""
    with torch.no_grad():
        getattr(parent_of(model), "v", lambda x: x)(batch()[:, :1].to(weight_dtype(model)))
    assert groups._local.results is None


def weight_dtype(model: Any) -> torch.dtype:
    return next(p.dtype for n, p in model.named_parameters() if "bias" in n)


class Counts:
    """How often layers were computed together, and how many results were taken."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups = self.taken = 0
        linears, take, lock = eager_blocks.linears, groups._take_result, threading.Lock()

        def count_linears(x: Tensor, layers: Any, *rest: Any) -> Any:
            with lock:
                self.groups += len(layers) > 1
            return linears(x, layers, *rest)

        def count_taken(*args: Any) -> Any:
            y = take(*args)
            with lock:
                self.taken += y is not None
            return y

        patch.setattr(eager_blocks, "linears", count_linears)
        patch.setattr(groups, "_take_result", count_taken)

    def pop(self) -> tuple[int, int]:
        found, self.groups, self.taken = (self.groups, self.taken), 0, 0
        return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


# States in which they are computed together


class Dtypes(NamedTuple):
    """The dtypes of x and the base, of the adapters, and of x if it has another one."""

    dtype: torch.dtype
    adapter: torch.dtype
    autocast: bool = False
    nf4: bool = False
    cast: bool = False  # `cast_adapters`
    x: torch.dtype | None = None


DTYPES = {
    "float64": Dtypes(f64, f64),
    "float32": Dtypes(f32, f32),
    "bf16": Dtypes(bf16, bf16),
    "bf16, float32 adapters": Dtypes(bf16, f32),
    "bf16, bf16 adapters, autocast": Dtypes(bf16, bf16, autocast=True),
    "bf16, float32 adapters, autocast": Dtypes(bf16, f32, autocast=True),
    "bf16, float32 adapters, cast": Dtypes(bf16, f32, cast=True),
    "float32, autocast": Dtypes(f32, f32, autocast=True),
    "float32 beside bf16 x, autocast": Dtypes(f32, f32, autocast=True, x=bf16),
    "NF4, bf16": Dtypes(bf16, bf16, nf4=True),
    "NF4, float32 adapters": Dtypes(bf16, f32, nf4=True),
    "NF4, float32 adapters, autocast": Dtypes(bf16, f32, autocast=True, nf4=True),
    "NF4, float32 x, autocast": Dtypes(bf16, f32, autocast=True, nf4=True, x=f32),
}


def freeze(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and part not in name)

    return change


def only(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and part in name)

    return change


def decomposed(model: Any) -> None:
    """KaSA truncates the base weight in the first forward."""
    model(batch().to(weight_dtype(model)))


def kasa() -> Any:
    skip_without_kasa()
    return peft.KasaConfig()


# Each a configuration, and a change before `fuse`.
CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any], Any] | None]] = {
    "plain": (dict, None),
    "trained bias": (lambda: {"bias": "all"}, None),
    "lora_bias": (lambda: {"lora_bias": True}, None),
    "KaSA": (lambda: {"kasa_config": kasa()}, decomposed),
    "hot-swap": (dict, partial(prepare_model_for_compiled_hotswap, target_rank=R)),
    "ranks": (lambda: {"rank_pattern": {"k": 3, "v": 9}, "alpha_pattern": {"k": 4}}, None),
    "k frozen": (dict, freeze(".k.")),
    "lora_A frozen": (dict, freeze("lora_A")),
    "lora_B frozen": (dict, freeze("lora_B")),
    "all frozen": (dict, freeze("")),
    "no dx": (dict, None),
    "biases alone, no dx": (lambda: {"bias": "all"}, only("bias")),
    "gates alone, no dx": (
        lambda: {"kasa_config": kasa()},
        lambda m: (decomposed(m), only("diag")(m)),
    ),
}
FEW = ("float64", "bf16, float32 adapters", "NF4, float32 adapters, autocast")
STATES = [(name, "plain") for name in DTYPES] + [(d, c) for d in FEW for c in CHANGES]
for name in ("KaSA", "gates alone, no dx"):  # PEFT has no KaSA over 4 bits
    STATES.remove((FEW[2], name))


def caller(autocast: bool) -> Callable[[Any, Tensor], Tensor]:
    """Return the call of a module, under autocast or not; the float64 reference is without."""

    def call(module: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16, enabled=autocast and x.dtype is not f64):
            y: Tensor = module(x)
        return y

    return call


@pytest.mark.parametrize(("of", "change"), STATES)
def test_group_in_any_state_has_pefts_gradients(of: str, change: str, counts: Counts) -> None:
    dtype, adapter, autocast, nf4, cast, x_dtype = DTYPES[of]
    config, apply = CHANGES[change]
    stock = build(dtype, adapter, nf4, **config())
    if apply is not None:
        apply(stock)
    fused = fuse(copy.deepcopy(stock), cast_adapters=cast)

    call = caller(autocast)
    x = batch(x_dtype or dtype).requires_grad_("no dx" not in change)
    got, want = step(fused, x, call), step(stock, x, call)
    # Of an x without gradient each result has a graph of its own.
    assert counts.pop() == ((1, 2) if x.requires_grad else (0, 0))
    if dtype is f64:
        assert_close_derived(got, want, 1e-12)
    else:
        exact = x.detach().double().requires_grad_(x.requires_grad)
        assert_as_exact(got, step(in_float64(stock), exact, call), want)
    if autocast or nf4:
        with torch.no_grad():
            assert call(parent_of(fused), x).dtype is call(parent_of(stock), x).dtype


# States in which each layer computes its own result


def inference(parent: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y: Tensor = parent(x)
    return y.clone()


def selectively(parent: Any, x: Tensor) -> Any:
    """A saved result of an op must not change in place."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        is_saved = op.name().startswith(("aten::mm", "aten::addmm"))
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(parent, x, use_reentrant=False, context_fn=context_fn)


def while_forced(parent: Any, x: Tensor) -> Any:
    """Autograd's thread, where a checkpoint is recomputed, knows `forced.entered` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forced, "entered", "triton")
        return parent(x)


def hook(kind: str, path: str, result: Any = lambda *args: None) -> Callable[[Any], Any]:
    return lambda m: getattr(m.get_submodule(path), f"register_{kind}_hook")(result)


def other_forward(m: Any) -> None:
    own = type(m.k).forward
    m.k.forward = lambda x: 2 * own(m.k, x)


def inference_k(m: Any) -> None:
    linear = m.k.lora_A["default"]
    with torch.inference_mode():
        linear._parameters["weight"] = nn.Parameter(linear.weight.clone(), False)


# A change of the parent after `fuse`, and a call.
APART: dict[str, tuple[Any, Any]] = {
    "hook on k": (hook("forward", "k", lambda m, args, y: 2 * y), None),
    "hook on v's gradient": (hook("full_backward", "v", lambda m, dx, dy: (2 * dx[0],)), None),
    "hook on k's lora_A": (hook("forward", "k.lora_A.default", lambda m, x, y: 2 * y), None),
    "hook on k's base": (hook("forward_pre", "k.base_layer"), None),
    "k's forward": (other_forward, None),
    "k unfused": (lambda m: unfuse(m.k), None),
    "k merged": (lambda m: m.k.merge(), None),
    "k in no group": (lambda m: setattr(m.k, "_group", None), None),
    "k disabled": (lambda m: m.k.enable_adapters(False), None),
    "k with several adapters": (lambda m: m.k.set_adapter(["default", "second"]), None),
    "trained base": (lambda m: m.k.base_layer.weight.requires_grad_(), None),
    "few rows": (None, lambda m, x: m(x[:, :32])),
    "inference mode": (None, inference),
    "checkpointed selectively": (None, selectively),
    "compiled": (None, lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True)(x)),
    "backend": (None, while_forced),
}


@pytest.mark.parametrize("name", APART)
def test_layers_in_a_state_that_fits_no_group_have_pefts_gradients(name, counts) -> None:
    change, call = APART[name]
    stock = build()
    add_adapter(stock, r=3)
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused) if change else ():
        change(parent_of(model))
    assert_pefts(stock, fused, batch().requires_grad_(), call)
    assert counts.pop() == (0, 0)


def test_adapters_of_two_dtypes_are_apart_and_explain_says_so(counts: Counts) -> None:
    stock = build(bf16)
    for p in parent_of(stock).k.lora_A.parameters():
        p.data = p.data.float()
    fused = fuse(copy.deepcopy(stock))
    (row,) = (row for row in explain(fused).blocks if "q, k, v" in row.strategy)
    assert (row.state, row.reason) == (explain_rows.NOT_SHARED, explain_rows.NO_BLOCK)
    parent_of(fused)(batch(bf16))
    assert counts.pop() == (0, 0)
    (row,) = (row for row in explain(fuse(build(bf16))).blocks if "q, k, v" in row.strategy)
    assert row.state == explain_rows.SHARED


@pytest.mark.parametrize("dense", ["q", "k"])
def test_dense_layer_beside_4bit_ones_keeps_its_dtype_under_autocast(dense, counts) -> None:
    """Under autocast a dense layer returns autocast's dtype, and bitsandbytes' x's."""
    found = []
    stock = build(f32, nf4=[name for name in SIZES if name != dense])
    for model in (stock, fuse(copy.deepcopy(stock))):
        x = batch(f32).requires_grad_()
        with autocast():
            ys = [getattr(parent_of(model), name)(x) for name in SIZES]
        sum(y.float().square().sum() for y in ys).backward()
        found.append([y.dtype for y in ys])
    assert found[0] == found[1] == [bf16 if name == dense else f32 for name in SIZES]
    assert counts.pop() == (0, 0)
    exact = batch().requires_grad_()
    x, call = batch(f32).requires_grad_(), caller(True)
    got, want = step(fuse(copy.deepcopy(stock)), x, call), step(stock, x, call)
    assert_as_exact(got, step(in_float64(stock), exact, call), want)


def test_result_of_a_frozen_layer_of_an_x_without_gradient_needs_none() -> None:
    stock, fused = pair()
    needs = []
    for model in (stock, fused):
        freeze(".k.")(model)
        parent = parent_of(model)
        x = batch()
        needs.append([layer(x).requires_grad for layer in (parent.q, parent.k, parent.v)])
    assert needs == [[True, False, True]] * 2


def test_layers_with_dora_have_pefts_gradients(counts: Counts) -> None:
    assert_pefts(*pair(use_dora=True), batch().requires_grad_())
    assert counts.pop() == (0, 0)


def test_inference_tensor_among_the_adapters_has_pefts_gradients() -> None:
    """An inference tensor has no version. A server may load adapters inside of the mode."""
    stock, fused = pair()
    for model in (stock, fused):
        inference_k(parent_of(model))
    assert_pefts(stock, fused, batch())


def test_dropout_that_is_active_has_pefts_masks(counts: Counts, monkeypatch: Any) -> None:
    monkeypatch.setattr(swap, "heavier_reason", lambda layer: None)
    stock, fused = pair(lora_dropout=0.3)
    found = []
    with counter._NativeDropout():
        for model in (fused, stock):
            torch.manual_seed(1)
            found.append(step(model, batch().requires_grad_()))
    assert_close_derived(*found, 1e-12)
    assert counts.pop() == (0, 0)
    assert_pefts(stock.eval(), fused.eval(), batch().requires_grad_())
    assert counts.pop() == (1, 2)


def test_layers_of_which_one_casts_its_adapter_are_apart(counts: Counts) -> None:
    fused = fuse(build(bf16, f32), cast_adapters=True)
    parent_of(fused).k.casts_adapters = False
    step(fused, batch(bf16))
    assert counts.pop() == (0, 0)


@pytest.mark.parametrize("shape", [(80, K + 1), (80, 1), (), (0,)], ids=str)
def test_x_that_does_not_fit_is_refused_in_the_words_of_a_layer(shape: Any) -> None:
    model = fuse(build())
    with pytest.raises(ValueError, match="x: got shape"):
        model(torch.ones(shape, dtype=f64))


# How the layers are called, from outside of the forward


def cat(*ys: Tensor) -> Tensor:
    return torch.cat(ys, -1)


def called(names: str, of: Any = lambda x: x) -> Callable[[Any, Tensor], Tensor]:
    """Call the layers in this order, k with `of(x)`."""
    return lambda m, x: cat(*[getattr(m, name)(of(x) if name == "k" else x) for name in names])


def between(change: Any, within: Any = contextlib.nullcontext) -> Callable[[Any, Tensor], Tensor]:
    """Call q, change the parent or x, which is no leaf, and call k and v in a context."""

    def call(m: Any, x: Tensor) -> Tensor:
        h = x * 1.5
        q = m.q(h)
        with torch.no_grad():
            change(m, h)
        with within():
            k, v = m.k(h), m.v(h)
        return cat(q, k.to(q.dtype), v.to(q.dtype))

    return call


def nothing(m: Any, x: Tensor) -> None: ...


def replace(m: Any, x: Tensor) -> None:
    """The other parameter has the same version."""
    m.k.lora_A["default"].weight = nn.Parameter(2.0 * m.k.lora_A["default"].weight.detach())


def change_scaling(m: Any, x: Tensor) -> None:
    m.v.scaling["default"] *= 2


def change_x(m: Any, x: Tensor) -> Tensor:
    for layer in (m.q, m.k, m.v):  # whose dA would need what x was
        layer.lora_A["default"].weight.requires_grad_(False)
    return between(lambda m, x: x.mul_(2.0))(m, x)


def change_results(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    q *= 3.0
    v.view(-1, v.shape[-1])[3] = 0.5
    return cat(q, k.add_(1.0), v)


def apart(m: Any, x: Tensor) -> Tensor:
    """Each result has a backward of its own, the first one before k and v are called."""
    ys = [m.q(x)]
    ys[0].square().sum().backward()
    ys += [m.k(x), m.v(x)]
    for y in ys[1:]:
        y.square().sum().backward(retain_graph=y is ys[1])
    return cat(*ys).detach()


def set_needs(value: bool, *names: str) -> Callable[[Any, Tensor], None]:
    def change(m: Any, x: Tensor) -> None:
        for name in names:
            m.get_parameter(name).requires_grad_(value)

    return change


def train_later(m: Any, x: Tensor) -> Tensor:
    """k's lora_A is frozen in q's call alone."""
    set_needs(False, K_A)(m, x)
    return between(set_needs(True, K_A))(m, x)


def swap_needs(m: Any, x: Tensor) -> Tensor:
    """Freeze k's lora_B in q's call, and its lora_A instead after it."""
    set_needs(False, K_B)(m, x)

    def swap(m: Any, x: Tensor) -> None:
        set_needs(False, K_A)(m, x)
        set_needs(True, K_B)(m, x)

    return between(swap)(m, x)


def need_dx_later(m: Any, x: Tensor) -> Tensor:
    m.seen = x.detach().clone()
    q = m.q(m.seen)
    return cat(q, m.k(m.seen.requires_grad_()), m.v(m.seen))


def without_grad_first(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        q = m.q(x)
    return cat(q, m.k(x), m.v(x))


def checkpointed(names: str, reentrant: bool) -> Callable[[Any, Tensor], Any]:
    """Checkpoint these layers each by itself, or the parent if there are none."""

    def call(m: Any, x: Tensor) -> Any:
        if not names:
            return checkpoint(m, x, use_reentrant=reentrant)
        ys = {n: partial(checkpoint, getattr(m, n), use_reentrant=reentrant) for n in names}
        return cat(*(ys.get(n, getattr(m, n))(x) for n in SIZES))

    return call


K_A, K_B = "k.lora_A.default.weight", "k.lora_B.default.weight"
autocast = partial(torch.autocast, "cpu", bf16)
saving = partial(torch.autograd.graph.saved_tensors_hooks, torch.clone, lambda t: t)
# How many groups were computed and results taken.
WAYS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, int]]] = {
    "in order": (Parent.forward, (1, 2)),
    "by name": (lambda m, x: cat(m.q(x=x), m.k(x=x), m.v(x)), (1, 2)),
    "reversed": (called("vkq"), (1, 0)),
    "v before k": (called("qvk"), (1, 0)),
    "q twice": (called("qqkv"), (2, 2)),
    "q alone": (called("q"), (1, 0)),
    "q and v": (called("qv"), (1, 0)),
    "q and k": (called("qk"), (1, 1)),
    "only v is used": (lambda m, x: (m.q(x), m.k(x), m.v(x))[2], (1, 2)),
    "k of another x": (called("qkv", lambda x: x.flip(1)), (1, 0)),
    "k of a view": (called("qkv", lambda x: x[:]), (1, 0)),
    "k of a clone": (called("qkv", torch.clone), (1, 0)),
    "strided": (lambda m, x: m(x.transpose(0, 1)), (1, 2)),
    "x changed": (change_x, (1, 0)),
    "results changed": (change_results, (1, 2)),
    "x needs a gradient later": (need_dx_later, (0, 0)),
    "backward between": (apart, (1, 0)),
    "hook on x": (between(lambda m, x: x.register_hook(lambda grad: grad * 2.0)), (1, 2)),
    "no gradients first": (without_grad_first, (1, 0)),
    "into autocast": (between(nothing, autocast), (1, 2)),  # which leaves float64
    "into saved-tensor hooks": (between(nothing, saving), (1, 0)),
    "k written": (between(lambda m, x: m.k.lora_B["default"].weight.mul_(2.0)), (1, 0)),
    "bias written": (between(lambda m, x: m.v.base_layer.bias.mul_(2.0)), (1, 1)),
    "k replaced": (between(replace), (1, 0)),
    "k's A frozen": (between(set_needs(False, K_A)), (1, 0)),
    "k's B frozen": (between(set_needs(False, K_B)), (1, 0)),
    "k trained": (train_later, (1, 0)),
    "k's frozen one swapped": (swap_needs, (1, 0)),
    "k's base trained": (between(set_needs(True, "k.base_layer.weight")), (1, 0)),
    "k's bias trained": (between(set_needs(True, "k.base_layer.bias")), (1, 0)),
    "into a mode": (between(nothing, OpCounter), (1, 0)),
    "v scaled": (between(change_scaling), (1, 1)),
    "checkpointed": (checkpointed("", False), (2, 2)),  # k and v save nothing to recompute
    "checkpointed, reentrant": (checkpointed("", True), (2, 4)),
    "q checkpointed": (checkpointed("q", False), (2, 0)),
    "q checkpointed, reentrant": (checkpointed("q", True), (2, 0)),
    "k checkpointed": (checkpointed("k", False), (1, 0)),
    "v checkpointed, reentrant": (checkpointed("v", True), (1, 1)),
}


@pytest.mark.parametrize("name", WAYS)
def test_layers_called_in_any_way_have_pefts_gradients(name: str, counts: Counts) -> None:
    (way, want), models = WAYS[name], pair()
    assert_pefts(*models, batch().requires_grad_(), way)
    assert counts.pop() == want
    if way is need_dx_later:
        stock, fused = (parent_of(model).seen.grad for model in models)
        assert_close_derived(fused, stock, 1e-12)


@pytest.mark.parametrize("name", ["in order", "into autocast", "q and v"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_layers_called_in_any_way_are_as_exact_as_pefts(name: str, dtype: Any) -> None:
    def call(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False) if x.dtype is f64 else contextlib.nullcontext():
            return WAYS[name][0](m, x)

    assert_pefts(*pair(dtype), batch(dtype).requires_grad_(), call)


def test_results_of_an_x_without_gradient_have_a_backward_each() -> None:
    stock, fused = pair()
    for model in (stock, fused):
        ys = [getattr(parent_of(model), name)(batch()) for name in SIZES]
        for y in ys:
            y.square().sum().backward()
    for p, want in zip(fused.parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) is (want.grad is None)
        if want.grad is not None:
            assert_close_derived(p.grad, want.grad, 1e-12)


def test_k_on_another_stream_computes_its_own_result(counts: Counts, monkeypatch: Any) -> None:
    """The stream may not wait for the first one's."""
    streams = iter((1, 2))
    monkeypatch.setattr(groups, "_stream", lambda x: next(streams))
    assert_pefts(*pair(), batch().requires_grad_(), called("qk"))
    assert counts.pop() == (1, 0)


def test_k_under_another_backend_is_computed_by_it() -> None:
    _, fused = pair()
    x, parent = batch().requires_grad_(), parent_of(fused)
    parent.q(x)
    with lora_kernels.backend("triton"), pytest.raises(RuntimeError, match="triton"):
        parent.k(x)
    drop(fused)


@pytest.mark.parametrize("name", ["in order", "only v is used", "q alone"])
def test_second_backward_equals_the_first(name: str) -> None:
    (_, fused), (way, _) = pair(), WAYS[name]
    x = batch().requires_grad_()
    assert_bitwise_equal(step(fused, x, way, times=2), step(fused, x, way))
    drop(fused)


def test_gradient_of_each_tensor_alone_is_pefts() -> None:
    stock, fused = pair()
    for name in ["x", *(n for n, p in stock.named_parameters() if p.requires_grad)]:
        found = []
        for model in (fused, stock):
            x = batch().requires_grad_()
            wanted = x if name == "x" else model.get_parameter(name)
            found += torch.autograd.grad(model(x).square().sum(), wanted)
        assert_close_derived(*found, 1e-12)


@pytest.mark.parametrize("change", ["plain", "trained bias", "KaSA", "lora_A frozen"])
@pytest.mark.parametrize("of", ["float64", "bf16, float32 adapters", "float32"])
def test_gradients_of_several_dy_at_once_equal_those_of_each(of: str, change: str) -> None:
    """`is_grads_batched=True`; a layer alone, with dropout too."""
    config, apply = CHANGES[change]
    stock = build(DTYPES[of].dtype, DTYPES[of].adapter, **config())
    if apply is not None:
        apply(stock)
    fused, rows = fuse(stock), batch(DTYPES[of].dtype)
    layer = parent_of(fused).q
    alone = copy.deepcopy(layer)
    alone.lora_dropout["default"] = nn.Dropout(0.5)
    for module, x in ((fused, rows), (layer, rows[:, :20]), (alone, rows)):
        x = x.clone().requires_grad_()
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        y = module(x)
        dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        kwargs: dict[str, Any] = {"retain_graph": True}
        together = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, **kwargs)
        for i, dy in enumerate(dys):
            each = torch.autograd.grad(y, wanted, dy, **kwargs)
            assert_close_derived([t[i] for t in together], each, layers=8)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *ys: Tensor) -> Tensor:
        return cat(*ys)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return None, None, None


WAYS_BACK = [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(("create_graph", "autocast"), WAYS_BACK)
def test_backward_without_any_gradient_of_the_results_has_none(create_graph, autocast) -> None:
    _, fused = pair()
    x, m = batch().requires_grad_(), parent_of(fused)
    y = WithoutGradient.apply(m.q(x), m.k(x), m.v(x)).sum() + x.sum()
    wanted = [x, m.q.lora_B["default"].weight]
    with torch.autocast("cpu", bf16, enabled=autocast):
        found = torch.autograd.grad(y, wanted, create_graph=create_graph, allow_unused=True)
    assert_bitwise_equal([*found], [torch.ones_like(x), None])


def test_result_differentiated_twice_raises_the_remedy() -> None:
    _, fused = pair()
    x = batch().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(fused(x).square().sum(), x)
    assert_bitwise_equal(dx, want)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("frozen", "shape"), [("lora_A", [*ROWS, K]), ("lora_B", [80, R]), ("", [80, R])]
)
def test_group_saves_no_tensor_that_no_gradient_needs(frozen: str, shape: Any) -> None:
    """x for dA, P for dB."""
    _, fused = pair()
    if frozen:
        freeze(frozen)(fused)
    saved: list[list[int]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append([*t.shape]) or t, id):
        fused(batch().requires_grad_())
    assert (shape in saved) is (frozen == "")


def test_results_in_inference_mode_and_out_of_it_are_of_their_mode() -> None:
    stock, fused = pair()
    x = batch()
    for order in ((True, False, True), (False, True, False)):
        for model in (stock, fused):
            ys = []
            for name, mode in zip(SIZES, order, strict=True):
                with torch.no_grad(), torch.inference_mode(mode):
                    ys.append(getattr(parent_of(model), name)(x))
            assert tuple(y.is_inference() for y in ys) == order


# Nothing is held


@pytest.mark.parametrize("name", ["in order", "q alone", "q and v", "k of another x"])
@pytest.mark.parametrize("grad", [False, True])
def test_x_and_the_results_are_freed_by_the_next_call(name: str, grad: bool) -> None:
    (_, fused), (way, _) = pair(), WAYS[name]
    x = batch().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = way(parent_of(fused), x)
    seen = [weakref.ref(t) for t in (x, y)]
    del x, y
    drop(fused)
    assert [ref() for ref in seen] == [None, None]


@pytest.mark.parametrize("grad", [False, True])
def test_x_and_the_results_of_q_alone_are_freed_after_its_backward(grad: bool) -> None:
    """Without gradients, as soon as x is: no later call of a grouped layer is needed."""
    _, fused = pair()
    with torch.set_grad_enabled(grad):
        x = 1.5 * batch().requires_grad_(grad)
        y = parent_of(fused).q(x)
    assert groups._local.results is not None
    seen = [weakref.ref(t) for t in (x, *(pending[-1] for pending in groups._local.results[-1]))]
    if grad:
        y.sum().backward()
    del x, y
    assert [ref() for ref in seen] == [None, None, None]
    drop(fused)


def test_exception_between_the_calls_holds_nothing_after_the_next_one(counts: Counts) -> None:
    stock, fused = pair()
    x = batch().requires_grad_()
    seen = weakref.ref(x)
    with pytest.raises(ZeroDivisionError):
        parent_of(fused).q(x)[0, 0, 0].item() / 0
    del x
    assert counts.pop() == (1, 0)
    assert_pefts(stock, fused, batch().requires_grad_())
    assert counts.pop() == (1, 2) and seen() is None


def test_threads_take_their_own_results(counts: Counts) -> None:
    _, fused = pair()
    parent, barrier = parent_of(fused), threading.Barrier(2)
    xs = [batch(), 2 * batch()]
    with lora_kernels.backend("eager"), torch.no_grad():
        want = [cat(*(getattr(parent, name)(x) for name in SIZES)) for x in xs]
    got: list[Any] = [None, None]
    counts.pop()

    def run(i: int) -> None:
        with lora_kernels.backend("eager"), torch.no_grad():
            ys = []
            for name in SIZES:
                ys.append(getattr(parent, name)(xs[i]))
                barrier.wait(10)
            got[i] = cat(*ys)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_bitwise_equal(got, want)
    assert counts.pop() == (2, 4)


# The life of a model


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_model_have_groups_of_their_own(copy_of: Any, counts: Counts) -> None:
    stock, fused = pair()
    found = copy_of(fused)
    for p in fused.parameters():
        p.data.zero_()
    assert_pefts(stock, found, batch().requires_grad_())
    assert counts.pop() == (1, 2)
    assert all(layer.__dict__["_group"] is not parent_of(fused).q._group for layer in
               parent_of(found).children())  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, saved_and_loaded])
def test_layer_copied_out_of_its_model_equals_pefts(copy_of: Any, name: str) -> None:
    stock, fused = pair()
    layer = copy_of(getattr(parent_of(fused), name))
    own = getattr(parent_of(stock), name)
    assert_close_derived(layer(batch()), own(batch()), 1e-12)
    drop(fused)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, saved_and_loaded])
def test_layer_copied_out_of_its_model_leaves_the_others(copy_of: Any) -> None:
    _, fused = pair()
    k, group = parent_of(fused).k, parent_of(fused).k._group
    found = copy_of(k)
    if copy_of is copy.copy:
        assert found._group is None
    else:
        assert found._group is not group and found._group.layers == [None, found, None]
    assert group.layers == [*parent_of(fused).children()]
    stored = []
    for model in (fused, fuse(build(), blocks=False)):
        file = io.BytesIO()
        torch.save(parent_of(model).k, file)
        stored.append(len(zipfile.ZipFile(file).namelist()))
    assert stored[0] == stored[1]  # a file for each tensor


@pytest.mark.parametrize("copy_of", [copy.deepcopy, saved_and_loaded])
def test_copy_of_a_model_with_a_layer_unfused_by_itself_shares_no_x(copy_of, counts) -> None:
    stock, fused = pair()
    unfuse(parent_of(fused).k)
    found = copy_of(fused)
    assert_pefts(stock, found, batch().requires_grad_())
    assert counts.pop() == (0, 0)
    for model in (fused, found):
        (row,) = (row for row in explain(model).blocks if "q, k, v" in row.strategy)
        assert row.reason == "k: it was fused or unfused by itself"


def test_grouped_layers_of_an_unloaded_model_are_freed() -> None:
    _, fused = pair()
    seen = [weakref.ref(layer) for layer in parent_of(fused).children()]
    base = fused.merge_and_unload()
    del fused
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3 and isinstance(base[0].q, nn.Linear)


LIVES: dict[str, Callable[[Any], Any]] = {
    "another adapter": lambda model: activate(model, "second"),
    "adapter deleted": lambda model: (
        activate(model, "second").delete_adapter("default")
        if "default" in model.peft_config
        else None
    ),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "unfused": unfuse,
    "unloaded": lambda model: model.merge_and_unload(),
    "moved": lambda model: model.float().double(),
    "optimizer": lambda model: [p.data.mul_(0.5) for p in model.parameters() if p.requires_grad],
}


@pytest.mark.parametrize("name", LIVES)
def test_model_that_changes_between_forwards_has_pefts_gradients(name: str) -> None:
    stock = build()
    add_adapter(stock, r=3)
    fused = fuse(copy.deepcopy(stock))
    for _ in range(2):
        assert_pefts(stock, fused, batch().requires_grad_())
        for model in (stock, fused):
            LIVES[name](model)
    assert_pefts(stock, fused, batch().requires_grad_())


def groups_in(model: Any) -> int:
    return len(list(groups.groups_of(model)))


def test_unfuse_and_blocks_false_leave_no_group() -> None:
    model = build()
    before = dict(vars(parent_of(model).q))
    assert groups_in(fuse(fuse(model))) == 1
    assert groups_in(fuse(model, blocks=False)) == 0
    assert groups_in(fuse(model)) == 1
    assert groups_in(unfuse(model)) == 0 and vars(parent_of(model).q) == before
    FuseCallback(blocks=False).on_init_end(None, None, None, model=model)  # type: ignore[arg-type]
    assert groups_in(model) == 0


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kernels.backends.library.emulates_gpu", False)
        yield


def test_group_on_a_cpu_computes_layer_by_layer(counts: Counts) -> None:
    stock, fused = pair(f32)
    x = batch(f32).requires_grad_()
    with on_cpu():
        assert_pefts(stock, fused, x)
    assert counts.pop() == (0, 0)
