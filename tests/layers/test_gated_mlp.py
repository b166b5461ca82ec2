"""`LoRAGatedMLP`: layer by layer on a CPU, one block on the path that a GPU takes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels.backends import decoder
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.bench import counter
from lora_kernels.layers import (
    AdaLoRALinear,
    DoRALinear,
    HierarchicalLoRALinear,
    LoRAGatedMLP,
    LoRALinear,
    MemoryEfficientLoRALinear,
    QLoRALinear,
    StableLoRALinear,
    load_lora_weights,
    save_lora_weights,
)
from lora_kernels.ops import blocks, linear
from tests.support.assertions import assert_as_exact, assert_bitwise_equal
from tests.support.gpus import OnCuda

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, H, R, ALPHA = 24, 40, 5, 7.0
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """On a GPU's path: grows by each block's forward and backward."""
    found: list[str] = []
    forward = blocks.gated_mlp

    def record_forward(x: Tensor, block: blocks.Block) -> Tensor:
        found.append("forward")
        return forward(x, block)

    def recorded(backward: Any) -> Any:
        def record_backward(*args: Any) -> Any:
            found.append("backward")
            return backward(*args)

        return record_backward

    monkeypatch.setattr(blocks, "gated_mlp", record_forward)
    for name in ("gated_backward", "gated_update_backward"):  # by PyTorch's ops; by kernels
        monkeypatch.setattr(eager_mlp, name, recorded(getattr(eager_mlp, name)))
    before = dict(decoder.bitsandbytes_reasons)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield found
    decoder.bitsandbytes_reasons.clear()
    decoder.bitsandbytes_reasons.update(before)


def build(
    dtype: torch.dtype = f64,
    cls: Any = LoRALinear,
    activation: str = "silu",
    sizes: tuple[int, int] = (K, H),
    **options: Any,
) -> LoRAGatedMLP:
    torch.manual_seed(0)
    width, hidden = sizes
    options = {"bias": True, "lora_dtype": dtype} | options
    layers = [
        cls(k, n, R, ALPHA, dtype=dtype, **options)
        for k, n in ((width, hidden), (width, hidden), (hidden, width))
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return LoRAGatedMLP(*layers, activation=activation)


def apply_plain(layer: Any, x: Tensor) -> Tensor:
    weight = (
        layer.weight if layer.weight.is_floating_point() else layer.quantized.dequantize(x.dtype)
    )
    update = layer.scaling * (x @ layer.lora_A.to(x.dtype).T) @ layer.lora_B.to(x.dtype).T
    return F.linear(x, weight, layer.bias) + update


def reference(mlp: Any, x: Tensor) -> Tensor:
    activation = ACTIVATIONS[mlp.activation]
    return apply_plain(mlp.down, activation(apply_plain(mlp.gate, x)) * apply_plain(mlp.up, x))


def input_of(dtype: torch.dtype = f64, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*(shape or (2, 35)), K, generator=generator, dtype=f64).to(dtype)


def step(mlp: Any, x: Tensor, call: Any = None, times: int = 1) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    named = {name: p for name, p in mlp.named_parameters() if p.requires_grad}
    y = (call or (lambda mlp, x: mlp(x)))(mlp, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=f64).to(y.dtype)
    leaves = {"x": x, **named}
    for _ in range(times):
        for t in leaves.values():
            t.grad = None
        y.backward(dy, retain_graph=times > 1)
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], within: float) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        error = (got[name].double() - exact.double()).norm()
        assert error <= within * exact.double().norm(), (name, float(error / exact.norm()))


def assert_formula(mlp: Any, x: Tensor, call: Any = None) -> None:
    """The block loses little more than the formula in PyTorch's ops, called alike; in float64, sums
    of at most 60 terms in another order."""

    def call_plain(mlp: Any, x: Tensor) -> Tensor:
        plain = functools.partial(reference, mlp)
        found: Tensor = plain(x) if call is None else call(plain, x)
        return found

    exact = copy.deepcopy(mlp)
    for p in exact.parameters():
        if p.is_floating_point():
            p.data = p.data.to(f64)
    got, ref = step(mlp, x, call), step(exact, x.to(f64), reference)
    if x.dtype is f64:
        assert_close(got, ref, 1e-12)
    else:
        assert_as_exact(got, ref, step(mlp, x, call_plain))


@pytest.mark.parametrize("shape", [(2, 35), (65,), (3,), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_on_a_cpu_is_the_formula(activation, shape) -> None:
    mlp, x = build(activation=activation), input_of(f64, *shape)
    assert_close(step(mlp, x), step(mlp, x, reference), 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
def test_block_is_the_formula(dtype, bias, activation, runs) -> None:
    mlp, x = build(dtype, activation=activation, bias=bias), input_of(dtype)
    assert_formula(mlp, x)
    assert runs == ["forward", "backward"]


@pytest.mark.parametrize("lora_dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_block_over_4_bits_is_the_formula(lora_dtype, autocast, runs) -> None:
    mlp = build(bf16, QLoRALinear, sizes=(64, 128), lora_dtype=lora_dtype)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(3)).to(bf16)

    def call(mlp: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16, enabled=autocast):
            return mlp(x)

    assert_formula(mlp, x, call)
    assert runs == ["forward", "backward"]


def test_block_in_float32_under_autocast_is_close_to_the_formula(runs) -> None:
    mlp, x = build(f32), input_of(f32)

    def call(mlp: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", bf16):
            return mlp(x)

    assert_formula(mlp, x, call)
    assert runs == ["forward", "backward"]


def test_second_backward_equals_the_first(runs) -> None:
    mlp, x = build(), input_of()
    assert_close(step(mlp, x, times=2), step(mlp, x, reference), 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_block_is_the_formula(reentrant, runs) -> None:
    mlp, x = build(), input_of()
    got = step(mlp, x, lambda mlp, x: checkpoint(mlp, x, use_reentrant=reentrant))
    assert_close(got, step(mlp, x, reference), 1e-12)
    assert runs == ["forward", "forward", "backward"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_block_without_gradients_is_the_formula(mode, runs) -> None:
    mlp, x = build(), input_of()
    with mode():
        got = mlp(input_of())
    assert_close({"y": got}, {"y": reference(mlp, x)}, 1e-12)


def merge(mlp: Any) -> None:
    mlp.eval()
    mlp.up.merge()


STATES: dict[str, Any] = {
    "hook": lambda mlp: mlp.up.register_forward_hook(lambda module, args, y: 2 * y),
    "pre-hook": lambda mlp: mlp.down.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "replaced forward": lambda mlp: setattr(mlp.up, "forward", lambda x: x @ mlp.up.weight.T),
    "merged": merge,
    "disabled": lambda mlp: setattr(mlp.gate, "enabled", False),
    "dropout": lambda mlp: setattr(mlp.down, "dropout", 0.5),
}


@pytest.mark.parametrize("state", STATES)
def test_layers_in_another_state_are_called(state, runs) -> None:
    mlp = build()
    STATES[state](mlp)
    torch.manual_seed(1)
    got = mlp(input_of())
    torch.manual_seed(1)
    activation = ACTIVATIONS[mlp.activation]
    x = input_of()
    assert torch.equal(got, mlp.down(activation(mlp.gate(x)) * mlp.up(x)))
    assert not runs


def test_layers_with_a_rank_gate_are_a_block(runs) -> None:
    """By its operands a layer is in the block, whatever its class: two levels of ranks, and E."""
    torch.manual_seed(0)
    options: Any = {"bias": True, "lora_dtype": f64, "dtype": f64}
    mlp = LoRAGatedMLP(
        HierarchicalLoRALinear(K, H, (2, 3), ALPHA, weights=(0.6, 0.3), **options),
        StableLoRALinear(K, H, R, ALPHA, **options),
        AdaLoRALinear(H, K, R, ALPHA, **options),
    )
    for p in mlp.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)

    def apart(mlp: Any, x: Tensor) -> Tensor:
        y: Tensor = mlp.down(F.silu(mlp.gate(x)) * mlp.up(x))
        return y

    found = step(mlp, input_of())
    assert runs == ["forward", "backward"]
    assert_close(found, step(mlp, input_of(), apart), 1e-12)
    assert {"gate.level_weights", "down.lora_E"} <= found.keys()


class OwnForward(LoRALinear):
    """A variant that computes more than its record says."""

    def forward_fused(self, x: Tensor, weight: Any) -> Tensor:
        return 2 * super().forward_fused(x, weight)


@pytest.mark.parametrize("cls", [DoRALinear, MemoryEfficientLoRALinear, OwnForward])
def test_layers_that_a_block_does_not_compute_are_called(cls: Any, runs) -> None:
    mlp, x = build(), input_of()
    mlp.up = cls.from_linear(nn.Linear(K, H, dtype=f64), R, ALPHA, lora_dtype=f64)
    nn.init.normal_(mlp.up.lora_B, std=0.3)
    want = mlp.down(F.silu(mlp.gate(x)) * mlp.up(x))
    assert_close({"y": mlp(x)}, {"y": want}, 1e-12)
    assert not runs


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hook_on_a_layer_is_called(register, runs) -> None:
    mlp, seen = build(), []
    getattr(mlp.up, register)(lambda *args: seen.append(1))
    mlp(input_of().requires_grad_()).sum().backward()
    assert seen == [1] and not runs


@pytest.mark.parametrize("kind", ["module_forward_hook", "module_full_backward_hook"])
def test_hook_on_all_modules_is_called(kind, runs) -> None:
    mlp, seen = build(), set()
    register = getattr(nn.modules.module, f"register_{kind}")
    handle = register(lambda module, *args: seen.add(module))
    try:
        mlp(input_of().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {mlp.gate, mlp.up, mlp.down} <= seen and not runs


def test_compiled_mlp_is_the_formula_in_one_graph(runs) -> None:
    mlp, x = build(), input_of()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert_close(step(mlp, x, lambda _, x: compiled(x)), step(mlp, x, reference), 1e-12)
    assert not runs


@pytest.mark.parametrize("other", ["gate", "up", "down", ""])
def test_layer_that_a_verdict_gives_to_kernels_is_called(other, runs, monkeypatch) -> None:
    mlp, choose, make = build(), linear.choose, blocks.make_block

    def chosen(operands: Any, spec: Any) -> Any:
        found = choose(operands, spec)
        is_other = bool(other) and operands.lora_A is getattr(mlp, other).lora_A
        return dataclasses.replace(found, backend="cuda") if is_other else found

    def make_on_cuda(x: Any, layers: Any, *rest: Any, **options: Any) -> Any:
        is_mlp = len(layers) == 3  # else a layer of an MLP that is no block
        return make(OnCuda(x) if is_mlp else x, layers, *rest, **options)

    monkeypatch.setattr(linear, "choose", chosen)
    monkeypatch.setattr(blocks, "_has_verdict", lambda x: True)
    monkeypatch.setattr(blocks, "make_block", make_on_cuda)
    got = mlp(input_of())
    assert_close({"y": got}, {"y": reference(mlp, input_of())}, 1e-12)
    assert runs == ([] if other else ["forward"])


def test_mlp_in_a_transform_raises_as_its_layers_do(runs) -> None:
    mlp, x = build(), input_of()
    with pytest.raises(RuntimeError) as of_layer:
        torch.func.grad(lambda x: mlp.gate(x).sum())(x)
    with pytest.raises(RuntimeError) as of_mlp:
        torch.func.grad(lambda x: mlp(x).sum())(x)
    assert str(of_mlp.value) == str(of_layer.value) and not runs


def test_inference_tensor_outside_of_inference_mode_is_the_formula(runs) -> None:
    mlp = build()
    with torch.inference_mode():
        x = input_of()
    with torch.no_grad():
        got = mlp(x)
    assert_close({"y": got}, {"y": reference(mlp, input_of())}, 1e-12)


@pytest.mark.parametrize("other", ["gate", "up", "down"])
def test_adapters_of_two_dtypes_are_the_formula(other, runs) -> None:
    """The A of gate and up are one GEMM's operand, if they are stacked."""
    mlp, x = build(bf16, lora_dtype=f32), input_of(bf16)
    layer = getattr(mlp, other)
    for p in (layer.lora_A, layer.lora_B):
        p.data = p.data.to(bf16)
    assert_formula(mlp, x)


