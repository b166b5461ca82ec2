"""A small model of each kind that PEFT is used on: fused, it computes, trains and saves the same.

In float64, where a transformers model rounds to float32 in places (norms, rotary embeddings, a
softmax). Numbers that agree to an ulp or two of float64 round to different floats once in 2**27,
and such a model has fewer than 2**14 of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lora_kernels.backends import native
from lora_kernels.peft import explain, fuse, unfuse

from .tiny import (
    ALPHA,
    FLOAT64_RTOL,
    IDS,
    MLP,
    TINY,
    R,
    assert_same,
    batch,
    count_ops,
    fused_layers,
    output,
    randomize,
    results,
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


def gpt2() -> nn.Module:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=TINY["vocab_size"], n_layer=2, n_head=2, n_embd=24, n_positions=32)
    )
    for block in model.transformer.h:  # which start at zero
        nn.init.normal_(block.attn.c_attn.bias)
    return model


def qwen2() -> nn.Module:
    model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def qwen3_moe() -> nn.Module:
    """A layer with a dense MLP, and one of experts, whose grouped product knows no float64."""
    config = Qwen3MoeConfig(
        **TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        decoder_sparse_step=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
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
KINDS = {
    "mlp": Kind(MLP, batch(), ["up", "down"], 2),
    "embedding": Kind(Embedded, IDS, ["embedding", "linear"], 1),
    "gpt2": Kind(gpt2, IDS, ["c_attn", "c_proj"], 6, {"fan_in_fan_out": True}),
    "bert": Kind(lambda: BertForSequenceClassification(BertConfig(**TINY)), IDS, "all-linear", 14),
    "llama": Kind(lambda: LlamaForCausalLM(LlamaConfig(**TINY)), IDS, "all-linear", 14),
    "qwen2": Kind(qwen2, IDS, "all-linear", 14),
    "tied": Kind(
        lambda: GemmaForCausalLM(GemmaConfig(**TINY, head_dim=8)), IDS,
        ["embed_tokens", "lm_head", "q_proj"], 3, {"ensure_weight_tying": True},
    ),
    "gemma": Kind(
        lambda: GemmaForCausalLM(GemmaConfig(**TINY, head_dim=8)), IDS, "all-linear", 14
    ),
    "phi3": Kind(
        lambda: Phi3ForCausalLM(Phi3Config(**TINY, pad_token_id=0, eos_token_id=1)), IDS,
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 8,
    ),
    "qwen3_moe": Kind(qwen3_moe, IDS, ATTENTION, 8, {"target_parameters": EXPERTS}),
}  # fmt: skip
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


def seeded(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The base models have dropouts of their own, of which a fused layer must draw nothing."""
    torch.manual_seed(4)
    return results(model, x)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(kind: Kind, training: bool) -> None:
    stock, fused = (model.train(training) for model in stock_and_fused(kind))
    got, want = seeded(fused, kind.x), seeded(stock, kind.x)
    trained = {name for name, p in stock.named_parameters() if p.requires_grad}
    assert want.keys() - {"x", "y"} == trained
    assert_same(got, want)


@kinds
def test_what_explain_says_is_what_runs(kind: Kind) -> None:
    """In float32, where the kernels are."""
    stock, fused = (model.float().eval() for model in stock_and_fused(kind))
    x = kind.x.float() if kind.x.is_floating_point() else kind.x
    rows = {row.layer: row for row in explain(fused).rows}
    assert all(row.reason and row.strategy for row in rows.values())
    ours = [name for name, row in rows.items() if fused.get_submodule(name) in fused_layers(fused)]
    assert len(ours) == kind.fused == count_ops(lambda: fused(x))["lora_linear"]
    state = "not fused" if native.module is None else "fused"
    assert {rows[name].state for name in ours} == {state}
    # test_linear4bit's 2**-17 is of two linear layers; these have up to fourteen.
    assert_same(results(fused, x), results(stock, x), rtol=2.0**-14)


def test_experts_are_left_to_peft() -> None:
    """PEFT adds their adapters to the weights, of all experts at once; the share says it."""
    _, fused = stock_and_fused(KINDS["qwen3_moe"])
    explanation = explain(fused.float())
    reasons = {row.layer.rsplit(".mlp.")[-1]: row.reason for row in explanation.rows}
    for name, parameter in (("experts", "down_proj"), ("experts.base_layer", "gate_up_proj")):
        assert reasons[name] == f"PEFT's ParamWrapper adds the adapter to {parameter} itself"
    experts = sum(n for name, n in explanation.parameters.items() if "experts" in name)
    total = sum(p.numel() for p in fused.parameters() if p.requires_grad)
    assert sum(explanation.parameters.values()) == total
    words = f"2 not fused ({experts / total:.1%}) of the LoRA parameters"
    if native.module is not None:
        assert str(explanation).endswith(words)


def steps(model: nn.Module, x: Tensor, optimizer: Callable[..., Any]) -> dict[str, Tensor]:
    """How far three steps move each trained parameter, and the output."""
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    moving = optimizer([parameters[name] for name in before])
    torch.manual_seed(4)
    for _ in range(3):
        moving.zero_grad()
        y = output(model, x)
        (y - 1).square().mean().backward()
        moving.step()
    moved = {name: parameters[name].detach() - start for name, start in before.items()}
    return {"y": y.detach()} | moved


# AdamW divides a gradient by its own size + eps, so that an error of δ in an element is worth up to
# δ/eps of its step, however small the element. The gradients here are of the order of 1 or less.
ADAMW_EPS, ADAMW_RTOL = 2.0**-13, FLOAT64_RTOL * 2**13


@kinds
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_updates(kind: Kind, name: str) -> None:
    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if name == "SGD":
            return torch.optim.SGD(parameters, lr=0.1)
        return torch.optim.AdamW(parameters, lr=0.01, eps=ADAMW_EPS)

    stock, fused = stock_and_fused(kind)
    first = output(stock.eval(), kind.x)
    want = steps(stock, kind.x, optimizer)
    assert all(update.norm() > 0 for update in want.values())
    assert not torch.allclose(want["y"], first)
    rtol = ADAMW_RTOL if name == "AdamW" else FLOAT64_RTOL
    assert_same(steps(fused, kind.x, optimizer), want, rtol)


def saved(model: PeftModel, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").read_bytes()


@kinds
def test_state_and_files(kind: Kind, tmp_path: Path) -> None:
    """The same keys, values and bytes, and each side loads what the other has saved."""
    stock, fused = (model.eval() for model in stock_and_fused(kind))
    a, b = stock.state_dict(), fused.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert saved(stock, tmp_path / "stock") == saved(fused, tmp_path / "fused")
    to_stock = PeftModel.from_pretrained(base_model(kind), tmp_path / "fused").eval()
    to_fused = fuse(PeftModel.from_pretrained(base_model(kind), tmp_path / "stock")).eval()
    want = output(stock, kind.x)
    for loaded in (to_stock, to_fused, unfuse(fused)):
        c = loaded.state_dict()
        assert list(a) == list(c) and all(torch.equal(a[name], c[name]) for name in a)
        torch.testing.assert_close(output(loaded, kind.x), want)
    assert saved(to_fused, tmp_path / "again") == saved(to_stock, tmp_path / "and again")


@kinds
def test_merged(kind: Kind) -> None:
    stock, fused = (model.eval() for model in stock_and_fused(kind))
    want = stock.merge_and_unload(safe_merge=True)
    got = fused.merge_and_unload(safe_merge=True)
    assert [type(module) for module in got.modules()] == [type(m) for m in want.modules()]
    assert_same(got.state_dict(), want.state_dict(), rtol=0)
