"""Gated MLPs as one block on the path of a GPU, beside PEFT's own."""

from __future__ import annotations

import copy
import importlib
import inspect
import types
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.bench import baselines
from lora_kernels.peft import explain, fuse, mlp, unfuse, zero3
from lora_kernels.peft.mlp import GatedMLP
from tests.interop import test_groups
from tests.interop.test_groups import (
    CHANGES,
    DTYPES,
    FEW,
    caller,
    freeze,
    hook,
    inference,
    on_cpu,
    parent_of,
    saved_and_loaded,
    selectively,
    step,
    while_forced,
)
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import activate, add_adapter, in_float64, randomize

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, H, R = 64, 128, 5
pytestmark = pytest.mark.usefixtures("gpu_path")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether dg overwrites g, at each backward of a block."""
    found: list[bool] = []

    def recorded(backward: Any) -> Any:
        def record(*args: Any) -> Any:
            found.append(inspect.signature(backward).bind(*args).arguments["in_place"])
            return backward(*args)

        return record

    for name in ("gated_backward", "gated_update_backward"):  # by PyTorch's ops; by kernels
        monkeypatch.setattr(eager_mlp, name, recorded(getattr(eager_mlp, name)))
    return found


# Recognition


def transformers_mlp(cls: Any = LlamaMLP, act: str = "silu", bias: bool = False, K: int = K) -> Any:
    config = {"hidden_size": K, "intermediate_size": H, "hidden_act": act, "mlp_bias": bias}
    return cls(SimpleNamespace(**config))


def glu(result: Callable[[Any, Tensor], Tensor], names: str = "w1 w3 w2", **children: Any) -> Any:
    """A module with three linear layers g, u and d of these names, whose forward is `result`."""
    module = type("GLU", (nn.Module,), {"forward": result, "__module__": __name__})()
    module.__class__.__qualname__, result.__qualname__ = "GLU", "GLU.forward"
    for name, (inner, outer) in zip(names.split(), ((K, H), (K, H), (H, K)), strict=True):
        module.add_module(name, nn.Linear(inner, outer))
    for name, child in children.items():
        setattr(module, name, child)
    return module


def glu_of(m: Any, x: Tensor) -> Any:
    return m.w2(F.silu(m.w1(x)) * m.w3(x))


def with_act(act: Any) -> Any:
    return glu(lambda m, x: m.w2(m.act(m.w1(x)) * m.w3(x)), act=act)


def top_k(h: Tensor) -> Tensor:
    return h * (h >= h.topk(9)[0][..., -1:])


def conv1d_glu() -> Any:
    sizes = {"w1": Conv1D(H, K), "w3": Conv1D(H, K), "w2": Conv1D(K, H)}
    return glu(lambda m, x: glu_of(m, x), **sizes)


class GLU(nn.Module):
    """A class that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.w1 = nn.Linear(K, H, bias=False), nn.Linear(K, H, bias=False)
        self.w2 = nn.Linear(H, K, bias=False)
        self.register_parameter("bias", None)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.w3(x) * F.silu(self.w1(x)))
        return y


