"""GPT-2's Conv1D, whose weight lies as [K, N]: fused without a copy of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lora_kernels.peft import explain, fuse

from .tiny import SIZES, assert_same, batch, count_ops, fused_layers, pair, randomize, results

f32, bf16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(SIZES[1], SIZES[0])
        self.down = Conv1D(SIZES[2], SIZES[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def mlp(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    base = MLP()
    for conv in (base.up, base.down):
        nn.init.normal_(conv.weight, std=0.2)
        nn.init.normal_(conv.bias)
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["up", "down"], "fan_in_fan_out": True}
    model = get_peft_model(base.to(dtype), LoraConfig(**{**settings, **config}))
    randomize(model, "default")
    return model


@pytest.mark.parametrize(
    "config", [{}, {"lora_dropout": 0.0, "use_rslora": True}, {"use_dora": True}], ids=str
)
def test_outputs_and_gradients(config: dict[str, Any]) -> None:
    stock, fused = pair(mlp(**config))
    assert len(fused_layers(fused)) == 2
    assert_same(results(fused, batch()), results(stock, batch()))
    want = {"lora_linear": 2} | ({"dora_norm": 2} if "use_dora" in config else {})
    assert count_ops(lambda: fused(batch())) == want


@pytest.mark.parametrize("training", [True, False])
def test_fused_in_float32(training: bool) -> None:
    stock, fused = (model.float().train(training) for model in pair(mlp()))
    explain(fused).assert_fused()
    assert_same(results(fused, batch(f32)), results(stock, batch(f32)), rtol=2.0**-18)
    with torch.no_grad():
        for _ in range(2):  # a second token goes the same way
            torch.testing.assert_close(fused(batch(f32)[:1, :1]), stock(batch(f32)[:1, :1]))
    with torch.autocast("cpu", bf16):
        assert fused(batch(f32)).dtype == stock(batch(f32)).dtype == bf16


def test_what_sits_on_it_is_kept() -> None:
    stock, fused = pair(mlp())
    for model in (stock, fused):
        layer = model.base_model.model.up.base_layer
        layer.register_forward_hook(lambda module, args, out: out * 1.5)
    assert "a hook sits on its Conv1D" in explain(fused).rows[0].reason
    assert_same(results(fused, batch()), results(stock, batch()))


def test_gpt2(tmp_path: Path) -> None:
    """Attention and MLP; three steps of SGD move every adapter as they move PEFT's."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=24, n_positions=32, vocab_size=61,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    lora = LoraConfig(r=5, lora_alpha=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    stock = get_peft_model(GPT2LMHeadModel(config).double(), lora)
    randomize(stock, "default")
    fused = fuse(copy.deepcopy(stock))
    assert len(fused_layers(fused)) == 6
    ids = torch.randint(0, 61, (2, 17))
    logits = fused(ids).logits
    torch.testing.assert_close(logits, stock(ids).logits)
    for model in (stock, fused):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-30, atol=2.0**-30, msg=name)
    assert not torch.equal(fused(ids).logits, logits)
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    sizes = [
        (tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("stock", "fused")
    ]
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(
        fused.merge_and_unload()(ids).logits, stock.merge_and_unload()(ids).logits
    )
