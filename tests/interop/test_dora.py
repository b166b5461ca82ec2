"""PEFT's DoRA, fused: what it computes, and when it is left to PEFT.

What holds of every kind of layer is in test_layer_kinds.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_kernels.peft import explain, fuse
from lora_kernels.quantization import Weight4bit
from tests.support.assertions import assert_bitwise_equal, assert_close_derived, derived_rtol
from tests.support.peft_models import (
    SIZES,
    batch,
    count_ops,
    dora_mlp,
    pair,
    results,
    seeded_results,
)

f32, bf16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
def test_outputs_and_gradients(config: dict[str, Any], training: bool) -> None:
    """The same mask too: it is PEFT's own dropout, drawn once."""
    stock, fused = (model.train(training) for model in pair(dora_mlp(**config)))
    assert_close_derived(seeded_results(fused, batch()), seeded_results(stock, batch()))
    dropped = training and "lora_dropout" in config
    want = {"lora_linear": 4, "dora_norm": 2} if dropped else {"lora_linear": 2, "dora_norm": 2}
    assert count_ops(lambda: fused(batch())) == want
    for row in explain(fused).rows:
        assert row.state == "not fused" and "eager" in row.backend  # as float64 always is
        assert "DoRA" in row.reason and ("base product twice" in row.strategy) is dropped


def test_bfloat16_loses_no_more_than_peft() -> None:
    """Against float64 on the same rounded parameters."""
    stock, fused = pair(dora_mlp())
    for model in (stock, fused):
        model.to(bf16)
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.data = param.data.float()
    ref = results(copy.deepcopy(stock).double(), batch(bf16).double())
    got, peft = results(fused, batch(bf16)), results(stock, batch(bf16))
    for name in ref:
        errors = [(r[name].double() - ref[name]).norm() / ref[name].norm() for r in (got, peft)]
        assert errors[0] <= 1.25 * errors[1] + 2**-10, (name, errors)  # as in tolerance: u/4


def test_decoding_follows_every_change() -> None:
    """The norm is kept while nothing changes, and no longer."""
    stock, fused = (model.eval() for model in pair(dora_mlp()))
    layers = [model.base_model.model.up for model in (stock, fused)]

    def same() -> None:
        with torch.no_grad():
            assert_close_derived(fused(batch()), stock(batch()))

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
        assert_bitwise_equal(twin(batch()), fused(batch()))


@pytest.mark.parametrize("part", ["base_layer", "lora_magnitude_vector"])
def test_hook_on_a_part_leaves_it_to_peft(part: str) -> None:
    stock, fused = pair(dora_mlp())
    for model in (stock, fused):
        hooked = getattr(model.base_model.model.up, part)
        hooked = hooked if part == "base_layer" else hooked["default"]
        hooked.register_forward_hook(lambda module, args, out: out * 1.5)
    words = {
        "base_layer": "DoRA, which needs the base weight: a hook sits on",
        "lora_magnitude_vector": "DoRA whose magnitude is no plain module",
    }
    assert words[part] in explain(fused).rows[0].reason
    assert_close_derived(results(fused, batch()), results(stock, batch()))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_over_a_4bit_base(dropout: float) -> None:
    """Against the formula in float64 on the decoded weight, with PEFT's own mask."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    K, N = 64, SIZES[1]
    base = bnb.nn.Linear4bit(K, N, bias=True, compute_dtype=f32, quant_type="nf4")
    model = nn.ModuleDict({"up": base.to("cpu")})
    model.is_loaded_in_4bit = True
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
    assert_close_derived([t.double() for t in got], want, derived_rtol(f32, terms=41 + 64))
    row = explain(model).rows[0]
    assert row.state == ("composed" if dropout else "fused"), row
