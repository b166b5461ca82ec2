"""PEFT's operations on its layers work on fused ones, beyond those that test_layer_kinds.py tests
for every kind: adapters that come later, scales, variants, layers of other kinds."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.peft import FusedLinear, explain, fuse, unfuse
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    MLP,
    R,
    activate,
    add_lora,
    batch,
    count_ops,
    fused_layers,
    mlp,
    pair,
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


@pytest.mark.parametrize(
    ("config", "method"),
    [(peft.VeraConfig, "VERA"), (peft.IA3Config, "IA3"), (peft.LoHaConfig, "LOHA")],
)
def test_fuse_of_another_method_of_peft_names_it(config: Any, method: str) -> None:
    settings = {"feedforward_modules": []} if method == "IA3" else {}
    model = peft.get_peft_model(MLP(), config(target_modules=["up"], **settings))
    with pytest.raises(ValueError, match=f"a PEFT model of {method} without LoRA layers, want"):
        fuse(model)


@pytest.mark.parametrize("call", [fuse, unfuse, explain])
def test_call_on_no_module_is_an_error(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model: got dict, want a torch\.nn\.Module"):
        call({})


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
    assert reasons == {"not fused: call fuse()"}


# Variants and layers of other kinds stay PEFT's own


def test_one_variant_among_active_adapters_equals_peft() -> None:
    model = mlp()
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["up"], use_dora=True))
    stock, fused = pair(activate(model, "default", "dora"))
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    up, down = explain(fused).rows
    assert "'dora' is a DoRA, whose column scale beside other" in up.reason
    assert "DoRA" not in down.reason


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
        "embedding": "an embedding: its base is a lookup, no GEMM to fuse the adapter's with",
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
    (row,) = explain(fused).rows
    assert row.reason.startswith(
        "PEFT's ParamWrapper over weight: got Linear without `num_experts`"
    )
