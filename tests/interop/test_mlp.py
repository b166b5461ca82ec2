"""Gated MLPs as one block on the path that a GPU takes, on CPU tensors, beside PEFT's own."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.bench import baselines, counter
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Choice, Strategy
from lora_kernels.ops.gated_mlp import GatedMLPFunction, Hidden, gated_mlp
from lora_kernels.oracle import tolerance
from lora_kernels.peft import explain, fuse, mlp, unfuse, zero3
from lora_kernels.peft.explain_rows import APART, SHARED, Row
from lora_kernels.peft.mlp import GatedMLP
from lora_kernels.peft.report import Explanation
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import in_float64, randomize, skip_without_kasa

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, H, R, ALPHA = 24, 40, 5, 7
pytestmark = pytest.mark.usefixtures("gpu_path")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by whether dg overwrites g, at each backward of a block."""
    found: list[bool] = []
    backward = eager_mlp.gated_backward

    def record(g: Tensor, u: Tensor, dh: Tensor, in_place: bool, activation: str) -> Any:
        found.append(in_place)
        return backward(g, u, dh, in_place, activation)

    monkeypatch.setattr(eager_mlp, "gated_backward", record)
    return found


def apart(reason: str) -> Row:
    """Return the row of a module that runs layer by layer."""
    return Row("base_model.model.0", "PyTorch's", "torch", "layer by layer", reason)


def mlp_rows(explanation: Explanation) -> list[Row]:
    """Return explain's rows of MLPs, without those of layers that share x."""
    return [row for row in explanation.blocks if row.state not in (SHARED, APART)]


class GLU(nn.Module):
    """LlamaMLP with an activation that is a function, and other names."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.w3, self.w1 = nn.Linear(K, H, bias=bias), nn.Linear(K, H, bias=bias)
        self.w2 = nn.Linear(H, K, bias=bias)
        self.function = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * self.function(self.w1(x)))


def llama_mlp(act: str = "silu", bias: bool = False, sizes: tuple[int, int] = (K, H)) -> LlamaMLP:
    width, hidden = sizes
    config = {"hidden_size": width, "intermediate_size": hidden}
    return LlamaMLP(SimpleNamespace(**config, mlp_bias=bias, hidden_act=act))


def adapted(module: nn.Module, dtype: torch.dtype = f64, **config: Any) -> Any:
    """A PEFT model of one module, its adapters as if trained."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear"} | config
    model = get_peft_model(nn.Sequential(module).to(dtype), LoraConfig(**settings))
    randomize(model)
    return model.to(dtype)


def block_of(model: Any) -> Any:
    return model.base_model.model[0]


def pair(model: Any) -> tuple[Any, Any]:
    fused = fuse(copy.deepcopy(model))
    assert isinstance(block_of(fused), GatedMLP), explain(fused)
    return model, fused


def input_of(dtype: torch.dtype = f64, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape or (3, 4), K, generator=generator, dtype=f64).to(dtype)


def step(model: Any, x: Tensor, call: Any = None, needs_x: bool = True) -> dict[str, Tensor]:
    """y, dx and all gradients."""
    x = x.clone().requires_grad_(needs_x)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x) if call is None else call(model, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=f64).to(y.dtype)
    wanted = [*([x] if needs_x else []), *named.values()]
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True)
    names = [*(["x"] if needs_x else []), *named]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], within: float) -> None:
    """The rms error of each tensor, relative to its own rms."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].dtype is exact.dtype and got[name].shape == exact.shape, name
        exact = exact.double()
        error = (got[name].double() - exact).norm()
        assert error <= within * exact.norm(), (name, float(error / exact.norm()))


def assert_pefts(fused: Any, stock: Any, x: Tensor, call: Any = None, needs_x: bool = True) -> None:
    """The fused model's step is PEFT's to rounding; in float64, sums of at most 60 terms."""
    got, want = step(fused, x, call, needs_x), step(stock, x, call, needs_x)
    if x.dtype is f64:
        assert_close(got, want, 1e-12)
    else:
        assert_as_exact(got, step(in_float64(stock), x.double(), call, needs_x), want)


def conv1d_glu() -> nn.Module:
    """The projections are transformers' Conv1D, GPT-2's linear layer."""
    module = GLU()
    module.w3, module.w1, module.w2 = Conv1D(H, K), Conv1D(H, K), Conv1D(K, H)
    return module


def glu_with_more() -> nn.Module:
    """Attributes that are no part of the computation, as modules with options have them."""
    module = GLU()
    module.register_parameter("bias", None)
    module.register_buffer("scale", None)
    module._helper = print
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "silu": llama_mlp,
    "gelu by erf": functools.partial(llama_mlp, "gelu"),
    "gelu by tanh": functools.partial(llama_mlp, "gelu_pytorch_tanh"),
    "biases": functools.partial(llama_mlp, bias=True),
    "a function": GLU,
    "a function, biases": functools.partial(GLU, functools.partial(F.gelu), True),
    "Conv1D": conv1d_glu,
    "other attributes": glu_with_more,
}


@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_block_has_pefts_outputs_and_gradients(kind, dtype, needs_x, runs) -> None:
    stock, fused = pair(adapted(MODULES[kind](), dtype))
    assert_pefts(fused, stock, input_of(dtype), None, needs_x)
    assert runs == [True]


@pytest.mark.parametrize("shape", [(1,), (7,), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_block_takes_any_rows(shape, runs) -> None:
    stock, fused = pair(adapted(llama_mlp()))
    got, want = step(fused, input_of(f64, *shape)), step(stock, input_of(f64, *shape))
    assert runs == [True] and got.keys() == want.keys()
    for name, exact in want.items():
        torch.testing.assert_close(got[name], exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("target", ["gate_proj", "up_proj", "down_proj"])
def test_block_with_few_adapters_has_pefts_gradients(target, bias, runs) -> None:
    """The down-projection always has one: else there is no block."""
    module = llama_mlp(bias=bias)
    targets = list({target, "down_proj"})
    stock, fused = pair(adapted(module, target_modules=targets, lora_bias=bias))
    for needs_x in (True, False):
        got = step(fused, input_of(), None, needs_x)
        assert_close(got, step(stock, input_of(), None, needs_x), 1e-12)
    assert len(runs) == 1 + (target != "down_proj")


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "gate_proj", "up_proj", "down_proj"])
def test_block_with_frozen_factors_has_pefts_gradients(frozen) -> None:
    model = adapted(llama_mlp())
    for name, p in model.named_parameters():
        if frozen in name:
            p.requires_grad_(False)
    stock, fused = pair(model)
    for needs_x in (True, False):
        got = step(fused, input_of(), None, needs_x)
        assert_close(got, step(stock, input_of(), None, needs_x), 1e-12)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_block_that_trains_one_factor_of_down_alone_has_pefts_gradients(trained) -> None:
    """Then no gradient of g and u is needed; dA reads h, and dB does not."""
    model = adapted(llama_mlp())
    for name, p in model.named_parameters():
        p.requires_grad_(f"down_proj.{trained}" in name)
    stock, fused = pair(model)
    got = step(fused, input_of(), None, False)
    assert len(got) == 2 and all(t.norm() > 0 for t in got.values())
    assert_close(got, step(stock, input_of(), None, False), 1e-12)


class OneColumn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :1]


class OneRow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((0, 1), keepdim=True)


@pytest.mark.parametrize("kind", [OneColumn, OneRow])
@pytest.mark.parametrize("narrow", ["w1", "w3"])
def test_gate_and_up_that_broadcast_have_pefts_gradients(narrow, kind, runs) -> None:
    module = GLU()
    setattr(module, narrow, kind(K, H, bias=False))
    stock, fused = pair(adapted(module, target_modules=["w2"]))
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    with torch.no_grad():
        assert_close({"y": fused(input_of())}, {"y": stock(input_of())}, 1e-12)
    assert not runs


def layer_by_layer(model: Any) -> Any:
    return fuse(copy.deepcopy(model), blocks=False)


@pytest.mark.parametrize("rows", [12, 128])  # for few, the adapter's GEMMs are float32
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
def test_block_under_autocast_rounds_as_its_layers(adapter, x_dtype, rows, runs) -> None:
    """Autocast reaches no GEMM inside of the block: P keeps its precision."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.shape == (rows, R):  # P of a layer
            saved.append(t.detach())
        return t

    model = adapted(llama_mlp(), f32)
    for name, p in model.named_parameters():
        p.data = p.data.to(adapter if "lora_" in name else x_dtype)

    def call(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16):
            y: Tensor = model(x)
            return y

    x = input_of(x_dtype, rows)
    exact = step(in_float64(model), x.double())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = step(fuse(copy.deepcopy(model)), x, call)
        want = step(layer_by_layer(model), x, call)
    assert runs == [True] and len(saved) == 6
    assert_as_exact(got, exact, want)
    if rows == 12:  # P of gate and up; rounded to bfloat16 it would differ by 2⁻⁹ or so
        assert_close_derived(saved[:2], saved[3:5], layers=1)


