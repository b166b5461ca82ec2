"""PEFT's AdaLoRA, fused: dtypes, dropout, its budget over a training, bases, reasons.

Properties of every kind of layer are in test_layer_kinds.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_kernels.peft import FusedSVDLinear, explain, fuse
from lora_kernels.peft.linear import Fused
from tests.support.assertions import assert_close_derived
from tests.support.peft_models import (
    IDS,
    MLP,
    R,
    adalora_config,
    adalora_mlp,
    assert_same_files,
    assert_trains_alike,
    batch,
    conv1d,
    count_ops,
    llama,
    pair,
    results,
    train,
)

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def up(model: Any) -> Any:
    return model.base_model.model.up


# Results


# A training


def language_model() -> Any:
    return adalora_mlp(base=llama(), target_modules=["q_proj", "down_proj"])


def loss(model: Any, step: int) -> Tensor:
    """With its orthogonality."""
    return model(input_ids=IDS, labels=IDS).loss


def test_the_budget_falls_as_in_the_unfused_model() -> None:
    """Through warmup, the cubic fall, the last allocation and the steps after it."""
    stock, fused = pair(language_model())
    assert sum(isinstance(m, Fused) for m in fused.modules()) == 4
    kept, allocate = [], fused.base_model.update_and_allocate

    def counted(step: int) -> None:
        allocate(step)
        masks = [p.count_nonzero() for n, p in fused.named_parameters() if "lora_E" in n]
        kept.append(int(sum(masks)))

    fused.base_model.update_and_allocate = counted
    # Twelve steps, each of them starts from the last one's difference.
    assert_trains_alike(fused, stock, loss, 2.0**-30, steps=12)
    pattern = fused.peft_config["default"].rank_pattern
    assert pattern == stock.peft_config["default"].rank_pattern
    assert kept[0] == 4 * R and kept[-1] == 4 * 2 and 4 * 2 < kept[4] < 4 * R


def test_saved_with_its_ranks_and_loaded(tmp_path: Path) -> None:
    stock, fused = pair(language_model())
    assert_same_files(stock, fused, tmp_path)
    for name, model in (("stock", stock), ("fused", fused)):
        train(model, loss, steps=12)
        model.save_pretrained(tmp_path / f"{name}-trained")
    stock, fused = (
        PeftModel.from_pretrained(language_model().unload(), tmp_path / f"{name}-trained")
        for name in ("stock", "fused")
    )
    ranks = [m.r["default"] for m in fuse(fused).modules() if isinstance(m, FusedSVDLinear)]
    assert sum(ranks) == 4 * 2 and len(set(ranks)) > 1
    # Of PEFT's two, since ranknum, which it trains, it does not save.
    assert_close_derived(fused(input_ids=IDS).logits, stock(input_ids=IDS).logits)


def test_no_rank_left_is_not_fused() -> None:
    stock, fused = pair(adalora_mlp())
    for model in (stock, fused):
        pattern = {"up.lora_E": [False] * R, "down.lora_E": [True, False, True, False, True]}
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    first, second = explain(fused).rows
    assert first.state == "not fused" and "'default': every rank was taken from it" in first.reason
    assert "rank" not in second.reason
    assert_close_derived(results(fused, batch()), results(stock, batch()))


# Bases


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_conv1d_base_equals_peft() -> None:
    torch.manual_seed(0)
    stock, fused = pair(adalora_mlp(base=MLP(conv1d), fan_in_fan_out=True))
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    assert count_ops(lambda: fused(batch())) == {"lora_linear": 2}


# When it is left to PEFT


def test_convolutions_stay_pefts_own() -> None:
    inner = nn.ModuleDict({"up": nn.Conv2d(3, 4, 3), "down": nn.Linear(4, 4)})
    fused = fuse(get_peft_model(inner, adalora_config()))
    assert explain(fused).rows[0].reason == "PEFT's SVDConv2d is not covered in this version"