class Swish(nn.Module):
    """SiLU at its start. beta is a parameter or a buffer."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.beta = kind(torch.ones((), dtype=f64))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.beta * x) / self.beta  # SiLU's bits


class DropsInTraining(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.5, self.training)


RECOGNIZED: dict[str, tuple[Callable[[], Any], str]] = {
    "Llama": (transformers_mlp, "silu"),
    "Llama with biases": (partial(transformers_mlp, bias=True), "silu"),
    "Gemma": (partial(transformers_mlp, GemmaMLP, "gelu_pytorch_tanh"), "gelu_tanh"),
    "GELU": (partial(transformers_mlp, act="gelu"), "gelu"),
    "function": (lambda: glu(lambda m, x: glu_of(m, x)), "silu"),
    "up before gate": (GLU, "silu"),
    "short names": (
        lambda: glu(lambda m, x: m.down(F.gelu(m.gate(x)) * m.up(x)), "gate up down"),
        "gelu",
    ),
    "child": (lambda: with_act(nn.GELU("tanh")), "gelu_tanh"),
    "nothing": (lambda: glu(lambda m, x: glu_of(m, x), other=None, scale=1.0), "silu"),
}


@pytest.mark.parametrize("name", RECOGNIZED)
def test_gated_mlp_is_recognized_and_has_pefts_gradients(name: str, runs: Any) -> None:
    make, activation = RECOGNIZED[name]
    stock = adapted(make())
    state = torch.random.get_rng_state()
    fused = fuse(copy.deepcopy(stock))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert parent_of(fused)._parts.activation == activation
    assert_close(fused, stock, input_of())
    assert runs == [True]


# Forwards of w1, w3 and w2 whose result is another one.
OTHERS: dict[str, Callable[..., Any]] = {
    "clamp": lambda m, x: m.w2((F.silu(m.w1(x)) * m.w3(x)).clamp(max=50)),
    "clamp of gate": lambda m, x: m.w2(F.silu(m.w1(x).clamp(max=7)) * m.w3(x)),
    "scale": lambda m, x: 0.5 * glu_of(m, x),
    "residual": lambda m, x: x + glu_of(m, x),
    "norm": lambda m, x: glu_of(m, F.normalize(x)),
    "norm of h": lambda m, x: m.w2(F.normalize(F.silu(m.w1(x)) * m.w3(x))),
    "top-k": lambda m, x: m.w2(top_k(F.silu(m.w1(x))) * m.w3(x)),
    "rounded": lambda m, x: m.w2(F.silu(m.w1(x).float()).to(x.dtype) * m.w3(x)),
    "dropout": lambda m, x: F.dropout(glu_of(m, x), 0.5, m.training),
    "two arguments": lambda m, x, y: glu_of(m, x),
    "exchanged": lambda m, x: m.w2(F.silu(m.w3(x)) * m.w1(x)),
    "no activation": lambda m, x: m.w2(m.w1(x) * m.w3(x)),
}
ACTS = {
    **{name: ACT2FN[name] for name in ("relu", "quick_gelu", "tanh")},
    "act that drops": DropsInTraining(),
    "act of several": nn.Sequential(nn.SiLU(), nn.Dropout(0.5)),
}
NO_RESULT = "its forward does not return down(act(gate(x)) * up(x)) of SiLU or GELU"
OWN, OF_ACT = "it has parameters or buffers of its own", "its act has parameters or buffers"
NAMED = "its linear layers are a, b, c, not gate_proj, up_proj, down_proj, or gate, up, down, or "
NAMED += "w1, w3, w2"
MORE = "it has modules beside its projections and one activation: a, b"
PLAIN: Callable[..., Any] = lambda m, x: glu_of(m, x)  # noqa: E731
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    **{name: (partial(glu, forward), NO_RESULT) for name, forward in OTHERS.items()},
    **{name: (partial(with_act, act), NO_RESULT) for name, act in ACTS.items()},
    "act with a parameter": (lambda: with_act(Swish(nn.Parameter)), OF_ACT),
    "act with a buffer": (lambda: with_act(Swish(nn.Buffer)), OF_ACT),
    "act with a buffer within": (lambda: with_act(nn.Sequential(Swish(nn.Buffer))), OF_ACT),
    "dropout child": (
        lambda: glu(lambda m, x: m.drop(glu_of(m, x)), drop=nn.Dropout(0.1)),
        NO_RESULT,
    ),
    "two children": (lambda: glu(PLAIN, a=nn.SiLU(), b=nn.Identity()), MORE),
    "parameter": (lambda: glu(PLAIN, scale=nn.Parameter(torch.ones(()))), OWN),
    "buffer": (lambda: glu(PLAIN, scale=nn.Buffer(torch.ones(()))), OWN),
    "own names": (lambda: glu(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x)), "a b c"), NAMED),
    "not fused": (lambda: glu(PLAIN), "w3 is no fused LoRA layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_module_that_is_no_gated_mlp_stays_with_the_reason(name: str, runs: Any) -> None:
    make, reason = REFUSED[name]
    targets = ["w1", "w2"] if name == "not fused" else "all-linear"
    model = adapted(make(), target_modules=targets).eval()
    cls = type(parent_of(model))
    fuse(model)
    assert type(parent_of(model)) is cls
    assert mlp.recognize(parent_of(model)) == reason
    assert [row.reason for row in mlp_rows(model)] == [reason]


def test_replaced_forward_is_no_gated_mlp(monkeypatch: Any) -> None:
    """Before `fuse`, and after it."""
    model, own = adapted(GLU()), GLU.forward
    fused = fuse(copy.deepcopy(model))
    monkeypatch.setattr(GLU, "forward", lambda self, x: 2 * own(self, x))
    for each in (fuse(model), fused):
        assert [row.reason for row in mlp_rows(each)] == ["GLU.forward was replaced"]
    assert type(parent_of(model)) is GLU
    assert_close(fused, model, input_of())


def test_replaced_forward_needs_none_of_the_parts(monkeypatch: Any) -> None:
    """A library may give a class another forward, and its modules other layers."""
    fused = fuse(adapted(GLU()))
    gated = parent_of(fused)
    del gated.w1
    monkeypatch.setattr(GLU, "forward", lambda self, x: 2 * x)
    x = input_of()
    assert torch.equal(fused(x), 2 * x)


def test_forward_of_an_instance_is_no_gated_mlp(runs: Any) -> None:
    """Before `fuse`, and after it."""
    model = adapted(transformers_mlp())
    fused = fuse(copy.deepcopy(model))
    for each, when in ((model, ""), (fused, " after fuse(model): call it again")):
        parent = parent_of(each)
        parent.forward = types.MethodType(lambda m, x: 2 * LlamaMLP.forward(m, x), parent)
        assert [row.reason for row in mlp_rows(fuse(model) if each is model else each)] == [
            f"its forward was replaced{when}"
        ]
    assert type(parent_of(model)) is LlamaMLP
    assert_close(fused, model, input_of())
    assert not runs


# Liger's Triton kernels do not run here: the models beside have transformers' or PyTorch's ops.

LIGER = {
    "swiglu LigerSwiGLUMLP": (LlamaMLP, "silu", "silu"),
    "swiglu LigerQwen3MoeSwiGLUMLP": (LlamaMLP, "silu", "silu"),
    "geglu LigerGEGLUMLP": (GemmaMLP, "gelu_pytorch_tanh", "gelu_tanh"),
}


def liger_mlp(name: str) -> Any:
    file, cls = name.split()
    module = pytest.importorskip(f"liger_kernel.transformers.{file}", exc_type=ImportError)
    return getattr(module, cls)


def patch(model: Any, cls: Any) -> None:
    """As `use_liger_kernel=True` does with a model that is there."""
    monkey_patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    monkey_patch._patch_swiglu_module(parent_of(model), cls)


@pytest.mark.parametrize("on_class", [True, False])
@pytest.mark.parametrize("name", LIGER)
def test_mlp_of_liger_is_a_block_with_pefts_gradients(name: str, on_class: bool, runs: Any) -> None:
    cls, act, activation = LIGER[name]
    liger = liger_mlp(name)
    stock = adapted(transformers_mlp(cls, act)).double()
    fused = copy.deepcopy(stock)
    if on_class:
        parent_of(fused).__class__ = liger
    else:
        patch(fused, liger)
    fuse(fused)
    assert parent_of(fused)._parts.activation == activation
    assert not mlp_rows(fused)  # none is left layer by layer
    for each in (fused, copy.deepcopy(fused)):  # Liger's patch of an instance cannot be pickled
        assert_close(each, stock, input_of())
    assert len(runs) == 2


@pytest.mark.parametrize("on_class", [True, False])
def test_mlp_of_liger_whose_forward_was_replaced_keeps_it(
    on_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's class has another forward, which a block would leave out."""
    liger = liger_mlp("swiglu LigerSwiGLUMLP")
    monkeypatch.setattr(liger, "forward", lambda m, x: m.down_proj(m.up_proj(x)))
    model = adapted(transformers_mlp())
    if on_class:
        parent_of(model).__class__ = liger
    else:
        patch(model, liger)
    (row,) = mlp_rows(fuse(model))
    assert row.reason.endswith("forward was replaced")
    parent, x = parent_of(model), input_of()
    assert torch.equal(model(x), parent.down_proj(parent.up_proj(x)))