@pytest.mark.parametrize("compute_dtype", [f32, bf16], ids=str)
def test_block_over_4_bits_computes_in_the_base_s_dtype(compute_dtype, runs) -> None:
    """The dtype is the one that the user gave bitsandbytes, whatever x has."""
    pytest.importorskip("bitsandbytes")
    module = llama_mlp(sizes=(64, 128))
    for name, linear in list(module.named_children())[:3]:
        base = baselines.linear_4bit(linear, "nf4")
        base.compute_dtype, base.compute_type_is_set = compute_dtype, True
        setattr(module, name, base)
    model = get_peft_model(nn.Sequential(module), LoraConfig(r=R, target_modules="all-linear"))
    randomize(model)
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(3))
    exact = in_float64(model)(x.double())
    got = fuse(copy.deepcopy(model))(x.clone().requires_grad_())
    want = layer_by_layer(model)(x.clone().requires_grad_())
    assert_as_exact({"y": got}, {"y": exact}, {"y": want})
    is_rounded = tolerance.rms_error(got.double(), exact.detach()) > 2.0**-12
    assert is_rounded == (compute_dtype is bf16)
    got.sum().backward()
    assert runs == [True]


@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
def test_block_of_16_bits_is_as_close_as_pefts(adapter, cast, runs) -> None:
    """float32 adapters with autocast and without. 128 rows are many: adapters go in parts."""
    model = adapted(llama_mlp(), f32)
    exact = step(copy.deepcopy(model).double(), input_of(f64, 128))
    for name, p in model.named_parameters():
        p.data = p.data.to(adapter if "lora_" in name else bf16)
    stock, fused = pair(model)

    def run(model: Any) -> dict[str, Tensor]:
        context = torch.autocast("cpu", bf16) if cast else contextlib.nullcontext()

        def call(model: Any, x: Tensor) -> Tensor:
            with context:
                y: Tensor = model(x)
                return y

        return step(model, input_of(bf16, 128), call)

    got, want = run(fused), run(stock)
    assert runs == [True]
    assert_as_exact(got, exact, want)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_block_over_4_bits_has_pefts_gradients(dtype, runs) -> None:
    pytest.importorskip("bitsandbytes")
    module = llama_mlp(sizes=(K, 64))
    for name, linear in list(module.named_children())[:3]:
        setattr(module, name, baselines.linear_4bit(linear.to(dtype), "nf4"))
    model = get_peft_model(
        nn.Sequential(module), LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear")
    )
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            p.data = p.data.to(dtype)
    stock, fused = pair(model.train())
    assert_pefts(fused, stock, input_of(dtype))
    assert runs == [True]


def test_block_over_4_bits_under_autocast_returns_pefts_dtype(runs) -> None:
    pytest.importorskip("bitsandbytes")
    module = llama_mlp(sizes=(K, 64))
    for name, linear in list(module.named_children())[:3]:
        setattr(module, name, baselines.linear_4bit(linear, "nf4"))
    model = get_peft_model(nn.Sequential(module), LoraConfig(r=R, target_modules="all-linear"))
    stock, fused = pair(model.train())
    with torch.autocast("cpu", bf16):
        found = [each(input_of(f32).requires_grad_()) for each in (fused, stock)]
    assert found[0].dtype is found[1].dtype


# Second backwards and checkpoints


def test_second_backward_equals_the_first(runs) -> None:
    """h, dg and du are made of g and u, which the first has not overwritten."""
    _, fused = pair(adapted(llama_mlp()))
    x = input_of().requires_grad_()
    wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
    y = fused(x)
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    third = torch.autograd.grad(y.sum(), wanted)
    assert runs == [False, False, True]
    assert_bitwise_equal(second, first)
    assert_bitwise_equal(third, first)


