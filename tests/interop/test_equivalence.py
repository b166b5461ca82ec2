"""A fused model computes what PEFT's does: configurations, dtypes, dropout, language models.

Properties of every kind of layer are in test_layer_kinds.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lora_kernels.bench import tolerance
from lora_kernels.finetune.model import quantize
from lora_kernels.peft import explain, fuse
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
    assert_close_to_reference,
)
from tests.support.peft_models import (
    IDS,
    SIZES,
    TINY,
    adalora_mlp,
    add_adapter,
    add_lora,
    batch,
    count_ops,
    fused_layers,
    llama,
    loss_and_gradients,
    mlp,
    pair,
    randomize,
    results,
)

# Of a lora_bias beside a base without one, which cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True")
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


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
    [(mlp, {"lora_bias": True}, 1), (adalora_mlp, {}, 52)],  # 256 elements of E's gradient
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
        # Products with the base weight round to the compute dtype, the parameters' gradients
        # are float32 until they take their own.
        return tolerance.unit_roundoff(dtype, *[want["y"].dtype] * (name in ("x", "y")))

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
    assert down.state == "not fused" and "no active adapter" in down.reason


# Language models


def language_model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    qwen2 = name == "qwen2"  # with biases in q, k and v
    base = Qwen2ForCausalLM(Qwen2Config(**TINY)).double() if qwen2 else llama()
    return add_lora(base, target_modules="all-linear", **config)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_the_masks(use_reentrant: bool) -> None:
    fused = fuse(language_model("llama", lora_dropout=0.1)).train()
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
    stock, fused = pair(language_model("llama").eval())
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