def test_unfuse_gives_liger_its_forward_back() -> None:
    liger = liger_mlp("swiglu LigerSwiGLUMLP")
    model = adapted(transformers_mlp())
    patch(model, liger)
    before = dict(vars(parent_of(model)))
    fuse(fuse(model))
    assert isinstance(parent_of(model), GatedMLP) and "forward" not in vars(parent_of(model))
    unfuse(model)
    assert type(parent_of(model)) is LlamaMLP and vars(parent_of(model)) == before


def test_call_that_no_block_takes_runs_ligers_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    liger = liger_mlp("swiglu LigerSwiGLUMLP")
    model = adapted(transformers_mlp())
    patch(model, liger)
    fuse(model)
    parent, x = parent_of(model), input_of()
    monkeypatch.setattr(parent, "_liger_forward", lambda m, x: m.down_proj(m.up_proj(x)))
    with on_cpu():
        assert torch.equal(model(x), parent.down_proj(parent.up_proj(x)))


def test_liger_that_patches_a_fused_model_is_said() -> None:
    liger = liger_mlp("swiglu LigerSwiGLUMLP")
    model = fuse(adapted(transformers_mlp()))
    patch(model, liger)
    (row,) = mlp_rows(model)
    assert row.reason == "its forward was replaced after fuse(model): call it again"
    assert not mlp_rows(fuse(model))


