"""PEFT's DoRA, fused: what it computes, and when it is left to PEFT.

Properties of every kind of layer are in test_layer_kinds.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from lora_kernels.peft import explain, fuse
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import (
    batch,
    count_ops,
    dora_mlp,
    pair,
    results,
)

f32, bf16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_dropout_takes_the_base_product_twice(training: bool) -> None:
    fused = fuse(dora_mlp(lora_dropout=0.3).train(training))
    want = {"lora_linear": 4 if training else 2, "dora_norm": 2}
    assert count_ops(lambda: fused(batch())) == want
    for row in explain(fused).rows:
        assert row.state == "not fused" and "eager" in row.backend  # as float64 always is
        assert "DoRA" in row.reason and ("base product twice" in row.strategy) is training


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

    def assert_equals_stock() -> None:
        with torch.no_grad():
            assert_close_derived(fused(batch()), stock(batch()))

    assert_equals_stock()
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
        assert_equals_stock()
    for model in (stock, fused):
        torch.manual_seed(3)
        model.add_adapter("plain", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    for name in ("plain", "default"):
        for model in (stock, fused):
            model.set_adapter(name)
        assert_equals_stock()
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        assert_bitwise_equal(twin(batch()), fused(batch()))