class Marked(nn.Parameter):
    """A parameter of a class of its own, as a sharded one's."""


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("layer", ["gate", "up", "down"])
def test_layer_with_a_parameter_of_another_class_is_called(layer, name, runs) -> None:
    mlp, x = build(), input_of()
    owner = getattr(mlp, layer)
    p = getattr(owner, name)
    owner._parameters[name] = Marked(p.detach().clone(), requires_grad=p.requires_grad)
    assert_close(step(mlp, x), step(mlp, x, reference), 1e-12)
    assert "forward" not in runs


@pytest.mark.parametrize("dropout", ["in eval mode", "of 0"])
def test_dropout_that_is_not_active_is_no_obstacle(dropout, runs) -> None:
    mlp, x = build(dropout=0.5 if dropout == "in eval mode" else 0.0), input_of()
    mlp.train(dropout == "of 0")
    assert_close(step(mlp, x), step(mlp, x, reference), 1e-12)
    assert runs == ["forward", "backward"]


def test_block_with_weights_of_another_dtype_is_its_layers(runs) -> None:
    """A layer raises or casts; the block does what it does."""
    mlp, x = build(f32), input_of(bf16)
    with pytest.raises((TypeError, RuntimeError, ValueError)) as of_layer:
        mlp.gate(x)
    with pytest.raises(type(of_layer.value)) as of_mlp:
        mlp(x)
    assert str(of_mlp.value) == str(of_layer.value) and not runs