def test_gradients_of_a_part_at_a_time_equal_all(runs) -> None:
    _, fused = pair(adapted(llama_mlp()))
    x = input_of().requires_grad_()
    wanted = [x, *(p for p in fused.parameters() if p.requires_grad)]
    y = fused(x)
    together = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    apart = [torch.autograd.grad(y.sum(), each, retain_graph=True)[0] for each in wanted]
    assert not any(runs)
    assert_bitwise_equal(apart, list(together))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointed_block_has_the_same_gradients(reentrant, runs) -> None:
    stock, fused = pair(adapted(llama_mlp()))

    def call(model: Any, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return y

    if reentrant:  # which does without autograd.grad
        x = input_of().requires_grad_()
        for model in (stock, fused):
            call(model, x).sum().backward()
        want = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
        got = {name: p.grad for name, p in fused.named_parameters() if p.requires_grad}
        assert_close(got, want, 1e-12)
    else:
        assert_close(step(fused, input_of(), call), step(stock, input_of(), call), 1e-12)
    assert runs == [True]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_second_backward_through_a_checkpoint_equals_the_first(reentrant) -> None:
    _, fused = pair(adapted(llama_mlp()))
    x = input_of().requires_grad_()
    y = checkpoint(fused, x, use_reentrant=reentrant).sum()
    found: list[list[Tensor]] = []
    for _ in range(2):
        fused.zero_grad()
        x.grad = None
        y.backward(retain_graph=True)
        found.append([x.grad, *(p.grad for p in fused.parameters() if p.requires_grad)])
    assert_bitwise_equal(found[1], found[0])


def test_block_in_a_second_backward_that_differentiates_it_raises() -> None:
    _, fused = pair(adapted(llama_mlp()))
    x = input_of().requires_grad_()
    (dx,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_saved_tensors_moved_by_hooks_give_the_same_gradients() -> None:
    stock, fused = pair(adapted(llama_mlp()))
    with torch.autograd.graph.save_on_cpu():
        got = step(fused, input_of())
    assert_close(got, step(stock, input_of()), 1e-12)


def test_block_in_two_modes_without_gradients_has_pefts_results() -> None:
    stock, fused = pair(adapted(llama_mlp()))
    x = input_of()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-12, atol=1e-12)


def test_block_keeps_no_tensor_of_h_beside_g_and_u() -> None:
    _, fused = pair(adapted(llama_mlp()))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(input_of().requires_grad_())
    hidden = {t.data_ptr() for t in kept if t.shape[-1] == H and t.dim() == 3}
    assert len(hidden) == 2


# In place


@pytest.mark.parametrize("named", ["gate_proj", "up_proj"])
def test_result_that_a_foreign_projection_holds_is_not_overwritten(named, runs) -> None:
    """A subclass of nn.Linear may save its result for the backward."""

    class Held(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.held = torch.tanh(super().forward(x))  # which tanh saves
            return self.held

    module = llama_mlp()
    setattr(module, named, Held(K, H, bias=False))
    targets = ["down_proj"]
    stock, fused = pair(adapted(module, target_modules=targets))
    got, want = step(fused, input_of()), step(stock, input_of())
    assert runs == [False]
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("named", ["gate_proj", "up_proj"])
def test_result_of_a_foreign_projection_may_have_any_strides(named, runs) -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x).transpose(0, 1).contiguous()
            return y.transpose(0, 1)

    module = llama_mlp()
    setattr(module, named, Transposed(K, H, bias=False))
    stock, fused = pair(adapted(module, target_modules=["down_proj"]))
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert runs == [False]


def test_result_that_is_part_of_another_tensor_is_not_overwritten(runs) -> None:
    g, u = torch.randn(2, 4, H, dtype=f64).requires_grad_().unbind()
    A, B, W = (torch.randn(s, dtype=f64) for s in ((R, H), (K, R), (K, H)))
    y = gated_mlp(Hidden(g, u, "silu", is_private=True), W, A, B)
    y.sum().backward()
    assert runs == [False]


# Modules that are not recognized


class WithClamp(GLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.function(self.w1(x)).clamp(max=50.0) * self.w3(x))


class WithResidual(GLU):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class InTraining(GLU):
    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.w1(x)) * self.w3(x)
        return self.w2(F.dropout(h, 0.5, self.training))


class Rounded(GLU):
    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.w1(x).float()).to(x.dtype)
        return self.w2(h * self.w3(x))


class WithScale(GLU):
    """The scale starts as 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class WithDropout(GLU):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class Swish(nn.Module):
    """SiLU at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Merged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(K, 2 * H), nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(g) * u)


class TwoArguments(GLU):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x)


NO_ACTIVATION = "its activation {} is not SiLU or GELU, by erf or by tanh"
NOT_THE_RESULT = "not a gated MLP: its result is not down(act(gate(x)) * up(x))"


