"""A small model of each kind that PEFT is used on: fused, it computes, trains and saves the same.

In float64, where a transformers model rounds to float32 in places (norms, rotary embeddings, a
softmax). Numbers that agree to an ulp or two of float64 round to different floats once in 2**27,
and such a model has fewer than 2**14 of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_kernels.backends.cpu import native
from lora_kernels.peft import explain, fuse, unfuse
from lora_kernels.peft.explain_rows import KERNELS, LIBRARY
from tests.support.assertions import (
    FLOAT64_RTOL,
    assert_bitwise_equal,
    assert_close_derived,
    derived_rtol,
)
from tests.support.peft_models import (
    ALPHA,
    IDS,
    TINY,
    R,
    assert_same_files,
    assert_trains_alike,
    count_ops,
    fused_layers,
    gpt2,
    llama,
    output,
    randomize,
    results,
    seeded_results,
)


class Embedded(nn.Module):
    """An embedding below a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TINY["vocab_size"], 23)
        self.linear = nn.Linear(23, 9)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.tanh(self.embedding(ids)))
        return y


def gpt2_with_biases() -> nn.Module:
    model = gpt2()
    for block in model.transformer.h:  # which start at zero
        nn.init.normal_(block.attn.c_attn.bias)
    return model


def qwen2() -> nn.Module:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def qwen3_moe() -> nn.Module:
    """A layer with a dense MLP, and one of experts, whose grouped product knows no float64."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**TINY, **experts, head_dim=8, decoder_sparse_step=2)
    )
    model.set_experts_implementation("eager")
    return model


class Kind(NamedTuple):
    base: Callable[[], nn.Module]
    x: Tensor
    targets: str | list[str]
    fused: int  # layers on lora_linear
    config: dict[str, Any] = {}  # noqa: RUF012


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**TINY, head_dim=8))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**TINY, pad_token_id=0, eos_token_id=1)
    )


TIED = ["embed_tokens", "lm_head", "q_proj"]
KINDS = {
    "embedding": Kind(Embedded, IDS, ["embedding", "linear"], 1),
    "gpt2": Kind(gpt2_with_biases, IDS, ["c_attn", "c_proj"], 6, {"fan_in_fan_out": True}),
    "gpt2 with wte": Kind(gpt2, IDS, ["wte", "c_attn"], 2, {"fan_in_fan_out": True}),
    "bert": Kind(bert, IDS, "all-linear", 14),
    "llama": Kind(llama, IDS, "all-linear", 14),
    "qwen2": Kind(qwen2, IDS, "all-linear", 14),
    "tied": Kind(gemma, IDS, TIED, 3, {"ensure_weight_tying": True}),
    "gemma": Kind(gemma, IDS, "all-linear", 14),
    "phi3": Kind(phi3, IDS, PHI3, 8),
    "qwen3_moe": Kind(qwen3_moe, IDS, ATTENTION, 8, {"target_parameters": EXPERTS}),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def base_model(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return kind.base().double()


def stock_and_fused(kind: Kind) -> tuple[PeftModel, PeftModel]:
    """Built alike: PEFT's tied adapters cannot be copied."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": kind.targets, **kind.config}
    stock, fused = (get_peft_model(base_model(kind), LoraConfig(**settings)) for _ in range(2))
    randomize(stock, "default")
    randomize(fused, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(fused)
    return stock, fused


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_fused_model_equals_peft(kind: Kind, training: bool) -> None:
    stock, fused = (model.train(training) for model in stock_and_fused(kind))
    got, want = seeded_results(fused, kind.x), seeded_results(stock, kind.x)
    trained = {name for name, p in stock.named_parameters() if p.requires_grad}
    assert want.keys() - {"x", "y"} == trained
    assert_close_derived(got, want)


@kinds
def test_what_explain_says_is_what_runs(kind: Kind) -> None:
    """In float32, where the kernels are."""
    stock, fused = (model.float().eval() for model in stock_and_fused(kind))
    x = kind.x.float() if kind.x.is_floating_point() else kind.x
    rows = {row.layer: row for row in explain(fused).rows}
    assert all(row.reason and row.strategy for row in rows.values())
    ours = [name for name, row in rows.items() if fused.get_submodule(name) in fused_layers(fused)]
    assert len(ours) == kind.fused == count_ops(lambda: fused(x))["lora_linear"]
    state = LIBRARY if native.module is None else KERNELS
    assert {rows[name].state for name in ours} == {state}
    # The gradient of a softmax is a difference, which loses a bit more. Another is lost to scalar
    # code's sums, which are one chain (see tolerance).
    rtol = 4 * derived_rtol(torch.float32, layers=14)
    assert_close_derived(results(fused, x), results(stock, x), rtol)


# AdamW divides a gradient by its own size + eps, so that an error of δ in an element is worth up to
# δ/eps of its step, however small the element. The gradients here are of the order of 1 or less.
ADAMW_EPS, ADAMW_RTOL = 2.0**-13, FLOAT64_RTOL * 2**13
OPTIMIZERS = {
    "SGD": (partial(torch.optim.SGD, lr=0.1), FLOAT64_RTOL),
    "AdamW": (partial(torch.optim.AdamW, lr=0.01, eps=ADAMW_EPS), ADAMW_RTOL),
}


@kinds
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_follows_peft(kind: Kind, name: str) -> None:
    optimizer, rtol = OPTIMIZERS[name]
    stock, fused = (model.train() for model in stock_and_fused(kind))
    trained = {n for n, p in stock.named_parameters() if p.requires_grad}

    def forward(model: Any, step: int) -> Tensor:
        return output(model, kind.x)

    got = assert_trains_alike(fused, stock, forward, rtol, steps=3, optimizer=optimizer)
    assert {n.removesuffix(" update") for n, t in got.items() if n.endswith("update")} == trained
    assert all(got[f"{name} update"].norm() > 0 for name in trained)
    assert not torch.allclose(got["y 2"], got["y 0"])


@kinds
def test_state_and_files_are_the_same_and_load(kind: Kind, tmp_path: Path) -> None:
    """The same keys, values and bytes, and each side loads what the other has saved."""
    stock, fused = (model.eval() for model in stock_and_fused(kind))
    assert_same_files(stock, fused, tmp_path)
    to_stock = PeftModel.from_pretrained(base_model(kind), tmp_path / "fused").eval()
    to_fused = fuse(PeftModel.from_pretrained(base_model(kind), tmp_path / "stock")).eval()
    want = output(stock, kind.x)
    for loaded in (to_stock, to_fused, unfuse(fused)):
        assert list(loaded.state_dict()) == list(stock.state_dict())
        assert_bitwise_equal(loaded.state_dict(), stock.state_dict())
        assert_close_derived(output(loaded, kind.x), want)
    assert_same_files(to_stock, to_fused, tmp_path / "again")


@kinds
def test_merged_model_is_pefts(kind: Kind) -> None:
    stock, fused = (model.eval() for model in stock_and_fused(kind))
    want = stock.merge_and_unload(safe_merge=True)
    got = fused.merge_and_unload(safe_merge=True)
    assert [type(module) for module in got.modules()] == [type(m) for m in want.modules()]
    assert_bitwise_equal(got.state_dict(), want.state_dict())