def test_recognition_reads_no_weight_and_changes_nothing() -> None:
    """The weights are on meta, as if offloaded, and so are new tensors."""
    module = parent_of(fuse(adapted(transformers_mlp()), blocks=False)).to("meta")
    before = {name: id(each) for name, each in vars(module).items()}
    with torch.device("meta"), torch.autocast("cpu", bf16):
        assert isinstance(mlp.recognize(module), mlp.Parts)
    assert {name: id(each) for name, each in vars(module).items()} == before


# Models


def adapted(
    module: Any, dtype: Any = f64, adapter: Any = None, nf4: Any = False, **more: Any
) -> Any:
    """A PEFT model of one module, its adapters as if trained."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    module = module.to(dtype)
    for name in ("gate_proj", "up_proj", "down_proj") if nf4 else ():
        pytest.importorskip("bitsandbytes")
        base = baselines.linear_4bit(getattr(module, name), "nf4")
        base.compute_dtype, base.compute_type_is_set = dtype, True
        setattr(module, name, base)
    settings = {"r": R, "lora_alpha": 7, "target_modules": "all-linear"} | more
    model = get_peft_model(nn.Sequential(module), LoraConfig(**settings))
    randomize(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter or dtype)
    return model.train()


def pair(*args: Any, **more: Any) -> tuple[Any, Any]:
    stock = adapted(transformers_mlp(), *args, **more)
    fused = fuse(copy.deepcopy(stock))
    assert isinstance(parent_of(fused), GatedMLP), explain(fused)
    return stock, fused


def input_of(dtype: torch.dtype = f64, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape or (2, 40), K, generator=generator, dtype=f64).to(dtype)


def assert_close(fused: Any, stock: Any, x: Tensor, call: Any = None) -> None:
    """The fused model's step in float64 is PEFT's to rounding."""
    x = x.detach().requires_grad_()
    assert_close_derived(step(fused, x, call), step(stock, x, call), 1e-12)


def mlp_rows(model: Any) -> list[Any]:
    return [row for row in explain(model).blocks if "layer by layer" in row.strategy]


# States in which it runs as a block

TRAINED = {
    "down": lambda model: [freeze(name)(model) for name in ("gate_proj", "up_proj")],
    "gate": lambda model: [freeze(name)(model) for name in ("down_proj", "up_proj")],
    "up": lambda model: [freeze(name)(model) for name in ("down_proj", "gate_proj")],
    "B of down": lambda m: [freeze(n)(m) for n in ("gate_proj", "up_proj", "lora_A")],
    "gate and up": freeze("down_proj"),
}
STATES = test_groups.STATES + [(of, change) for of in FEW for change in TRAINED]


@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize(("of", "change"), STATES)
def test_block_in_any_state_has_pefts_gradients(of, change, needs_x, runs) -> None:
    dtype, adapter, autocast, nf4, cast, x_dtype = DTYPES[of]
    config, apply = CHANGES.get(change, (dict, TRAINED.get(change)))
    if change == "ranks":
        config = lambda: {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"gate_proj": 4}}  # noqa: E731
    stock = adapted(transformers_mlp(bias=True), dtype, adapter, nf4, **config())
    if apply is not None:
        apply(stock)
    fused = fuse(copy.deepcopy(stock), cast_adapters=cast)

    call = caller(autocast)
    x = input_of(x_dtype or dtype).requires_grad_(needs_x and "no dx" not in change)
    got, want = step(fused, x, call), step(stock, x, call)
    # dA of down reads h, and dB does not; neither reads dg.
    assert runs == [True] * ("x" in got or (len(got) > 1 and "down" not in change))
    if dtype is f64:
        assert_close_derived(got, want, 1e-12)
    else:
        exact = x.detach().double().requires_grad_(x.requires_grad)
        assert_as_exact(got, step(in_float64(stock), exact, call), want)
    if autocast or nf4:
        with torch.no_grad():
            assert call(parent_of(fused), x).dtype is call(parent_of(stock), x).dtype


@pytest.mark.parametrize("shape", [(1,), (7,), (0,), (2, 0), (2, 3, 4), ()], ids=str)
def test_block_takes_any_rows(shape: Any, runs: Any) -> None:
    stock, fused = pair()
    x = torch.ones(K, dtype=f64) if not shape else input_of(f64, *shape)
    assert_close(fused, stock, x)
    assert runs == [True]


def test_block_over_4_bits_with_a_dense_part_returns_pefts_dtype(runs: Any) -> None:
    """Under autocast h has autocast's dtype, and x has not: bitsandbytes returns h's."""
    pytest.importorskip("bitsandbytes")
    for name in ("down_proj", "gate_proj"):
        module = transformers_mlp()
        setattr(module, name, baselines.linear_4bit(getattr(module, name), "nf4"))
        stock = get_peft_model(nn.Sequential(module), LoraConfig(target_modules="all-linear"))
        fused = fuse(copy.deepcopy(stock))
        with torch.autocast("cpu", bf16):
            got, want = (each(input_of(f32).requires_grad_()) for each in (fused, stock))
        assert got.dtype is want.dtype is bf16
        got.sum().backward()
    assert runs == [True, True]


# States in which it runs its own forward


def set_act(m: Any) -> None:
    m.act_fn = ACT2FN["relu"]


HOOKED = "a hook sits on it"
UNTAKEN = "up_proj: adapter 'default' {}, which a block does not take"
OFF = "{}_proj: adapters are {}: the base layer's own forward"
TRAINS = "down_proj: the base weight is trainable"
DOUBLE = {"result": lambda m, x, y: 2 * y}
APART: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pre-hook of gate": (hook("forward_pre", "gate_proj"), f"gate_proj: {HOOKED}"),
    "hook of down": (hook("forward", "down_proj", **DOUBLE), f"down_proj: {HOOKED}"),
    "hook of up's gradient": (hook("full_backward", "up_proj"), f"up_proj: {HOOKED}"),
    "hook of up's base": (
        hook("forward", "up_proj.base_layer", **DOUBLE),
        UNTAKEN.format("has a base that is called as a module (a hook sits on its nn.Linear)"),
    ),
    "hook of act": (hook("forward", "act_fn", **DOUBLE), f"act_fn: {HOOKED}"),
    "act": (set_act, "its act_fn was replaced"),
    "act's forward": (
        lambda m: setattr(m.act_fn, "forward", torch.tanh),
        "act_fn: its forward was replaced",
    ),
    "gate's forward": (
        lambda m: setattr(m.gate_proj, "forward", m.gate_proj.base_layer.forward),
        "gate_proj: its forward was replaced",
    ),
    "two adapters": (
        lambda m: m.up_proj.set_adapter(["default", "second"]),
        UNTAKEN.format("stands beside other active adapters"),
    ),
    "disabled": (lambda m: m.up_proj.enable_adapters(False), OFF.format("up", "disabled")),
    "merged": (lambda m: m.down_proj.merge(), OFF.format("down", "merged")),
    "trained base": (lambda m: m.down_proj.base_layer.weight.requires_grad_(), TRAINS),
    "dropout": (
        lambda m: m.up_proj.lora_dropout.update({"default": nn.Dropout(1.0)}),
        UNTAKEN.format("has an active dropout"),
    ),
    "unfused": (lambda m: unfuse(m.up_proj), "up_proj: it is a Linear"),
}


@pytest.mark.parametrize("name", APART)
def test_state_in_which_the_own_forward_runs_has_pefts_gradients(name: str, runs: Any) -> None:
    change, reason = APART[name]
    stock, _ = pair()
    add_adapter(stock)
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        change(parent_of(model))
    assert [row.reason for row in mlp_rows(fused)] == [reason]
    assert_close(fused, stock, input_of())
    assert not runs


def seen_by_all(m: Any, x: Tensor) -> Any:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: 2 * y if y.shape[-1] == H and hasattr(module, "lora_A") else None
    )
    try:
        return m(x)
    finally:
        handle.remove()


CALLS: dict[str, Any] = {
    "by name": lambda m, x: m(x=x),
    "global hook": seen_by_all,
    "inference mode": inference,
    "backend": while_forced,
    "checkpointed selectively": selectively,
    "vmap": lambda m, x: vmap(m)(x),
    "compiled": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(x),
    "subclass": lambda m, x: m(x.as_subclass(type("Marked", (Tensor,), {}))).as_subclass(Tensor),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_that_takes_the_own_forward_has_pefts_gradients(name: str, runs: Any) -> None:
    stock, fused = pair()
    assert_close(fused, stock, input_of(), CALLS[name])
    assert not runs


def test_tangent_takes_the_own_forward() -> None:
    x = input_of()
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(m(forward_ad.make_dual(x, x))).tangent for m in pair()]
    assert_close_derived(found[1], found[0], 1e-12)


@pytest.mark.parametrize("args", [(), (1, 1)], ids=str)
def test_call_that_the_own_forward_refuses_is_refused_in_its_words(args: Any) -> None:
    found = []
    for model in pair():
        with pytest.raises(TypeError) as refused:
            parent_of(model)(*args)
        found.append(str(refused.value))
    assert found[0] == found[1]


def test_x_that_does_not_fit_is_refused_and_the_next_call_runs(runs: Any) -> None:
    stock, fused = pair()
    with pytest.raises(ValueError, match="x: got shape"):
        fused(torch.ones(2, K + 1, dtype=f64))
    assert_close(fused, stock, input_of())
    assert runs == [True]


def test_zero3_and_blocks_false_leave_the_class() -> None:
    model = fuse(adapted(transformers_mlp()), blocks=False)
    assert type(parent_of(model)) is LlamaMLP
    assert [row.reason for row in mlp_rows(model)] == ["not fused: call fuse(model, blocks=True)"]
    zero3.gather_in_call([parent_of(model).up_proj])
    assert "gathers each of its layers" in mlp_rows(model)[0].reason


# Backwards


def test_second_backward_equals_the_first(runs: Any) -> None:
    """g and u are not overwritten by the first; and a part at a time equals all."""
    _, fused = pair()
    x = input_of().requires_grad_()
    wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
    y = fused(x)
    keep = partial(torch.autograd.grad, y.sum(), retain_graph=True)
    first, second = keep(wanted), keep(wanted)
    apart = [keep(each)[0] for each in wanted]
    assert not any(runs)
    for found in (second, apart, torch.autograd.grad(y.sum(), wanted)):
        assert_bitwise_equal([*found], [*first])
    assert runs[-1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_second_backward_through_a_checkpoint_equals_the_first(reentrant: bool) -> None:
    stock, fused = pair()
    call = partial(checkpoint, use_reentrant=reentrant)
    assert_close(fused, stock, input_of(), call)
    x = input_of().requires_grad_()
    assert_bitwise_equal(step(fused, x, call, times=2), step(fused, x, call))


def test_backward_that_is_differentiated_raises_the_remedy() -> None:
    _, fused = pair()
    x = input_of().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("change", ["plain", "trained bias", "lora_A frozen", "hot-swap"])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("of", ["float64", "bf16, float32 adapters", "float32"])
def test_gradients_of_several_dy_at_once_equal_those_of_each(of, act, change) -> None:
    """`is_grads_batched=True`, as in `torch.autograd.functional.jacobian(vectorize=True)`."""
    config, apply = CHANGES[change]
    model = adapted(transformers_mlp(act=act, bias=True), *DTYPES[of][:2], **config())
    if apply is not None:
        apply(model)
    x = input_of(DTYPES[of].dtype).requires_grad_()
    y = fuse(model)(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    dys = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    keep = partial(torch.autograd.grad, y, wanted, retain_graph=True)
    together = keep(dys, is_grads_batched=True)
    for i, dy in enumerate(dys):
        # dg, du and dx are rounded in either, to 2⁻⁹ in bfloat16.
        rtol = 2.0**-6 if y.dtype is bf16 else 1e-5 if y.dtype is f32 else 1e-12
        assert_close_derived([t[i] for t in together], [*keep(dy)], rtol)


@pytest.mark.parametrize("in_forward", [False, True])
def test_backward_under_autocast_equals_one_without(in_forward: bool) -> None:
    _, fused = pair(f32)
    found = []
    for in_backward in (False, True):
        x = input_of(f32).requires_grad_()
        with torch.autocast("cpu", bf16, enabled=in_forward):
            y = fused(x)
        with torch.autocast("cpu", bf16, enabled=in_backward):
            wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
            found.append(torch.autograd.grad(y, wanted, torch.ones_like(y)))
    assert_bitwise_equal([*found[1]], [*found[0]])


def test_block_saves_g_and_u_and_no_h() -> None:
    _, fused = pair()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(input_of().requires_grad_())
    assert len({t.data_ptr() for t in saved if t.shape[-1] == H and t.shape[0] == 80}) == 2


PROJECTIONS = "gate_proj", "up_proj", "down_proj"
OPERANDS = "base_layer", "lora_A.default", "lora_B.default"
WEIGHTS = [f"{projection}.{operand}" for projection in PROJECTIONS for operand in OPERANDS]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_write_to_an_operand_before_the_backward_changes_no_gradient(
    name: str, needs_x: bool, autocast: bool
) -> None:
    """The backward raises where PEFT's does. Else its gradients are those without the write."""

    def gradients(model: Any, writes: bool) -> list[Tensor] | None:
        x = input_of(f32).requires_grad_(needs_x)
        with torch.autocast("cpu", bf16, enabled=autocast):
            y = model(x)
        wanted = [*([x] if needs_x else ()), *(p for p in model.parameters() if p.requires_grad)]
        if writes:
            with torch.no_grad():
                parent_of(model).get_submodule(name).weight.mul_(2.0)
        try:
            return list(torch.autograd.grad(y, wanted, torch.ones_like(y)))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None

    stock, fused = pair(f32)
    want, got = gradients(fused, False), gradients(fused, True)
    assert (got is None) == (gradients(stock, True) is None)
    if got is not None:
        assert_bitwise_equal(got, want)