class WithBuffer(GLU):
    """The scale starts as 1, and changes after the module was recognized."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=f64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "clamp": (WithClamp, NOT_THE_RESULT),
    "residual": (WithResidual, NOT_THE_RESULT),
    "dropout in training": (InTraining, NOT_THE_RESULT),
    "float32 between": (Rounded, NOT_THE_RESULT),
    "two arguments": (TwoArguments, NOT_THE_RESULT),
    "parameter": (WithScale, "not a gated MLP: it has parameters or buffers of its own"),
    "buffer": (WithBuffer, "not a gated MLP: it has parameters or buffers of its own"),
    "merged gate and up": (
        Merged,
        "gate and up are one linear layer, which is not covered in this version",
    ),
    "module": (
        WithDropout,
        "not a gated MLP: 3 linear layers and 2 other modules and functions, want 3 and an "
        "activation",
    ),
    "relu": (functools.partial(GLU, F.relu), NO_ACTIVATION.format("function")),
    "gelu by other ops": (functools.partial(llama_mlp, "gelu_new"), NO_ACTIVATION.format("act_fn")),
    "trained activation": (
        lambda: GLU(Swish()),
        "its activation function has parameters or buffers",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_module_that_is_no_gated_mlp_stays_with_the_reason(other) -> None:
    make, reason = OTHERS[other]
    model = adapted(make()).eval()
    cls = type(block_of(model))
    state = torch.random.get_rng_state()
    fuse(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(block_of(model)) is cls
    assert mlp_rows(explain(model)) == [apart(reason)]


def test_recognition_reads_no_weight_and_changes_nothing() -> None:
    """The weights are on meta, as if offloaded."""
    model = adapted(llama_mlp())
    module = fuse(model, blocks=False) and block_of(model).to("meta")
    before = {name: id(each) for name, each in vars(module).items()}
    parts = mlp.recognize(module)
    assert isinstance(parts, mlp.Parts)
    assert parts[:3] == ("gate_proj", "up_proj", "down_proj") and parts.activation == "silu"
    assert {name: id(each) for name, each in vars(module).items()} == before


def test_recognition_under_other_defaults_is_the_same() -> None:
    with torch.device("meta"), torch.autocast("cpu", bf16):
        assert isinstance(mlp.recognize(block_of(fuse(adapted(GLU()), blocks=False))), mlp.Parts)


# When the module runs its own forward


def hook(*args: Any) -> None: ...


def add_second(model: Any) -> None:
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    randomize(model, "second", 2)
    model.base_model.set_adapter(["default", "second"])


def replace_forward(model: Any) -> None:
    module = block_of(model)
    module.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, module)


def keep_result(name: str) -> Callable[[Any], None]:
    """Return a change after which a projection keeps its results, which no one may overwrite."""

    def change(model: Any) -> None:
        layer, kept = getattr(block_of(model), name), []
        forward = layer.forward
        layer.forward = lambda x: kept.append(forward(x)) or kept[-1]

    return change


def skip_adapter_of_down(model: Any) -> None:
    block_of(model).down_proj.forward = block_of(model).down_proj.base_layer.forward


def replace_activation(model: Any) -> None:
    block_of(model).act_fn = ACT2FN["relu"]


def replace_activations_forward(model: Any) -> None:
    block_of(model).act_fn.forward = torch.tanh


HOOKED = "a hook sits on it or on one of its parts"
OFF = "down_proj: adapters are {}: the base layer's own forward"
STATES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda m: block_of(m).register_forward_hook(hook), HOOKED),
    "pre-hook of gate": (
        lambda m: block_of(m).gate_proj.register_forward_pre_hook(hook),
        HOOKED,
    ),
    "hook of up": (
        lambda m: block_of(m).up_proj.base_layer.register_forward_hook(hook),
        HOOKED,
    ),
    "hook of down": (
        lambda m: block_of(m).down_proj.lora_A.default.register_full_backward_hook(hook),
        HOOKED,
    ),
    "hook of act": (
        lambda m: block_of(m).act_fn.register_forward_hook(lambda _, x, y: y * 2),
        HOOKED,
    ),
    "forward": (replace_forward, "its forward was replaced"),
    "gate's forward": (keep_result("gate_proj"), "gate_proj: its forward was replaced"),
    "up's forward": (keep_result("up_proj"), "up_proj: its forward was replaced"),
    "activation": (replace_activation, "its act_fn was replaced"),
    "activation's forward": (replace_activations_forward, "act_fn: its forward was replaced"),
    "two adapters": (add_second, "down_proj: several active adapters"),
    "disabled": (lambda m: m.disable_adapter_layers(), OFF.format("disabled")),
    "merged": (lambda m: m.merge_adapter(), OFF.format("merged")),
    "trainable base": (
        lambda m: block_of(m).down_proj.base_layer.requires_grad_(),
        "down_proj: the base weight is trainable",
    ),
    "down's forward": (
        skip_adapter_of_down,
        "down_proj: its forward was replaced",
    ),
    "hook of down's base": (
        lambda m: block_of(m).down_proj.base_layer.register_forward_hook(hook), HOOKED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_state_in_which_the_module_runs_its_own_forward(state, runs) -> None:
    change, reason = STATES[state]
    stock, fused = pair(adapted(llama_mlp()))
    change(stock)
    change(fused)
    assert mlp_rows(explain(fused)) == [apart(reason)]
    x = input_of()
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-12, atol=1e-12)
    assert not runs
    if any(p.requires_grad for p in fused.parameters()):
        assert_close(step(fused, x), step(stock, x), 1e-12)
    assert not runs


VARIANT = "adapter 'default' is a variant of LoRA"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, VARIANT),
        ({"lora_dropout": 0.5, "r": 2}, "adapter 'default' has dropout"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "a Linear is not a fused LoRA layer"),
        ({"kasa_config": True}, VARIANT),
        ({"hotswap": True}, "adapter 'default' is prepared for hot-swapping"),
        ({"alora_invocation_tokens": [1]}, VARIANT),
    ],
    ids=["DoRA", "dropout", "no adapter on down", "KaSA", "hot-swapping", "aLoRA"],
)
def test_down_projection_that_is_called_as_a_module(config, reason, runs) -> None:
    is_swapped = config.get("hotswap")
    if "kasa_config" in config:
        skip_without_kasa()
        config = {"kasa_config": peft.KasaConfig()}
    model = adapted(llama_mlp(), **({} if is_swapped else config)).train()
    if is_swapped:
        prepare_model_for_compiled_hotswap(model, target_rank=R)
    stock, fused = pair(model)
    assert mlp_rows(explain(fused)) == [apart(f"down_proj: {reason}")]
    torch.manual_seed(1)
    got = step(fused, input_of())
    torch.manual_seed(1)
    assert_close(got, step(stock, input_of()), 1e-12)
    assert not runs


@pytest.mark.parametrize("make", [llama_mlp, GLU])
def test_dropout_of_gate_and_up_has_pefts_masks(make, runs) -> None:
    """GLU calls up before gate."""
    stock, fused = pair(adapted(make()).train())
    for model in (stock, fused):
        for name in ("gate_proj", "up_proj") if make is llama_mlp else ("w1", "w3"):
            layer = block_of(model)._modules[name]
            layer.lora_dropout["default"] = nn.Dropout(0.5)
    with counter._NativeDropout():
        torch.manual_seed(1)
        want = step(stock, input_of())
        torch.manual_seed(1)
        got = step(fused, input_of())
    assert_close(got, want, 1e-12)
    assert runs == [True]


def test_dropout_of_down_counts_in_training_alone(runs) -> None:
    _, fused = pair(adapted(llama_mlp(), lora_dropout=0.5, r=2).eval())
    step(fused, input_of())
    assert runs == [True]


def test_hooks_of_all_modules_are_seen(runs) -> None:
    _, fused = pair(adapted(llama_mlp()))
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(y))
    try:
        step(fused, input_of())
    finally:
        handle.remove()
    assert not runs and any(y.shape[-1] == H for y in seen)


def test_forward_of_the_class_replaced_later_is_called(monkeypatch) -> None:
    _, fused = pair(adapted(GLU()))
    monkeypatch.setattr(GLU, "forward", lambda self, x: 2 * x)
    assert torch.equal(fused(input_of()), 2 * input_of())
    assert mlp_rows(explain(fused)) == [apart("GLU.forward was replaced")]


def test_transforms_and_tracing_take_the_own_forward(runs) -> None:
    stock, fused = pair(adapted(llama_mlp()))
    x = input_of()
    torch.testing.assert_close(vmap(fused)(x), vmap(stock)(x), rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
            for model in (stock, fused)
        ]
    torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-12, atol=1e-12)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert_close(step(compiled, x), {f"_orig_mod.{n}" if "." in n else n: t for n, t in
                                     step(stock, x).items()}, 1e-12)  # fmt: skip
    assert not runs


def test_keyword_argument_takes_the_own_forward(runs) -> None:
    stock, fused = pair(adapted(llama_mlp()))
    x = input_of().requires_grad_()
    y = block_of(fused)(x=x)
    y.sum().backward()
    torch.testing.assert_close(y, block_of(stock)(x), rtol=1e-12, atol=1e-12)
    assert not runs


def test_another_backend_of_down_is_called(monkeypatch, runs) -> None:
    """Such as kernels that qualified on a card."""
    stock, fused = pair(adapted(llama_mlp(), f32))
    with lora_kernels.backend("cpu"):
        (row,) = mlp_rows(explain(fused))
        got = step(fused, input_of(f32))
    assert row.strategy == "layer by layer" and row.reason.startswith("down_proj: ")
    exact = step(in_float64(stock), input_of(f32).double())
    assert_as_exact(got, exact, step(stock, input_of(f32)))
    assert not runs


def test_exception_of_a_projection_is_raised_and_the_next_call_runs(runs) -> None:
    _, fused = pair(adapted(llama_mlp()))
    with pytest.raises((RuntimeError, ValueError)):
        fused(torch.randn(2, K + 1, dtype=f64))
    step(fused, input_of())
    assert runs == [True]


# The lifecycle


def test_cpu_runs_the_own_forward_bit_for_bit(monkeypatch) -> None:
    model = adapted(llama_mlp(), f32)
    with monkeypatch.context() as on_cpu:
        on_cpu.setattr("lora_kernels.backends.library.emulates_gpu", False)
        on_cpu.setattr(GatedMLPFunction, "apply", None)
        stock, fused = fuse(copy.deepcopy(model), blocks=False), fuse(model)
        assert_bitwise_equal(step(fused, input_of(f32)), step(stock, input_of(f32)))
        assert not mlp_rows(explain(fused))


def test_fuse_without_blocks_leaves_the_class() -> None:
    model = fuse(adapted(llama_mlp()), blocks=False)
    assert type(block_of(model)) is LlamaMLP
    assert mlp_rows(explain(model))[0].reason == "not fused: call fuse(model)"


def test_unfuse_restores_the_module() -> None:
    model = adapted(llama_mlp())
    before = dict(vars(block_of(model)))
    names = list(model.state_dict())
    fuse(fuse(model))
    assert type(block_of(model)).__name__ == "FusedLlamaMLP"
    assert isinstance(block_of(model), LlamaMLP) and list(model.state_dict()) == names
    unfuse(model)
    assert type(block_of(model)) is LlamaMLP and vars(block_of(model)) == before


def test_unloaded_model_has_the_own_class() -> None:
    stock, fused = pair(adapted(llama_mlp()))
    got, want = fused.merge_and_unload()[0], stock.merge_and_unload()[0]
    assert type(got) is LlamaMLP and vars(got).keys() == vars(want).keys()
    assert_close({"y": got(input_of())}, {"y": want(input_of())}, 1e-12)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_blocks_with_weights_of_their_own(copy_of, runs) -> None:
    _, fused = pair(adapted(llama_mlp()))
    want = step(fused, input_of())
    found = copy_of(fused)
    for p in fused.parameters():
        p.data.zero_()
    assert_bitwise_equal(step(found, input_of()), want)
    assert runs == [True, True]


def test_explain_says_what_a_block_is() -> None:
    _, fused = pair(adapted(llama_mlp()))
    explanation = explain(fused)
    (row,) = mlp_rows(explanation)
    assert row.layer == "base_model.model.0" and row.state == "ours, library GEMMs"
    assert "by PyTorch's ops: Triton's elementwise kernels do not take" in row.reason
    assert row.reason in str(explanation) and '"blocks"' in explanation.json()


# Counts


def count(model: Any, M: int, retain_graph: bool) -> counter.Traffic:
    """The traffic of a training step; y and dy are the caller's."""
    x = torch.empty(M, 4096, dtype=bf16, device="meta").requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = counter._Counter(None)
    y = found.run(lambda: model(x))
    forward, dy = found.traffic(), torch.empty_like(y)
    grads = found.run(lambda: torch.autograd.grad(y, wanted, dy, retain_graph=retain_graph))
    backward = found.traffic()
    del grads
    read, written, kernels = (a + b for a, b in zip(forward[:3], backward[:3], strict=True))
    return counter.Traffic(read, written, kernels, max(forward.peak, backward.peak))