def test_layers_that_compute_in_another_dtype_are_called(runs) -> None:
    mlp = build(bf16, QLoRALinear, sizes=(64, 128), compute_dtype=f32)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(3)).to(bf16)
    assert torch.equal(mlp(x), mlp.down(F.silu(mlp.gate(x)) * mlp.up(x))) and not runs


@pytest.mark.parametrize("shape", [(3,), (), (0,), (2, 0)], ids=str)
def test_block_of_few_rows_is_the_formula(shape, runs) -> None:
    mlp, x = build(), input_of(f64, *shape)
    assert_close(step(mlp, x), step(mlp, x, reference), 1e-12)
    assert runs == ["forward", "backward"]


def test_what_a_layer_refuses_is_refused(runs) -> None:
    with pytest.raises(TypeError, match="float64 goes with float64 alone"):
        build()(input_of(f32))
    for name in ("gate", "up", "down"):
        trained = build()
        getattr(trained, name).weight.requires_grad_()
        with pytest.raises(ValueError, match="want a frozen weight"):
            trained(input_of())
    with pytest.raises(ValueError, match="x: got shape"):
        build()(torch.ones(70, K + 1, dtype=f64))


def test_values_that_change_between_calls_are_read(runs) -> None:
    """Also by a write that moves no version counter."""
    mlp, x = build(), input_of()
    mlp(x)
    with torch.no_grad():
        for p in mlp.parameters():
            p.data.mul_(1.5)
    assert_close(step(mlp, x), step(mlp, x, reference), 1e-12)


