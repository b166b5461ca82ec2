"""What PEFT does with its layers works on fused ones, where test_layer_kinds.py does not say it of
every kind: adapters that come later, scales, variants, layers of other kinds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.peft import FusedLinear, explain, fuse, unfuse
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    MLP,
    R,
    activate,
    add_adapter,
    add_lora,
    batch,
    count_ops,
    fused_layers,
    mlp,
    pair,
    randomize,
    results,
)


def test_fuse_returns_the_model_and_says_so_in_its_repr() -> None:
    model = mlp()
    assert fuse(model) is model
    assert [type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)] == [FusedLinear] * 2
    assert repr(model.base_model.model.up).startswith("lora.FusedLinear(")
    up = unfuse(model).base_model.model.up
    assert type(up) is lora.Linear and count_ops(lambda: up(batch()[0])) == {"addmm": 1, "mm": 2}


def test_fuse_of_a_model_without_lora_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got MLP without LoRA layers, want .*get_peft_model"):
        fuse(MLP())
    assert explain(MLP()).rows == []
    with pytest.raises(RuntimeError, match="nothing to fuse"):
        explain(MLP()).assert_fused()
    assert type(unfuse(MLP())) is MLP


@pytest.mark.parametrize("call", [fuse, unfuse, explain])
def test_call_on_no_module_is_an_error(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got dict, want a torch\.nn\.Module"):
        call({})


def test_adapter_loaded_into_a_fused_model_equals_the_saved_one(tmp_path: Path) -> None:
    saved = mlp(seed=0)
    randomize(saved, "default", seed=7)
    saved.save_pretrained(tmp_path)
    fused = fuse(mlp(seed=0))
    fused.load_adapter(tmp_path, "loaded")
    fused.set_adapter("loaded")
    assert_close_derived(fused(batch()), saved(batch()))
    again = fuse(PeftModel.from_pretrained(copy.deepcopy(saved).unload(), tmp_path))
    assert_close_derived(again(batch()), saved(batch()))


def test_saved_configuration_is_the_same(tmp_path: Path) -> None:
    configs = []
    for name, model in zip(("stock", "fused"), pair(mlp()), strict=True):
        model.save_pretrained(tmp_path / name)
        configs.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
        configs[-1]["target_modules"].sort()  # a set, which PEFT writes in any order
    assert configs[0] == configs[1]


# Adapters come and go


def test_layers_added_later_are_reported() -> None:
    model = fuse(mlp(target_modules=["up"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down"]))
    activate(model, "default", "second")
    said = [row.reason for row in explain(model).rows]
    assert said[1] == "adapted, or made fusable, after fuse(): call fuse again"
    assert len(fused_layers(fuse(model))) == 2
    assert not any("call fuse again" in row.reason for row in explain(model).rows)
    reasons = {row.reason for row in explain(unfuse(model)).rows}
    assert reasons == {"fuse() was not called"}


def test_scales_set_by_peft_are_seen() -> None:
    stock, fused = pair(mlp())
    for model in (stock, fused):
        model.base_model.model.up.scale_layer(0.5)
        model.base_model.model.down.set_scale("default", 3.0)
    assert_close_derived(results(fused, batch()), results(stock, batch()))


def test_weighted_adapter_equals_peft() -> None:
    stock, fused = pair(mlp())
    for model in (stock, fused):
        add_adapter(model, lora_alpha=8)
        model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "mix", "cat")
        model.set_adapter("mix")
    assert_close_derived(results(fused, batch()), results(stock, batch()))


# Variants and layers of other kinds stay PEFT's own


def test_one_variant_among_active_adapters_equals_peft() -> None:
    model = mlp()
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["up"], use_dora=True))
    stock, fused = pair(activate(model, "default", "dora"))
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    up, down = explain(fused).rows
    assert "'dora' is a DoRA beside other" in up.reason and "DoRA" not in down.reason


class Zoo(nn.Module):
    """One layer of each kind that PEFT adapts with a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.gpt2 = Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.gpt2(self.embedding(ids))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_of_other_kinds_stay_pefts() -> None:
    torch.manual_seed(0)
    targets = ["embedding", "gpt2", "conv", "attention", "linear"]
    stock, fused = pair(add_lora(Zoo().double(), target_modules=targets))
    ids = torch.arange(6).view(2, 3)
    assert_close_derived(fused(ids), stock(ids))
    prefix = "base_model.model."
    reasons = {r.layer.removeprefix(prefix): r.reason for r in explain(fused).rows}
    assert len(fused_layers(fused)) == 2
    for name in ("linear", "gpt2"):
        assert "float64" in reasons.pop(name)  # for the kernels; otherwise fused
    assert reasons == {
        "embedding": "an embedding: its base is a lookup, no product to fuse the adapter's with",
        "conv": "PEFT's Conv1d is not covered in this version",
        "attention": "PEFT's MultiheadAttention is not covered in this version",
        "attention.base_layer.out_proj": (
            "lora.MultiheadAttention reads its weights and never calls it"
        ),
    }


def test_target_parameters_stay_pefts() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=[], target_parameters=["up.weight"])
    stock, fused = pair(get_peft_model(MLP().double(), config))
    assert_close_derived(fused(batch()), stock(batch()))
    reason = "PEFT's ParamWrapper adds the adapter to weight itself"
    assert [row.reason for row in explain(fused).rows] == [reason]