# MB, kernels, and MB of the peak without retain_graph and with it. g, u and h are 234.9 MB each:
# what is read and written of them is 20 of the 33 times that a plain chain of kernels takes.
COUNTS = {"dense": (8480, 34, 800, 1250), "nf4": (9460, 54, 900, 1250)}


@pytest.mark.parametrize("base", COUNTS)
def test_block_moves_few_bytes(base) -> None:
    with torch.device("meta"):
        module = llama_mlp(sizes=(4096, 14336)).to(bf16)
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        for name, linear in list(module.named_children())[:3]:
            setattr(module, name, baselines.linear_4bit(linear, "nf4"))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(nn.Sequential(module), config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(bf16)
    fuse(model)
    megabytes, kernels, peak, peak_retained = COUNTS[base]
    count(model, 8, False)  # what is asked once a process
    for retain_graph, most in ((False, peak), (True, peak_retained)):
        found = count(model, 8192, retain_graph)
        assert found.bytes <= megabytes * 1e6 and found.kernels <= kernels, found
        assert found.peak <= most * 1e6, found


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", eager_mlp.ACTIVATIONS)
def test_backward_by_torch_overwrites_what_it_may(activation, in_place) -> None:
    """dh always, and g where the graph is not kept: at most two temporaries of h's size."""
    g, u, dh = (torch.randn(H, 300, dtype=f64) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (g, u)]
    h = eager_mlp.ACTIVATIONS[activation](leaves[0]) * leaves[1]
    want = [*torch.autograd.grad(h, leaves, dh), h.detach()]
    kept = u.clone()
    got = eager_mlp.gated_backward_by_torch(g, u, dh, in_place, activation)
    for found, exact in zip(got, want, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert (got.g is g) is in_place and got.u.data_ptr() == dh.data_ptr()
    assert torch.equal(u, kept)
    like = {"dtype": f64, "device": "meta"}
    meta = [torch.empty(1000, 1000, **like) for _ in range(3)]
    run = functools.partial(eager_mlp.gated_backward_by_torch, *meta, in_place, activation)
    assert counter.count(run).peak <= 2 * meta[0].nbytes


@pytest.mark.parametrize(
    "backward",
    [
        functools.partial(eager_mlp.gated_backward_by_torch, in_place=False),
        eager_mlp.split_gradient,
    ],
)
def test_backward_of_an_activation_without_a_gradient_raises(
    backward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was added to the forwards alone does not get GELU's."""
    monkeypatch.setitem(eager_mlp.ACTIVATIONS, "relu", torch.relu)
    with pytest.raises(KeyError, match="relu"):
        backward(*torch.randn(3, 4), activation="relu")


@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=str)
def test_result_of_a_block_can_be_changed_in_place(shape: tuple[int, ...], runs: Any) -> None:
    """PEFT's result is no view, and a model's own code may change it."""
    stock, fused = pair(adapted(llama_mlp()))

    def call(model: Any, x: Tensor) -> Tensor:
        y: Tensor = model(x)
        y += 1
        y[..., 3:7].mul_(2)
        return y

    got, want = (step(model, input_of(f64, *shape), call) for model in (fused, stock))
    assert_close(got, want, 1e-12)
    assert runs == [True]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gradients_of_several_dy_at_once_equal_pefts(activation: str) -> None:
    """`is_grads_batched=True`, as in `torch.autograd.functional.jacobian(vectorize=True)`."""
    stock, fused = pair(adapted(llama_mlp(activation)))
    found = []
    for model in (fused, stock):
        x = input_of().requires_grad_()
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        y = model(x)
        dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5), dtype=f64)
        found.append(torch.autograd.grad(y, leaves, dy, is_grads_batched=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Scaled(LlamaMLP):
    """Its forward reads attributes that change nothing at first."""

    factor, deleted = 1.0, 0.5  # the class's, which an instance may hide

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale, self._scale, self.deleted = 1.0, 1.0, 1.0
        scales = {"y": 1.0, "of each": torch.ones(K, dtype=f64), "all": [(1.0,), [1.0]]}
        self.scales, self.kinds = OrderedDict(scales), {1.0}
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * self.scale * self._scale * self.scales["y"]
        y = y * self.scales["all"][1][0] * self.config.weight * sum(self.kinds)
        return y * self.factor * self.deleted * self.scales["of each"].mean()


LATER: dict[str, Callable[[Any], Any]] = {
    "scale": lambda mlp: setattr(mlp, "scale", 0.5),
    "_scale": lambda mlp: setattr(mlp, "_scale", 0.5),
    "scales": lambda mlp: mlp.scales.update(y=0.5),
    "scales of each": lambda mlp: mlp.scales.update({"of each": torch.full((K,), 0.5, dtype=f64)}),
    "scales in a list": lambda mlp: mlp.scales["all"][1].__setitem__(0, 0.5),
    "kinds": lambda mlp: mlp.kinds.add(0.5),
    "config.weight": lambda mlp: setattr(mlp.config, "weight", 0.5),
    "factor": lambda mlp: setattr(mlp, "factor", 0.5),
    "deleted": lambda mlp: delattr(mlp, "deleted"),
    "act_fn.approximate": lambda mlp: setattr(mlp.act_fn, "approximate", "tanh"),
}


@pytest.mark.parametrize("name", LATER)
def test_attribute_that_changes_after_fuse_is_noticed(name: str, runs: Any) -> None:
    stock, fused = pair(adapted(scaled()))
    block_of(fused).scale = 1.0  # another object of the same value
    before = step(fused, input_of())
    assert_close(before, step(stock, input_of()), 1e-12)
    assert runs == [True]
    for model in (stock, fused):
        LATER[name](block_of(model))
    got = step(fused, input_of())
    assert_close(got, step(stock, input_of()), 1e-12)
    assert runs == [True] and not torch.equal(got["y"], before["y"])
    (row,) = [row for row in explain(fused).blocks if row.strategy == "layer by layer"]
    (said, *_) = name.split(" ")
    assert row == apart(f"its {said} has changed since fuse")


def scaled() -> Scaled:
    config = {"hidden_size": K, "intermediate_size": H, "mlp_bias": False, "hidden_act": "gelu"}
    return Scaled(SimpleNamespace(**config, weight=1.0))


def test_second_fuse_recognizes_a_module_by_its_settings_of_now(runs: Any) -> None:
    _, fused = pair(adapted(scaled()))
    block_of(fused).scale = 0.5
    fuse(fused)
    assert not isinstance(block_of(fused), GatedMLP)
    block_of(fused).scale = 1.0
    fuse(fused)
    step(fused, input_of())
    assert runs == [True]


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta", torch.ones((), dtype=f64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.beta


def test_activation_with_a_buffer_that_is_not_saved_is_not_recognized() -> None:
    module = llama_mlp()
    module.act_fn = Buffered()
    (row,) = mlp_rows(explain(fuse(adapted(module))))
    assert row.reason == "its activation act_fn has parameters or buffers"


def test_block_of_a_4_bit_down_beside_dense_gate_and_up_returns_pefts_dtype(runs: Any) -> None:
    """Under autocast h has autocast's dtype, and x has not: bitsandbytes returns h's."""
    pytest.importorskip("bitsandbytes")
    module = llama_mlp(sizes=(K, 64))
    module.down_proj = baselines.linear_4bit(module.down_proj, "nf4")
    model = get_peft_model(nn.Sequential(module), LoraConfig(r=R, target_modules="all-linear"))
    stock, fused = pair(model.train())
    with torch.autocast("cpu", bf16):
        got, want = (each(input_of(f32).requires_grad_()) for each in (fused, stock))
    assert got.dtype is want.dtype is bf16
    got.sum().backward()
    assert runs == [True]


@pytest.mark.parametrize("named", ["gate_proj", "up_proj"])
def test_result_of_a_base_that_a_fused_layer_hands_on_is_not_overwritten(
    named: str, runs: Any
) -> None:
    """A fused layer without an active adapter returns the result of its base, which may keep it."""

    class Held(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))  # which tanh saves

    module = llama_mlp()
    setattr(module, named, Held(K, H, bias=False))
    model = adapted(module, target_modules=[named])
    model.add_adapter("second", LoraConfig(r=R, target_modules=["down_proj"]))
    randomize(model, "second")
    model.base_model.set_adapter("second")
    stock, fused = pair(model.to(f64))
    got, want = step(fused, input_of()), step(stock, input_of())
    assert runs == [False]
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("in_forward", [False, True], ids=["", "in the forward too"])
def test_backward_under_autocast_equals_one_without(in_forward: bool, runs: Any) -> None:
    """Autocast around loss.backward() does not change the dtypes of the block's GEMMs."""
    _, fused = pair(adapted(llama_mlp(), f32))
    x = input_of(f32, 80)

    def graph(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16, enabled=in_forward):
            y: Tensor = model(x)
        return y

    def late(model: Any, x: Tensor) -> Tensor:
        y = graph(model, x)
        stack.enter_context(torch.autocast("cpu", bf16))
        return y

    want = step(fused, x, graph)
    with contextlib.ExitStack() as stack:
        got = step(fused, x, late)
    assert len(runs) == 2
    for name in want:
        assert_bitwise_equal(got[name], want[name])


@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["", "x_dtype"])
def test_explain_asks_for_the_kernels_of_the_dtype_of_x(dtype: Any, given: bool) -> None:
    """Without x_dtype that is the base's."""
    _, fused = pair(adapted(llama_mlp(), dtype))
    (row,) = mlp_rows(explain(fused, x_dtype=dtype if given else None))
    want = eager_mlp.kernel_reason(torch.device("cpu"), dtype)
    assert want is not None and row.reason.endswith(f"PyTorch's ops: {want}")
    assert (str(dtype) in row.reason) is (dtype is f64)


