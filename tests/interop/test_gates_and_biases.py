"""Gates, biases and versions of layers that share x or whose base is called, on a GPU's path."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from lora_kernels.backends.eager import blocks as eager_blocks
from lora_kernels.peft import fuse
from tests.support.assertions import assert_as_exact
from tests.support.peft_models import in_float64, randomize

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, R, ALPHA = 64, 5, 7
pytestmark = pytest.mark.usefixtures("gpu_path")


class Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 64), nn.Linear(K, 32), nn.Linear(K, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class Called(nn.Linear):
    """A base layer that is called as a module."""


BASES: dict[str, Any] = {
    "group": Group,
    "called": lambda: Called(K, 64),
    "linear": lambda: nn.Linear(K, 64),
}


def adapted(
    base: str, dtype: torch.dtype, adapter: torch.dtype, config: Any = None, **settings: Any
) -> Any:
    torch.manual_seed(0)
    targets = ["q", "k", "v"] if base == "group" else ["0"]
    config = config or LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **settings)
    model: Any = get_peft_model(nn.Sequential(BASES[base]()).to(dtype), config)
    randomize(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter)
    return model.train()


def input_of(dtype: torch.dtype, rows: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, rows // 2, K, generator=generator, dtype=f64).to(dtype)


def step(model: Any, x: Tensor, batched: bool = False) -> dict[str, Tensor]:
    """dx and all gradients, for one dY or for three at once."""
    x = x.clone().requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    dy = dy.to(bf16).to(y.dtype)  # the same values in each dtype
    dy = torch.stack([dy, -dy, 2 * dy]) if batched else dy
    grads = torch.autograd.grad(y, [x, *named.values()], dy, is_grads_batched=batched)
    return dict(zip(["x", *named], grads, strict=True))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def with_kasa(dtype: torch.dtype) -> Any:
    model = adapted("group", dtype, dtype, kasa_config=peft.KasaConfig())
    model(input_of(dtype))  # PEFT truncates the base weight in the first forward
    return model


@pytest.mark.parametrize("base", BASES)
def test_gradient_of_a_bias_is_summed_in_float32(base) -> None:
    """Over 1024 rows of dY in bfloat16, for adapters in float32."""
    stock = adapted(base, bf16, f32, lora_bias=True)
    fused, exact = fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    x = input_of(bf16, 1024)
    got, own, want = (
        step(model, x.to(t)) for model, t in ((fused, bf16), (stock, bf16), (exact, f64))
    )
    biases = [name for name in want if "lora_B" in name and name.endswith("bias")]
    assert biases
    for name in biases:
        assert error(got[name], want[name]) <= 1.25 * error(own[name], want[name]) + 2.0**-13, name


def test_p_of_a_gate_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaling that PEFT swaps is a gate of P: a product more, of an unrounded P."""
    model = adapted("group", bf16, bf16)
    prepare_model_for_compiled_hotswap(model, config=model.peft_config["default"], target_rank=R)
    dtypes: list[torch.dtype] = []
    linears = eager_blocks.linears

    def record(*args: Any) -> Any:
        ys, ps = linears(*args)
        dtypes.extend(p.dtype for p in ps)
        return ys, ps

    monkeypatch.setattr(eager_blocks, "linears", record)
    fuse(model)(input_of(bf16).requires_grad_())
    assert dtypes == [f32] * 3


def test_gate_without_a_gradient_of_lora_b_has_pefts_gradient() -> None:
    stock = with_kasa(f32)
    for name, p in stock.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_B" not in name)
    got, want = step(fuse(copy.deepcopy(stock)), input_of(f32)), step(stock, input_of(f32))
    assert any("diag" in name for name in want)
    assert_as_exact(got, step(in_float64(stock), input_of(f32).double()), want)