def test_adapters_are_saved_and_loaded(tmp_path) -> None:
    mlp, other = build(), build()
    with torch.no_grad():
        for name, p in mlp.named_parameters():
            if "lora_" in name:
                p.add_(1)
    save_lora_weights(mlp, tmp_path / "adapter.safetensors")
    load_lora_weights(other, tmp_path / "adapter.safetensors")
    assert_bitwise_equal(other(input_of()), mlp(input_of()))


def test_arguments_that_do_not_fit_are_named() -> None:
    layer = LoRALinear(8, 16)
    down = LoRALinear(16, 8)
    with pytest.raises(TypeError, match="up: got Linear, want a LoRALayer"):
        LoRAGatedMLP(layer, nn.Linear(8, 16), down)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="up: got 8 -> 12 features, want gate's 8 -> 16"):
        LoRAGatedMLP(layer, LoRALinear(8, 12), down)
    for size in (8, 24):
        said = f"^down: got {size} in-features, want gate's 16 out-features$"
        with pytest.raises(ValueError, match=said):
            LoRAGatedMLP(layer, LoRALinear(8, 16), LoRALinear(size, 8))
    for size in (4, 12):
        with pytest.raises(
            ValueError, match=f"^up: got {size} -> 16 features, want gate's 8 -> 16$"
        ):
            LoRAGatedMLP(layer, LoRALinear(size, 16), down)
    with pytest.raises(ValueError, match="activation: got 'relu', want one of 'silu'"):
        LoRAGatedMLP(layer, LoRALinear(8, 16), down, activation="relu")