@pytest.mark.parametrize("saved", ["aten::mm", "aten::addmm", "aten::"])
@pytest.mark.parametrize("alpha", [R, ALPHA])
def test_selectively_checkpointed_mlp_equals_pefts(alpha: int, saved: str, runs: Any) -> None:
    """A saved result of an op must not change in place; a scaling of 1 takes another op."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        is_saved = op.name().startswith(saved) and "mm" in op.name()
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    def call(model: Any, x: Tensor) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    stock, fused = pair(adapted(llama_mlp("silu"), lora_alpha=alpha))
    x = input_of(f64, 3, 40, K)
    assert_close(step(fused, x, call), step(stock, x, call), 1e-12)
    assert runs == []


class DropsInTraining(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.5, self.training)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), "its activation act_fn has modules of its own"),
        (DropsInTraining(), NO_ACTIVATION.format("act_fn")),
    ],
)
def test_activation_that_differs_in_training_is_not_recognized_in_eval_mode(act, reason) -> None:
    block = llama_mlp("silu")
    block.act_fn = act
    fused = fuse(adapted(block).eval())
    assert not isinstance(block_of(fused), GatedMLP)
    assert mlp_rows(explain(fused)) == [apart(reason)]


def test_plain_call_after_one_with_named_rows_is_explained_as_plain() -> None:
    stock = adapted(llama_mlp("silu"))
    stock.add_adapter("second", LoraConfig(r=R, target_modules="all-linear"))
    fused = fuse(stock.double()).eval()
    x = input_of(f64, 2, 40, K)
    with torch.no_grad():
        fused(x, adapter_names=["default", "second"])
    fused.train()(x)
    assert not any("rows name" in row.reason for row in explain(fused).rows)


def test_block_on_meta_has_shapes() -> None:
    fused = fuse(adapted(llama_mlp("silu")).to(bf16).to("meta"))
    assert isinstance(block_of(fused), GatedMLP)
    x = torch.empty(80, K, dtype=bf16, device="meta", requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("make", [conv1d_glu, GLU])
def test_block_whose_gate_and_up_have_no_adapter_has_pefts_gradients(make: Any, runs: Any) -> None:
    fan = {"fan_in_fan_out": True} if make is conv1d_glu else {}
    stock, fused = pair(adapted(make(), target_modules=["w2"], **fan))
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert runs == [True]


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda mlp, x: mlp(),
    "two tensors": lambda mlp, x: mlp(x, x),
    "another argument": lambda mlp, x: mlp(x, scale=2.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_that_the_own_forward_refuses_is_refused_in_its_words(name: str) -> None:
    found = []
    for model in pair(adapted(llama_mlp())):
        with pytest.raises(TypeError) as refused:
            CALLS[name](block_of(model), input_of())
        found.append(str(refused.value))
    assert found[0] == found[1]


class Marked(Tensor):
    """A tensor of a class of its own, as another library's."""