def change_x(m: Any, x: Tensor) -> Tensor:
    h = x * 1.0
    y: Tensor = m(h)
    h.mul_(2.0)
    return y


def change_y(m: Any, x: Tensor) -> Tensor:
    """PEFT's result is no view, and a model's own code may change it."""
    y: Tensor = m(x)
    y += 1
    y[..., 3:7].mul_(2)
    return y


@pytest.mark.parametrize("call", [change_x, change_y])
def test_write_to_x_that_is_not_saved_and_to_y_changes_no_gradient(call: Any, runs: Any) -> None:
    _, fused = pair()
    freeze("lora_A")(fused)
    x = input_of().requires_grad_()
    got, want = step(fused, x, call), step(fused, x)
    if call is change_y:
        assert_bitwise_equal(got["y"], change_y(lambda x: x, want["y"].clone()))
    else:
        assert_bitwise_equal(got, want)
    assert runs == [True, True]


def test_write_to_x_that_is_saved_raises() -> None:
    _, fused = pair()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(fused, input_of().requires_grad_(), change_x)


# The life of a model


def test_unfuse_and_merge_and_unload_restore_the_class() -> None:
    model = adapted(transformers_mlp())
    before = dict(vars(parent_of(model)))
    fuse(fuse(model))
    assert type(parent_of(model)).__name__ == "FusedLlamaMLP"
    unfuse(model)
    assert type(parent_of(model)) is LlamaMLP and vars(parent_of(model)) == before
    stock, fused = pair()
    got, want = fused.merge_and_unload()[0], stock.merge_and_unload()[0]
    assert type(got) is LlamaMLP and vars(got).keys() == vars(want).keys()
    assert_close_derived(got(input_of()), want(input_of()), 1e-12)


