"""PEFT's LoRA over an embedding, fused: its rounding, mixed batches, language models.

Properties of every kind of layer are in test_layer_kinds.py; what is left to PEFT is in
test_foreign_base.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.bench import tolerance
from lora_kernels.peft import FusedEmbedding, Row, explain, fuse
from tests.support.assertions import (
    assert_close_derived,
    assert_close_to_reference,
)
from tests.support.peft_models import (
    SIZES,
    add_lora,
    embedding_model,
    fused_layers,
    gpt2,
    llama,
    loss_and_gradients,
    pair,
    results,
    token_ids,
    two_adapters,
)

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
K, N = SIZES[1], SIZES[0]
REASON = "an embedding: its base is a lookup, no product to fuse the adapter's with"
STRATEGY = "lookups, then one product in place"
FUSED = Row("base_model.model.tokens", "not fused", "torch", STRATEGY, REASON)


def layer(model: Any) -> Any:
    return model.base_model.model.tokens


# Results


@pytest.mark.parametrize("autocast", [None, bf16])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f32, bf16)]
)
def test_dtypes_and_rounding_are_pefts(dtype, adapter_dtype, autocast) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    stock = two_adapters(embedding_model(dtype), use_rslora=True)
    for name, param in stock.named_parameters():
        if "lora_" in name:
            param.data = param.data.to(adapter_dtype)
    exact = copy.deepcopy(stock).double()
    stock, fused = pair(stock)
    x = token_ids(8, 16)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        found = [results(fused, x), results(stock, x)]
    found.insert(1, results(exact, x))
    # Pooled, as the gradients of three ranks are fewer than 256 elements.
    assert len({tuple(each) for each in found}) == 1 and len(found[0]) == 5
    pools = [{"y": each.pop("y"), "gradients": [*each.values()]} for each in found]
    coarsest = {"y": dtype, "gradients": adapter_dtype}
    assert_close_to_reference(*pools, lambda name, dtype: tolerance.unit_roundoff(coarsest[name]))


@pytest.mark.parametrize("x", [torch.tensor([0, K]), torch.tensor(-1)])
def test_index_out_of_range(x: Tensor) -> None:
    with pytest.raises(IndexError, match="index out of range in self"):
        fuse(embedding_model())(x)


# When it is left to PEFT


def test_mixed_batch_takes_peft_path_and_says_so() -> None:
    stock, fused = pair(two_adapters(embedding_model(), use_rslora=True).eval())
    names = ["second", "__base__", "default"]
    for model in (stock, fused):
        model.base_model.set_adapter(["default"])
    want = stock(token_ids(3, 7), adapter_names=names)
    assert torch.equal(fused(token_ids(3, 7), adapter_names=names), want)
    assert "adapter_names" in explain(fused).rows[0].reason
    assert_close_derived(fused(token_ids(3, 7)), stock(token_ids(3, 7)))
    assert explain(fused).rows == [FUSED]


# Language models


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_equals_peft(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    stock, fused = pair(add_lora(model, target_modules=["embed_tokens", "q_proj"]))
    assert len(fused_layers(fused)) == 2
    embedding = fused.base_model.model.model.embed_tokens
    assert type(embedding) is FusedEmbedding
    assert (embedding.base_layer.weight is fused.base_model.model.lm_head.weight) is tied
    got = loss_and_gradients(fused)
    assert any("lora_embedding_A" in name for name in got)
    assert_close_derived(got, loss_and_gradients(stock))
    for m in (stock, fused):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.enable_input_require_grads()
    assert_close_derived(loss_and_gradients(fused), loss_and_gradients(stock))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_fan_in_fan_out_is_about_other_layers() -> None:
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    stock, fused = pair(add_lora(model, target_modules=["wte", "c_attn"], fan_in_fan_out=True))
    assert type(fused.base_model.model.transformer.wte) is FusedEmbedding
    assert_close_derived(loss_and_gradients(fused), loss_and_gradients(stock))