def test_x_of_another_class_takes_the_own_forward_and_a_parameter_the_block(runs: Any) -> None:
    stock, fused = pair(adapted(llama_mlp()))
    found = [model(input_of().as_subclass(Marked).requires_grad_()) for model in (fused, stock)]
    assert [type(y) for y in found] == [Marked, Marked]
    found[0].sum().backward()
    assert not runs
    x = nn.Parameter(input_of())
    y = fused(x)
    assert torch.equal(y, fused(x.detach().requires_grad_())) and type(y) is Tensor
    y.sum().backward()
    assert runs == [True]


class Narrow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


class Marks(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x).as_subclass(Marked)
        return y


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [Narrow, Marks])
@pytest.mark.parametrize("named", ["w1", "w3"])
def test_gate_and_up_of_two_dtypes_or_classes_have_pefts_results(named, kind, grad, runs) -> None:
    """Their product is made as the module makes it, in the wider dtype."""
    module = GLU()
    setattr(module, named, kind(K, H, bias=False))
    stock, fused = pair(adapted(module, f32, target_modules=["w2"]))
    with torch.set_grad_enabled(grad):
        got, want = (model(input_of(f32)) for model in (fused, stock))
        exact = in_float64(stock)(input_of(f32).double())
    assert type(got) is type(want)
    assert_as_exact(*({"y": t.as_subclass(Tensor)} for t in (got, exact, want)))
    if grad:
        got.sum().backward()
    assert not runs