def test_block_moves_few_bytes() -> None:
    """The counts are those of the block that `fuse` makes of a LlamaMLP."""
    mlp = build(bf16, sizes=(4096, 14336), device="meta", bias=False)
    x = torch.empty(8192, 4096, dtype=bf16, device="meta", requires_grad=True)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def run() -> None:
        y = mlp(x)
        torch.autograd.grad(y, wanted, torch.empty_like(y))

    found = counter.count(run)
    # One dx of gate and up, added in the GEMM.
    assert found.bytes <= 8060e6 and found.kernels <= 28, found


@pytest.mark.parametrize("shape", [(70,), (2, 35)], ids=str)
def test_result_of_a_block_can_be_changed_in_place(runs: list[str], shape: tuple[int, ...]) -> None:
    def call(mlp: Any, x: Tensor) -> Tensor:
        y: Tensor = mlp(x)
        y *= 2
        return y

    mlp, x = build(), input_of(f64, *shape)
    want = step(mlp, x, lambda mlp, x: 2 * reference(mlp, x))
    assert_close(step(mlp, x, call), want, 1e-12)
    assert runs == ["forward", "backward"]


def test_gradients_of_several_dy_at_once_are_those_of_the_formula(runs: list[str]) -> None:
    """`is_grads_batched=True`."""
    mlp, x = build(), input_of().requires_grad_()
    leaves = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    dy = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(5), dtype=f64)
    got, want = (
        torch.autograd.grad(y, leaves, dy, is_grads_batched=True)
        for y in (mlp(x), reference(mlp, x))
    )
    for each, exact in zip(got, want, strict=True):
        torch.testing.assert_close(each, exact, rtol=1e-10, atol=1e-10)
    assert runs == ["forward"]


@pytest.mark.parametrize("odd", [("gate", "up"), ("down",), ("gate", "up", "down")], ids=str)
def test_float64_adapters_beside_a_float32_x_are_refused_as_by_their_layers(odd, runs) -> None:
    sizes = {"gate": (K, H), "up": (K, H), "down": (H, K)}
    layers = {
        name: LoRALinear.from_linear(nn.Linear(*size), r=4, lora_dtype=f64 if name in odd else f32)
        for name, size in sizes.items()
    }
    with pytest.raises(TypeError, match="float64 goes with float64 alone"):
        LoRAGatedMLP(**layers)(torch.ones(80, K))


def test_gradient_of_the_gate_overwrites_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """g and u are of the block alone, so a backward that keeps no graph needs no third tensor."""
    in_place = list[bool]()

    def recorded(backward: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(backward).bind(*args, **kwargs)
            in_place.append(given.arguments["in_place"])
            return backward(*args, **kwargs)

        return record

    for name in ("gated_backward", "gated_update_backward"):  # by PyTorch's ops; by kernels
        monkeypatch.setattr(eager_mlp, name, recorded(getattr(eager_mlp, name)))
    with as_on_gpu(), lora_kernels.backend("eager"):
        step(build(), input_of())
    assert in_place == [True]
