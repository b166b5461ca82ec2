"""GPT-2's Conv1D, whose weight lies as [K, N]: fused without a copy of it.

What holds of every kind of layer is in test_layer_kinds.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.peft import explain
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    IDS,
    add_lora,
    assert_same_files,
    assert_trains_alike,
    batch,
    conv1d_mlp,
    count_ops,
    fused_layers,
    gpt2,
    pair,
    results,
)

f32, bf16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")


@pytest.mark.parametrize(
    "config", [{}, {"lora_dropout": 0.0, "use_rslora": True}, {"use_dora": True}], ids=str
)
def test_every_configuration_equals_peft(config: dict[str, Any]) -> None:
    stock, fused = pair(conv1d_mlp(**config))
    assert len(fused_layers(fused)) == 2
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    want = {"lora_linear": 2} | ({"dora_norm": 2} if "use_dora" in config else {})
    assert count_ops(lambda: fused(batch())) == want


def test_what_sits_on_it_is_kept() -> None:
    stock, fused = pair(conv1d_mlp())
    for model in (stock, fused):
        layer = model.base_model.model.up.base_layer
        layer.register_forward_hook(lambda module, args, out: out * 1.5)
    assert "a hook sits on its Conv1D" in explain(fused).rows[0].reason
    assert_close_derived(results(fused, batch()), results(stock, batch()))


@pytest.mark.parametrize("training", [True, False])
def test_decoding_and_autocast_in_float32_equal_peft(training: bool) -> None:
    stock, fused = (model.float().train(training) for model in pair(conv1d_mlp()))
    with torch.no_grad():
        for _ in range(2):  # a second token goes the same way
            assert_close_derived(fused(batch(f32)[:1, :1]), stock(batch(f32)[:1, :1]))
    with torch.autocast("cpu", bf16):
        assert fused(batch(f32)).dtype == stock(batch(f32)).dtype == bf16


def test_gpt2_trains_and_saves_as_pefts(tmp_path: Path) -> None:
    """Attention and MLP."""
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    stock, fused = pair(add_lora(model, **targets))
    assert len(fused_layers(fused)) == 6
    assert_same_files(stock, fused, tmp_path)
    logits = fused(IDS).logits
    assert_close_derived(logits, stock(IDS).logits)
    assert_trains_alike(fused, stock, lambda model, step: model(IDS, labels=IDS).loss, steps=3)
    assert not torch.equal(fused(IDS).logits, logits)
    assert_close_derived(fused.merge_and_unload()(IDS).logits, stock.merge_and_unload()(IDS).logits)
