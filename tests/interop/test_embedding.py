"""PEFT's LoRA over an embedding, fused: what it computes, when it is left to PEFT, and its life."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_kernels.measure import tolerance
from lora_kernels.peft import FusedEmbedding, Row, explain, fuse, unfuse

from .test_equivalence import IDS, TINY, loss_and_gradients
from .tiny import SIZES, add_lora, assert_same, count_ops, fused_layers, pair, randomize

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
K, N = SIZES[1], SIZES[0]
FUSED = Row(
    "base_model.model.tokens", "not fused", "torch", "lookups, then one product in place",
    "an embedding: its base is a lookup, no product to fuse the adapter's with",
)  # fmt: skip


class Tokens(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(K, N, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.tokens(x, *args, **kwargs)
        return y


def tokens(dtype: torch.dtype = f64, base: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    return add_lora(Tokens(**base or {}).to(dtype), target_modules=["tokens"], **config)


def two_adapters(dtype: torch.dtype = f64) -> Any:
    """Of different ranks and scalings, both active."""
    model = tokens(dtype)
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["tokens"], use_rslora=True)
    model.add_adapter("second", config)
    randomize(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    return model


def ids(*shape: int) -> Tensor:
    """With repetitions, and a padding_idx of 3 among them."""
    x = torch.randint(K, shape, generator=torch.Generator().manual_seed(2))
    x.view(-1)[: x.numel() // 4] = 3
    return x


def results(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The output on x, and the gradient of each trainable parameter, by name."""
    y = model(x, **kwargs)
    weights = ((torch.arange(y.numel()) % 7 - 3) / 4).to(y.dtype).view(y.shape)  # exact in any
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * weights).sum(), list(parameters.values()), allow_unused=True)
    named = dict(zip(parameters, grads, strict=True))
    return {"y": y.detach()} | {n: g for n, g in named.items() if g is not None}


def layer(model: nn.Module) -> Any:
    return model.base_model.model.tokens  # type: ignore[union-attr]


# What it computes


@pytest.mark.parametrize("base", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"r": 1}, {"r": 300}], ids=str
)
def test_outputs_and_gradients(config: dict[str, Any], base: dict[str, Any]) -> None:
    """PEFT's embedding has a dropout and does not call it."""
    stock, fused = pair(tokens(base=base, **config))
    assert type(layer(fused)) is FusedEmbedding and explain(fused).rows == [FUSED]
    weight = layer(stock).base_layer.weight.clone()
    got = results(fused, ids(5, 7))
    assert len(got) == 3
    assert_same(got, results(stock, ids(5, 7)))
    assert torch.equal(layer(fused).base_layer.weight, weight)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (0,), (2, 0, 3)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    stock, fused = pair(tokens())
    assert_same(results(fused, ids(*shape)), results(stock, ids(*shape)))


def test_strided_indices() -> None:
    stock, fused = pair(tokens())
    torch.testing.assert_close(fused(ids(4, 6).t()), stock(ids(4, 6)).transpose(0, 1))


def test_active_adapters_share_one_product() -> None:
    stock, fused = pair(two_adapters())
    got = results(fused, ids(5, 7))
    assert len(got) == 5
    assert_same(got, results(stock, ids(5, 7)))
    assert count_ops(lambda: fused(ids(5))) == {"addmm_": 1}
    assert count_ops(lambda: stock(ids(5))) == {"mm": 2}


@pytest.mark.parametrize("autocast", [None, bf16])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f32, bf16)]
)
def test_dtypes_and_rounding(
    dtype: torch.dtype, adapter_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    stock = two_adapters(dtype)
    for name, param in stock.named_parameters():
        if "lora_" in name:
            param.data = param.data.to(adapter_dtype)
    exact = copy.deepcopy(stock).double()
    stock, fused = pair(stock)
    x = ids(8, 16)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        want, got = results(stock, x), results(fused, x)
    ref = results(exact, x)
    assert got.keys() == want.keys() == ref.keys()
    # Pooled, as the gradients of three ranks are fewer than 256 elements.
    for names in (["y"], [name for name in want if name != "y"]):
        assert all(got[name].dtype is want[name].dtype for name in names)
        u = tolerance.unit_roundoff(dtype if names == ["y"] else adapter_dtype)
        g, r, w = ([results[name] for name in names] for results in (got, ref, want))
        tolerance.assert_close(g, r, w, u, str(names))


def test_sgd_updates() -> None:
    stock, fused = pair(two_adapters())
    before = {name: p.detach().clone() for name, p in stock.named_parameters()}
    for model in (stock, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(5):
            optimizer.zero_grad()
            (model(ids(5, 7)) - step).square().mean().backward()
            optimizer.step()
    got, want = (
        {name: p.detach() - before[name] for name, p in model.named_parameters()}
        for model in (fused, stock)
    )
    assert sum(update.norm() > 0.01 for update in want.values()) == 4
    assert_same(got, want)


def test_scaling_as_a_tensor() -> None:
    """What PEFT's prepare_model_for_compiled_hotswap leaves behind."""
    stock, fused = pair(tokens())
    layer(fused).scaling["default"] = torch.tensor(7 / 5, dtype=f64)
    assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)))
    layer(fused).set_scale("default", 3.0)
    layer(stock).set_scale("default", 3.0)
    assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)))