@pytest.mark.parametrize("make", [transformers_mlp, GLU])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, saved_and_loaded])
def test_copies_are_blocks_with_weights_of_their_own(copy_of: Any, make: Any, runs: Any) -> None:
    stock = adapted(make())
    fused = fuse(copy.deepcopy(stock))
    found = copy_of(fused)
    for p in fused.parameters():
        p.data.zero_()
    assert_close(found, stock, input_of())
    assert_close(fuse(copy_of(unfuse(found))), stock, input_of())
    assert runs == [True, True]


@pytest.mark.parametrize("name", test_groups.LIVES)
def test_model_that_changes_between_forwards_has_pefts_gradients(name: str) -> None:
    stock = adapted(transformers_mlp())
    add_adapter(stock, r=3)
    fused = fuse(copy.deepcopy(stock))
    for _ in range(2):
        assert_close(fused, stock, input_of())
        for model in (stock, fused):
            test_groups.LIVES[name](model)
    assert_close(fused, stock, input_of())


def test_call_after_one_that_names_its_adapters_runs_as_a_block(runs: Any) -> None:
    stock = adapted(transformers_mlp())
    add_adapter(stock)
    fused = activate(fuse(copy.deepcopy(stock)).eval(), "default")
    with torch.no_grad():
        fused(input_of(), adapter_names=["default", "second"])
    for _ in range(2):  # the first resets what the layers say of their last call
        assert_close(fused.train(), stock, input_of())
    assert runs == [True]


def test_conv1d_as_projections_has_pefts_gradients() -> None:
    stock = adapted(conv1d_glu(), fan_in_fan_out=True)
    fused = fuse(copy.deepcopy(stock))
    assert "stored as [K, N]" in mlp_rows(fused)[0].reason
    assert_close(fused, stock, input_of())


def test_block_on_a_cpu_runs_its_own_forward(runs: Any) -> None:
    model = adapted(transformers_mlp(), f32)
    x = input_of(f32).requires_grad_()
    with on_cpu():
        apart = fuse(copy.deepcopy(model), blocks=False)
        assert_bitwise_equal(step(fuse(model), x), step(apart, x))
    assert not runs


def test_block_on_meta_has_shapes() -> None:
    fused = fuse(adapted(transformers_mlp())).to(bf16).to("meta")
    x = torch.empty(80, K, dtype=bf16, device="meta", requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
