"""The base model, its copies and its layers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lora_kernels.core.weights import share
from lora_kernels.finetune import Preset, UsageError, add_lora_layers
from lora_kernels.finetune.model import (
    adapters,
    cast_parameters,
    default_dtype,
    load_base,
)
from lora_kernels.finetune.presets import find_targets

LORA = {"preset": Preset(3, 8, ("all-linear",), 0.0), "fused": False}


def test_copies_share_frozen_weights_and_nothing_else(base: nn.Module) -> None:
    one = add_lora_layers(share(base), **LORA)
    two = share(one)
    frozen = [(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True) if p is q]
    assert len(frozen) == len(list(base.parameters()))
    assert adapters(one).keys() == adapters(two).keys()
    for name, p in adapters(one).items():
        assert p.equal(adapters(two)[name])
        assert p.data_ptr() != adapters(two)[name].data_ptr()
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_bf16_keeps_the_rotary_frequencies_in_fp32(model_folder: Path) -> None:
    base = load_base(model_folder, torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in base.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_casting_keeps_tied_weights_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    cast_parameters(model, torch.bfloat16)
    assert model["b"].weight is model["a"].weight
    assert model["a"].weight.dtype is torch.bfloat16


def test_targets_of_a_model_made_of_conv1d() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    assert find_targets(model, ["c_attn", "mlp.c_fc"]) == (["c_attn", "mlp.c_fc"], [])
    with pytest.raises(UsageError, match=r"did you mean c_proj\? this model has c_attn, c_proj"):
        find_targets(model, ["q_proj"])


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32")])
def test_default_dtype_is_one_that_gpu_kernels_take(
    has_bf16: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert default_dtype(torch.device("cuda")) == name
    assert default_dtype(torch.device("cpu")) == "fp32"