@pytest.mark.parametrize("x", [torch.tensor([0, K]), torch.tensor(-1)])
def test_index_out_of_range(x: Tensor) -> None:
    with pytest.raises(IndexError, match="index out of range in self"):
        fuse(tokens())(x)


# When it is left to PEFT


def left(change: str) -> Any:
    base: dict[str, Any] = {"max_norm": {"max_norm": 1.0}, "sparse": {"sparse": True}}.get(
        change, {}
    )
    config = {"dora": {"use_dora": True}}.get(change, {})
    if change == "scaled":
        torch.manual_seed(0)
        inner = Tokens()
        inner.tokens = Gemma3TextScaledWordEmbedding(K, N, 0, embed_scale=3.0)
        model = add_lora(inner.double(), target_modules=["tokens"])
    else:
        model = tokens(base=base, **config)
    embedding = layer(model)
    if change == "hook":
        embedding.base_layer.register_forward_hook(lambda module, args, out: out * 1.5)
    if change == "forward":
        embedding.base_layer.forward = lambda x: (
            2 * nn.functional.embedding(x, embedding.base_layer.weight)
        )
    if change == "embed_scale":
        embedding.base_layer.embed_scale = 3.0
    if change == "trainable":
        embedding.base_layer.weight.requires_grad_()
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("dora", "adapter 'default' is a variant of LoRA (DoraEmbeddingVariant)"),
        ("hook", "a hook sits on its nn.Embedding"),
        ("forward", "its forward was replaced"),
        ("scaled", "is a Gemma3TextScaledWordEmbedding, not exactly nn.Embedding"),
        ("embed_scale", "the base has an embed_scale"),
        ("max_norm", "the base has max_norm"),
        ("sparse", "the base asks for sparse gradients"),
        ("trainable", "the base weight is trainable"),
    ],
)
def test_left_to_peft(change: str, reason: str) -> None:
    stock, fused = left(change), left(change)
    fuse(fused)
    row = explain(fused).rows[0]
    assert row[1:4] == ("not fused", "peft", "PEFT's own forward") and reason in row.reason
    with torch.set_grad_enabled(change != "sparse"):  # whose backward PEFT has not
        for _ in range(2):  # a max_norm has changed lora_A by then
            if change == "sparse":
                assert torch.equal(fused(ids(5, 7)), stock(ids(5, 7)))
            else:
                assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)), rtol=0)


def test_changes_after_fuse_are_seen() -> None:
    stock, fused = pair(tokens())
    for model in (stock, fused):
        layer(model).base_layer.register_forward_hook(lambda module, args, out: out * 1.5)
    assert "a hook sits on" in explain(fused).rows[0].reason
    assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)), rtol=0)


def test_mixed_batch_takes_peft_path_and_says_so() -> None:
    stock, fused = pair(two_adapters().eval())
    names = ["second", "__base__", "default"]
    for model in (stock, fused):
        model.base_model.set_adapter(["default"])
    want = stock(ids(3, 7), adapter_names=names)
    assert torch.equal(fused(ids(3, 7), adapter_names=names), want)
    assert "adapter_names" in explain(fused).rows[0].reason
    torch.testing.assert_close(fused(ids(3, 7)), stock(ids(3, 7)))
    assert explain(fused).rows == [FUSED]


def test_arguments_that_only_variants_read() -> None:
    stock, fused = map(layer, pair(tokens()))
    kwargs = dict.fromkeys(["adapter_names", *getattr(lora.layer, "VARIANT_KWARG_KEYS", [])])
    torch.testing.assert_close(fused(ids(5), **kwargs), stock(ids(5), **kwargs))
    assert count_ops(lambda: fused(ids(5), **kwargs)) == {"addmm_": 1}