@pytest.mark.parametrize("named", ["gate_proj", "up_proj"])
def test_result_of_a_layer_that_is_left_to_peft_is_not_overwritten(named: str, runs: Any) -> None:
    """PEFT's forward may keep it."""
    stock, fused = pair(adapted(llama_mlp()))
    unfuse(block_of(fused)._modules[named])
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert runs == [False]


def called_down() -> Any:
    module = llama_mlp()
    module.down_proj = Narrow(H, K, bias=False)
    return adapted(module, f32)


def adalora_down() -> Any:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=R, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["down_proj"]
    )
    return get_peft_model(nn.Sequential(llama_mlp()), config)


MORE_STATES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "called": (called_down, None, "down_proj: base layer: Narrow is not exactly nn.Linear"),
    "AdaLoRA": (adalora_down, None, "down_proj: a FusedSVDLinear is not a fused LoRA layer"),
    "ZeRO-3": (
        lambda: adapted(llama_mlp()),
        lambda model: zero3.gather_in_call([block_of(model).up_proj]),
        "DeepSpeed's ZeRO-3 gathers each of its layers for the layer's own call",
    ),
}


@pytest.mark.parametrize("name", MORE_STATES)
def test_explain_says_why_a_block_does_not_run(name: str) -> None:
    make, change, reason = MORE_STATES[name]
    fused = fuse(make())
    if change is not None:
        change(fused)
    assert mlp_rows(explain(fused)) == [apart(reason)]


def test_forward_of_the_class_replaced_before_fuse_is_left_alone(monkeypatch: Any) -> None:
    model, own = adapted(GLU()), GLU.forward
    monkeypatch.setattr(GLU, "forward", lambda self, x: own(self, x))
    assert mlp_rows(explain(fuse(model))) == [apart("GLU.forward was replaced")]
    assert type(block_of(model)) is GLU


def test_explain_says_what_computes_a_block_whole(monkeypatch: Any) -> None:
    _, fused = pair(adapted(llama_mlp(), f32))
    said = "a gated MLP; the backward recomputes act(gate) * up by "
    for reason, by in ((None, "one Triton kernel"), ("why", "PyTorch's ops: why")):
        monkeypatch.setitem(eager_mlp.kernel_reasons, ("cpu", None), reason)
        row = Row("base_model.model.0", "ours, library GEMMs", "eager", "one block", said + by)
        assert mlp_rows(explain(fused)) == [row]


@pytest.mark.parametrize(("rows", "is_block"), [(40, False), (80, True), (None, True)])
def test_explain_of_rows_agrees_with_the_call(rows: Any, is_block: bool, runs, monkeypatch) -> None:
    """A card's verdict may give few rows of the down-projection to kernels."""
    own = selection.choose

    def choose(problem: Any, requested: Any = None) -> Choice:
        is_few = problem.rows < 64 and problem.inner == H and requested is None
        return Choice("cpu", Strategy.LIBRARY, "measured") if is_few else own(problem, requested)

    monkeypatch.setattr(selection, "choose", choose)
    _, fused = pair(adapted(llama_mlp(), f32))
    (row,) = mlp_rows(explain(fused, rows=rows))
    step(fused, input_of(f32, rows or 80))
    assert runs == [True] * is_block
    assert row.strategy == "one block" if is_block else row == apart("down_proj: measured")


@pytest.mark.parametrize("named", ["gate_proj", "up_proj"])
def test_kernel_gets_contiguous_results_without_gradients_too(
    named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    gated, given = eager_mlp.gated, []

    def record(g: Tensor, u: Tensor, activation: str) -> Tensor:
        given.append(g.is_contiguous() and u.is_contiguous())
        return gated(g, u, activation)

    monkeypatch.setattr(eager_mlp, "gated", record)
    module = llama_mlp()
    setattr(module, named, Transposed(K, H, bias=False))
    stock, fused = pair(adapted(module, target_modules=["down_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(fused(input_of()), stock(input_of()))
    assert given == [True]


class Later(LlamaMLP):
    """Its forward reads what is not there at first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("factor", None)
        self.register_module("norm", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.factor is None else y * self.factor


@pytest.mark.parametrize(
    ("name", "value"), [("factor", torch.full((1,), 0.5, dtype=f64)), ("norm", nn.Softmax(-1))]
)
def test_buffer_or_module_that_a_module_gets_after_fuse_is_noticed(
    name: str, value: Any, runs: Any
) -> None:
    config = {"hidden_size": K, "intermediate_size": H, "mlp_bias": False, "hidden_act": "silu"}
    stock, fused = pair(adapted(Later(SimpleNamespace(**config))))
    for model in (stock, fused):
        setattr(block_of(model), name, value)
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
    assert not runs
    assert mlp_rows(explain(fused)) == [apart(f"its {name} has changed since fuse")]


class Private(GLU):
    """A module and a tensor that change nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self._norm, self.factor = nn.Identity(), torch.ones((), dtype=f64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._norm(super().forward(x)) * self.factor
        return y


CHANGES: dict[str, Callable[[Any], Any]] = {
    "private module": lambda mlp: setattr(mlp, "_norm", nn.Softmax(-1)),
    "tensor": lambda mlp: mlp.factor.fill_(0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_private_module_or_tensor_that_changes_after_fuse_is_noticed(name: str) -> None:
    stock = adapted(Private())
    fused = fuse(copy.deepcopy(stock))
    for model in (stock, fused):
        CHANGES[name](block_of(model))
    assert_close(step(fused, input_of()), step(stock, input_of()), 1e-12)
