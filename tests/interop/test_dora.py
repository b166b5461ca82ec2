"""PEFT's DoRA, fused: what it computes, when it is left to PEFT, and that PEFT's life goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lora_kernels.peft import explain, fuse, unfuse

from .tiny import MLP, SIZES, assert_same, batch, count_ops, mlp, pair, results

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16


def dora(**config: Any) -> PeftModel:
    """With magnitudes that are no longer the norms."""
    model = mlp(use_dora=True, **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "magnitude" in name:
                param.copy_(1 + torch.rand(param.shape, generator=generator))
    return model


def seeded(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(11)
    return results(model, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
def test_outputs_and_gradients(config: dict[str, Any], training: bool) -> None:
    """The same mask too: it is PEFT's own dropout, drawn once."""
    stock, fused = (model.train(training) for model in pair(dora(**config)))
    assert_same(seeded(fused, batch()), seeded(stock, batch()))
    dropped = training and "lora_dropout" in config
    want = {"lora_linear": 4, "dora_norm": 2} if dropped else {"lora_linear": 2, "dora_norm": 2}
    assert count_ops(lambda: fused(batch())) == want
    for row in explain(fused).rows:
        assert row.state == "not fused" and "eager" in row.backend  # as float64 always is
        assert "DoRA" in row.reason and ("base product twice" in row.strategy) is dropped


def test_fused_in_float32() -> None:
    stock, fused = (model.float() for model in pair(dora()))
    explain(fused).assert_fused()
    assert_same(results(fused, batch(f32)), results(stock, batch(f32)), rtol=2.0**-18)


def test_no_less_exact_than_peft_in_bfloat16() -> None:
    """Against float64 on the same rounded parameters."""
    stock, fused = pair(dora())
    for model in (stock, fused):
        model.to(bf16)
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.data = param.data.float()
    exact = copy.deepcopy(stock).double()
    x = batch(bf16)
    ref = results(exact, x.double())
    got, peft = results(fused, x), results(stock, x)
    for name in ref:
        errors = [(r[name].double() - ref[name]).norm() / ref[name].norm() for r in (got, peft)]
        assert errors[0] <= 1.25 * errors[1] + 2**-10, (name, errors)


def test_twenty_steps_of_sgd() -> None:
    stock, fused = pair(dora(lora_dropout=0.2))
    for model in (stock, fused):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(batch()).square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-30, atol=2.0**-30, msg=name)


def test_decoding_follows_every_change() -> None:
    """The norm is kept while nothing changes, and no longer."""
    stock, fused = (model.eval() for model in pair(dora()))
    layers = [model.base_model.model.up for model in (stock, fused)]

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fused(batch()), stock(batch()))

    same()
    with torch.no_grad():
        assert count_ops(lambda: fused(batch())) == {"lora_linear": 2}
    for change in (
        lambda layer: layer.lora_B["default"].weight.mul_(2),
        lambda layer: layer.lora_A["default"].weight.add_(0.1),
        lambda layer: layer.lora_magnitude_vector["default"].weight.mul_(2),
        lambda layer: layer.base_layer.weight.add_(0.1),
        lambda layer: layer.set_scale("default", 3),
    ):
        for layer in layers:
            with torch.no_grad():
                change(layer)
        same()
    for model in (stock, fused):
        torch.manual_seed(3)
        model.add_adapter("plain", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    for name in ("plain", "default"):
        for model in (stock, fused):
            model.set_adapter(name)
        same()
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        assert torch.equal(twin(batch()), fused(batch()))


def test_saved_loaded_merged_and_given_back(tmp_path: Path) -> None:
    stock, fused = (model.eval() for model in pair(dora()))
    assert list(fused.state_dict()) == list(stock.state_dict())
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("stock", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.manual_seed(0)
    loaded = fuse(PeftModel.from_pretrained(MLP().double(), tmp_path / "fused").eval())
    torch.testing.assert_close(loaded(batch()), stock(batch()))
    assert torch.equal(unfuse(copy.deepcopy(fused))(batch()), stock(batch()))
    torch.testing.assert_close(fused.merge_and_unload()(batch()), stock(batch()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hook", "DoRA, which needs the base weight: a hook sits on"),
        ("magnitude", "DoRA whose magnitude is no plain module"),
    ],
)
def test_left_to_peft(change: str, words: str) -> None:
    stock, fused = pair(dora())
    for model in (stock, fused):
        layer = model.base_model.model.up
        if change == "hook":
            layer.base_layer.register_forward_hook(lambda module, args, out: out * 1.5)
        if change == "magnitude":
            layer.lora_magnitude_vector["default"].register_forward_hook(lambda m, a, out: out * 2)
    assert words in explain(fused).rows[0].reason
    assert_same(results(fused, batch()), results(stock, batch()))


def test_arguments_beside_x() -> None:
    stock, fused = (model.base_model.model.up for model in pair(dora()))
    kwargs = {"adapter_names": None}
    torch.testing.assert_close(fused(batch(), **kwargs), stock(batch(), **kwargs))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_over_a_4bit_base(dropout: float) -> None:
    """Against the formula in float64 on the decoded weight, with PEFT's own mask."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft import inject_adapter_in_model

    from lora_kernels.quantization import Weight4bit

    torch.manual_seed(0)
    K, N = 64, SIZES[1]
    base = bnb.nn.Linear4bit(K, N, bias=True, compute_dtype=f32, quant_type="nf4")
    model = nn.ModuleDict({"up": base.to("cpu")})
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = LoraConfig(
        r=5, lora_alpha=7, target_modules=["up"], use_dora=True, lora_dropout=dropout
    )
    inject_adapter_in_model(config, model)
    fuse(model)
    layer: Any = model["up"].train()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        B.copy_(torch.randn_like(B) / 4)
        magnitude.mul_(1.5)
    x, dy = torch.randn(9, K, requires_grad=True), torch.randn(9, N)
    torch.manual_seed(3)
    y = layer(x)
    got = (y, *torch.autograd.grad(y, [x, A, B, magnitude], dy))

    weight = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32).double()
    wide = [t.detach().double().requires_grad_() for t in (x, A, B, magnitude)]
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.ones(9, K), dropout).double() if dropout else 1.0
    dropped, s = wide[0] * kept, 7 / 5
    norm = (weight + s * wide[2] @ wide[1]).detach().norm(dim=1)
    z = dropped @ weight.T + s * (dropped @ wide[1].T) @ wide[2].T
    bias = layer.base_layer.bias.detach().double()
    ref = wide[3] / norm * z + (wide[0] - dropped) @ weight.T + bias
    want = (ref, *torch.autograd.grad(ref, wide, dy.double()))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 2.0**-18 * b.norm()
    row = explain(model).rows[0]
    assert row.state == ("composed" if dropout else "fused"), row
