"""A fused model computes what PEFT's does: dtypes, checkpoints, language models, and features of
AdaLoRA, DoRA and embeddings alone.

Properties of every kind of layer are in test_layer_kinds.py; what is left to PEFT is in
test_foreign_base.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_kernels.backends.cpu import native
from lora_kernels.oracle import tolerance
from lora_kernels.peft import FusedEmbedding, FusedSVDLinear, Row, explain, fuse
from lora_kernels.peft.explain_rows import LIBRARY, PEFT
from lora_kernels.peft.linear import Fused
from lora_kernels.peft.quantize import quantize
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
    assert_close_to_reference,
)
from tests.support.peft_models import (
    IDS,
    SIZES,
    R,
    adalora_config,
    adalora_mlp,
    add_adapter,
    add_lora,
    assert_same_files,
    assert_trains_alike,
    batch,
    count_ops,
    dora_mlp,
    embedding_model,
    fused_layers,
    llama,
    loss_and_gradients,
    mlp,
    pair,
    randomize,
    results,
    token_ids,
    train,
    two_adapters,
)

needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Of a lora_bias beside a base without one, which cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True")


@pytest.mark.parametrize(
    ("x_dtype", "base_dtype", "adapter_dtype", "autocast"),
    [
        (f32, f32, f32, None),
        (bf16, bf16, bf16, None),
        (bf16, bf16, f32, None),  # what PEFT makes of such a base
        (f16, f16, f32, None),
        (f32, bf16, f32, bf16),
        (bf16, f32, f32, bf16),
        (f32, f32, f32, f16),
        (f16, bf16, f32, bf16),
    ],
)
@pytest.mark.parametrize(
    ("build", "config", "seeds"),
    [
        (mlp, {"lora_bias": True}, 1),
        (dora_mlp, {}, 7),
        (adalora_mlp, {}, 52),
    ],  # 256 elements of each
)
def test_dtypes_and_rounding_are_pefts(
    build, config, seeds, x_dtype, base_dtype, adapter_dtype, autocast
) -> None:
    """dtypes are PEFT's, and the layer loses little more than PEFT's does (see tolerance)."""
    pools: list[dict[str, list[torch.Tensor]]] = [{}, {}, {}]
    for seed in range(seeds):
        layer = build(base_dtype, **config).base_model.model.up
        randomize(layer, "default", seed + 1)
        for name, param in layer.named_parameters():
            if name.startswith(("lora_", "ranknum")):
                param.data = param.data.to(adapter_dtype)
            if name.startswith("ranknum"):  # which PEFT trains, one element of it
                param.requires_grad_(False)
        exact = copy.deepcopy(layer).double()
        stock, fused = pair(nn.ModuleDict({"up": layer}))
        x = torch.randn(64, SIZES[0], generator=torch.Generator().manual_seed(seed)).to(x_dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            got, want = results(fused["up"], x), results(stock["up"], x)
        for pool, found in zip(pools, (got, results(exact, x.double()), want), strict=True):
            for name, t in found.items():
                pool.setdefault(name, []).append(t)

    def roundoff(name: str, dtype: torch.dtype) -> float:
        # Products with the base weight round to the compute dtype, and so does z, which the
        # magnitude's gradient reads. Other gradients are float32 until they take their own.
        of_base = name in ("x", "y") or "magnitude" in name
        return tolerance.unit_roundoff(dtype, *[want["y"].dtype] * of_base)

    assert_close_to_reference(*pools, roundoff)


def test_autocast_leaves_float64_alone() -> None:
    stock, fused = pair(mlp())
    with torch.autocast("cpu", dtype=bf16):
        assert_close_derived(results(fused, batch()), results(stock, batch()))


def test_adapters_on_different_layers_equal_peft() -> None:
    model = mlp()
    add_adapter(model, "only_up", target_modules={"up"})
    model.set_adapter("only_up")
    stock, fused = pair(model)
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    up, down = explain(fused.float()).rows
    assert "no active adapter" not in up.reason
    assert down.state == PEFT and "no active adapter" in down.reason


# Language models


def language_model(**config: Any) -> Any:
    return add_lora(llama(), target_modules="all-linear", **config)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_the_masks(use_reentrant: bool) -> None:
    fused = fuse(language_model(lora_dropout=0.1)).train()
    torch.manual_seed(4)
    want = loss_and_gradients(fused)
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(4)
    got: dict[str, torch.Tensor] = {}
    ops = count_ops(lambda: got.update(loss_and_gradients(fused)))
    assert ops["lora_linear"] == 2 * len(fused_layers(fused))  # each forward ran twice
    assert_close_derived(got, want)


def test_generate_equals_peft() -> None:
    stock, fused = pair(language_model().eval())
    want, got = (m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (stock, fused))
    assert_bitwise_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_whole_language_model_compiles_without_graph_break(quant: str | None) -> None:
    """Forward and backward, for another length too, as if it were not compiled."""
    torch.compiler.reset()  # of what other tests compiled there may only be so much
    base = llama(f32, hidden_size=64, intermediate_size=128)
    if quant:
        pytest.importorskip("bitsandbytes")
        quantize(base, quant, f32, torch.device("cpu"))
    fused = fuse(add_lora(base, target_modules="all-linear"))
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:, :5]):
        want = loss_and_gradients(fused, ids)
        assert len(want) == 29
        # Compiled, the elementwise operations between the layers may be rounded otherwise.
        assert_close_derived(loss_and_gradients(compiled, ids), want, 2.0**-15)


# AdaLoRA


def up(model: Any) -> Any:
    return model.base_model.model.up


def ada_language_model() -> Any:
    return adalora_mlp(base=llama(), target_modules=["q_proj", "down_proj"])


def ada_loss(model: Any, step: int) -> Tensor:
    """With its orthogonality."""
    return model(input_ids=IDS, labels=IDS).loss


def test_adalora_s_budget_falls_as_in_the_unfused_model() -> None:
    """Through warmup, the cubic fall, the last allocation and the steps after it."""
    stock, fused = pair(ada_language_model())
    assert sum(isinstance(m, Fused) for m in fused.modules()) == 4
    kept, allocate = [], fused.base_model.update_and_allocate

    def counted(step: int) -> None:
        allocate(step)
        masks = [p.count_nonzero() for n, p in fused.named_parameters() if "lora_E" in n]
        kept.append(int(sum(masks)))

    fused.base_model.update_and_allocate = counted
    # Twelve steps, each of them starts from the last one's difference.
    assert_trains_alike(fused, stock, ada_loss, 2.0**-30, steps=12)
    pattern = fused.peft_config["default"].rank_pattern
    assert pattern == stock.peft_config["default"].rank_pattern
    assert kept[0] == 4 * R and kept[-1] == 4 * 2 and 4 * 2 < kept[4] < 4 * R


def test_adalora_is_saved_with_its_ranks_and_loaded(tmp_path: Path) -> None:
    stock, fused = pair(ada_language_model())
    assert_same_files(stock, fused, tmp_path)
    for name, model in (("stock", stock), ("fused", fused)):
        train(model, ada_loss, steps=12)
        model.save_pretrained(tmp_path / f"{name}-trained")
    stock, fused = (
        PeftModel.from_pretrained(ada_language_model().unload(), tmp_path / f"{name}-trained")
        for name in ("stock", "fused")
    )
    ranks = [m.r["default"] for m in fuse(fused).modules() if isinstance(m, FusedSVDLinear)]
    assert sum(ranks) == 4 * 2 and len(set(ranks)) > 1
    # Of PEFT's two, since ranknum, which it trains, it does not save.
    assert_close_derived(fused(input_ids=IDS).logits, stock(input_ids=IDS).logits)


def test_adalora_of_no_rank_left_is_not_fused() -> None:
    stock, fused = pair(adalora_mlp())
    for model in (stock, fused):
        pattern = {"up.lora_E": [False] * R, "down.lora_E": [True, False, True, False, True]}
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    first, second = explain(fused).rows
    assert first.state == PEFT and "'default': every rank was taken from it" in first.reason
    assert "rank" not in second.reason
    assert_close_derived(results(fused, batch()), results(stock, batch()))


def test_convolutions_stay_pefts_own() -> None:
    inner = nn.ModuleDict({"up": nn.Conv2d(3, 4, 3), "down": nn.Linear(4, 4)})
    fused = fuse(get_peft_model(inner, adalora_config()))
    assert explain(fused).rows[0].reason == "PEFT's SVDConv2d is not covered in this version"


# DoRA


@pytest.mark.parametrize("training", [True, False])
def test_dora_with_dropout_takes_the_base_GEMM_twice(training: bool) -> None:
    fused = fuse(dora_mlp(lora_dropout=0.3).train(training))
    want = {"lora_linear": 4 if training else 2, "dora_norm": 2}
    assert count_ops(lambda: fused(batch())) == want
    for row in explain(fused).rows:
        assert (row.state, row.backend) == (LIBRARY, "eager")  # as float64 always is


@needs_native
@torch.no_grad()
def test_norm_of_a_dora_is_kept_while_nothing_changes() -> None:
    """test_layer_kinds.py and test_stale_values.py change each of its operands."""
    fused = fuse(dora_mlp()).eval()
    norms = []
    for _ in range(2):
        fused(batch())
        norms.append(up(fused).__dict__["_norm"]._entry[2])
    assert norms[0] is norms[1]


# Embeddings


K, N = SIZES[1], SIZES[0]
REASON = "an embedding: its base is a lookup, no GEMM to fuse the adapter's with"
STRATEGY = "lookups, then one GEMM in place"
FUSED = Row("base_model.model.tokens", LIBRARY, "torch", STRATEGY, REASON)


def tokens_of(model: Any) -> Any:
    return model.base_model.model.tokens


@pytest.mark.parametrize("autocast", [None, bf16])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f32, bf16)]
)
def test_embedding_s_dtypes_and_rounding_are_pefts(dtype, adapter_dtype, autocast) -> None:
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
def test_embedding_of_an_index_out_of_range_raises(x: Tensor) -> None:
    with pytest.raises(IndexError, match="index out of range in self"):
        fuse(embedding_model())(x)


def test_embedding_of_a_mixed_batch_takes_peft_s_path_and_says_so() -> None:
    stock, fused = pair(two_adapters(embedding_model(), use_rslora=True).eval())
    names = ["second", "__base__", "default"]
    for model in (stock, fused):
        model.base_model.set_adapter(["default"])
    want = stock(token_ids(3, 7), adapter_names=names)
    assert torch.equal(fused(token_ids(3, 7), adapter_names=names), want)
    assert "adapter_names" in explain(fused).rows[0].reason
    assert_close_derived(fused(token_ids(3, 7)), stock(token_ids(3, 7)))
    assert explain(fused).rows == [FUSED]


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_with_embeddings_equals_peft(tied: bool) -> None:
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