def without_biases(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    return model


SEVERAL_DY: dict[str, Any] = {
    "gated group": lambda: with_kasa(f64),
    "gated group without biases": lambda: without_biases(with_kasa(f64)),
    "plain group": lambda: adapted("group", f64, f64),
    "group with biases": lambda: adapted("group", f64, f64, lora_bias=True),
    "layer": lambda: adapted("linear", f64, f64),
    "layer with dropout": lambda: adapted("linear", f64, f64, lora_dropout=0.3),
}


@pytest.mark.parametrize("case", SEVERAL_DY)
def test_gradients_of_several_dy_at_once_equal_each(case) -> None:
    """`is_grads_batched=True`."""
    fused = fuse(SEVERAL_DY[case]())
    found = []
    for batched in (True, False):
        torch.manual_seed(1)
        found.append(step(fused, input_of(f64), batched))
    together, alone = found
    for name, t in alone.items():
        for got, factor in zip(together[name], (1, -1, 2), strict=True):
            assert error(got, factor * t) < 1e-12, name


def test_gate_of_adalora_without_a_gradient_of_lora_b_has_pefts_gradient() -> None:
    config = AdaLoraConfig(
        init_r=R, lora_alpha=ALPHA, target_modules=["0"], total_step=10, tinit=1, tfinal=1
    )
    stock = adapted("called", f64, f64, config)
    for name, p in stock.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_B" not in name)
    got, want = step(fuse(copy.deepcopy(stock)), input_of(f64)), step(stock, input_of(f64))
    assert any("lora_E" in name for name in want) and got.keys() == want.keys()
    assert all(error(got[name], t) < 1e-9 for name, t in want.items())


def make_plain(dtype: torch.dtype) -> Any:
    return adapted("group", dtype, dtype)


def with_scaling_in_a_tensor(dtype: torch.dtype) -> Any:
    model = make_plain(dtype)
    prepare_model_for_compiled_hotswap(model, config=model.peft_config["default"], target_rank=R)
    return model


# The operands of a layer: a model that has them, and the tensor of one of its layers.
WRITTEN: dict[str, tuple[Any, Any]] = {
    "weight": (make_plain, lambda layer: layer.base_layer.weight),
    "bias": (make_plain, lambda layer: layer.base_layer.bias),
    "lora_A": (make_plain, lambda layer: layer.lora_A.default.weight),
    "lora_B": (make_plain, lambda layer: layer.lora_B.default.weight),
    "lora_B's bias": (
        lambda dtype: adapted("group", dtype, dtype, lora_bias=True),
        lambda layer: layer.lora_B.default.bias,
    ),
    "scaling": (with_scaling_in_a_tensor, lambda layer: layer.scaling["default"]),
    "KaSA's factors": (with_kasa, lambda layer: layer.lora_diag["default"]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_write_to_a_later_layer_within_a_forward_is_noticed(name) -> None:
    make, tensor_of = WRITTEN[name]
    group = fuse(make(f64)).base_model.model[0]
    tensor, x = tensor_of(group.k), input_of(f64)
    with torch.no_grad():
        before = group.k(x)
        group.q(x)
        tensor.mul_(3)
        got = group.k(x)
        want = group.k(x)
    assert error(got, want) < 1e-12 < error(before, want)


@pytest.mark.parametrize("layer", ["q", "k"])
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "scaling"])
def test_write_to_what_the_backward_reads_raises_as_peft_does(name, layer) -> None:
    make, tensor_of = WRITTEN[name]
    stock = make(f32)
    for model in (stock, fuse(copy.deepcopy(stock))):
        y = model(input_of(f32).requires_grad_())
        with torch.no_grad():
            tensor_of(getattr(model.base_model.model[0], layer)).mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_that_are_inference_tensors_have_pefts_result(trained) -> None:
    """They have no version counter."""
    stock = adapted("group", f64, f64)
    with torch.inference_mode():
        for module in stock.modules():
            for name, p in list(module._parameters.items()):
                if p is not None and (trained or not p.requires_grad):
                    setattr(module, name, nn.Parameter(p.clone(), p.requires_grad))
    x = input_of(f64)
    with torch.no_grad():
        want = stock(x)
        assert error(fuse(stock)(x), want) < 1e-12