# PEFT's life goes on


def test_merge_and_disable() -> None:
    stock, fused = pair(two_adapters().eval())
    x, base = ids(5, 7), layer(stock).base_layer.weight.clone()
    want = stock(x)
    with fused.disable_adapter():
        assert torch.equal(fused(x), base[x])
        assert "disabled" in explain(fused).rows[0].reason
    for model in (stock, fused):
        model.merge_adapter()
    assert torch.equal(fused(x), stock(x)) and "merged" in explain(fused).rows[0].reason
    torch.testing.assert_close(fused(x), want)
    for model in (stock, fused):
        model.unmerge_adapter()
    assert_same(fused.state_dict(), stock.state_dict(), rtol=0)
    torch.testing.assert_close(fused(x), want)
    merged = fused.merge_and_unload()
    assert type(merged.tokens) is nn.Embedding
    torch.testing.assert_close(merged(x), want)


def test_switching_adapters() -> None:
    stock, fused = pair(two_adapters())
    for active in (["second"], ["default"], ["default", "second"]):
        for model in (stock, fused):
            model.base_model.set_adapter(active)
        assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)))
    for model in (stock, fused):
        model.delete_adapter("default")
        model.set_adapter("second")
    assert_same(results(fused, ids(5, 7)), results(stock, ids(5, 7)))


def test_saved_loaded_and_given_back(tmp_path: Path) -> None:
    stock, fused = pair(tokens())
    before = vars(layer(stock)).keys()
    assert list(fused.state_dict()) == list(stock.state_dict())
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("stock", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.manual_seed(0)
    loaded = fuse(PeftModel.from_pretrained(Tokens().double(), tmp_path / "fused"))
    assert type(layer(loaded)) is FusedEmbedding
    assert torch.equal(loaded(ids(5, 7)), fused(ids(5, 7)))
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(layer(twin)) is FusedEmbedding
        assert torch.equal(twin(ids(5, 7)), fused(ids(5, 7)))
    fused.eval()(ids(3), adapter_names=["default"] * 3)
    assert type(layer(unfuse(fused))) is lora.Embedding and vars(layer(fused)).keys() == before
    assert torch.equal(fused(ids(5, 7)), stock(ids(5, 7)))


def test_compiles_without_graph_break() -> None:
    stock, fused = pair(two_adapters())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (ids(5, 7), ids(4, 3)):
        want = {n if n == "y" else f"_orig_mod.{n}": t for n, t in results(stock, x).items()}
        assert_same(results(compiled, x), want)


def test_functional_call_and_inference_mode() -> None:
    stock, fused = pair(tokens())
    other = {name: 2 * p.detach() for name, p in fused.named_parameters()}
    with torch.no_grad():
        want = torch.func.functional_call(stock, other, (ids(5),))
        torch.testing.assert_close(torch.func.functional_call(fused, other, (ids(5),)), want)
    with torch.inference_mode():
        torch.testing.assert_close(fused(ids(5)), stock(ids(5)))


@pytest.mark.parametrize("tied", [False, True])
def test_language_model(tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied)).double()
    stock, fused = pair(add_lora(model, target_modules=["embed_tokens", "q_proj"]))
    assert len(fused_layers(fused)) == 2
    embedding = fused.base_model.model.model.embed_tokens
    assert type(embedding) is FusedEmbedding
    assert (embedding.base_layer.weight is fused.base_model.model.lm_head.weight) is tied
    got = loss_and_gradients(fused)
    assert any("lora_embedding_A" in name for name in got)
    assert_same(got, loss_and_gradients(stock))
    for m in (stock, fused):
        m.gradient_checkpointing_enable({"use_reentrant": False})
        m.enable_input_require_grads()
    assert_same(loss_and_gradients(fused), loss_and_gradients(stock))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_fan_in_fan_out_is_about_other_layers() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=24, n_positions=32, vocab_size=61,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    lora_config = LoraConfig(
        r=5, lora_alpha=7, target_modules=["wte", "c_attn"], fan_in_fan_out=True
    )
    stock, fused = pair(get_peft_model(GPT2LMHeadModel(config).double(), lora_config))
    for model in (stock, fused):
        randomize(model, "default")
    assert type(fused.base_model.model.transformer.wte) is FusedEmbedding
    assert_same(loss_and_gradients(fused), loss_and_gradients(stock))
    assert IDS.max() < 61
