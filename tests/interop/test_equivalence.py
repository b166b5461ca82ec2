"""A fused model computes what PEFT's does: outputs, each gradient, updates, dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lora_kernels
from lora_kernels.finetune.model import quantize
from lora_kernels.measure import tolerance
from lora_kernels.peft import explain, fuse

from .tiny import (
    IDS,
    SIZES,
    TINY,
    add_lora,
    assert_same,
    batch,
    count_ops,
    fused_layers,
    mlp,
    pair,
    randomize,
    results,
)

# Of a lora_bias beside a base without one, which cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True")


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}, {"r": 1}, {"r": 300}],
    ids=str,
)
def test_outputs_and_gradients(config: dict[str, Any]) -> None:
    stock, fused = pair(mlp(**config))
    assert len(fused_layers(fused)) == 2
    assert_same(results(fused, batch()), results(stock, batch()))


@pytest.mark.parametrize("shape", [(SIZES[0],), (0, SIZES[0]), (1, SIZES[0]), (2, 2, 3, SIZES[0])])
def test_shapes(shape: tuple[int, ...]) -> None:
    stock, fused = pair(mlp())
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(results(fused, x), results(stock, x))


def test_strided_input() -> None:
    stock, fused = pair(mlp())
    x = batch().transpose(0, 1)[:, ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize(
    ("x_dtype", "base_dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16, torch.float32, None),  # what PEFT makes of such a base
        (torch.float16, torch.float16, torch.float32, None),
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_dtypes_and_rounding(
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    """dtypes are PEFT's, and the layer loses little more than PEFT's does (see tolerance)."""
    layer = mlp(base_dtype, lora_bias=True).base_model.model.up
    for module in (layer.lora_A, layer.lora_B):
        module.to(adapter_dtype)
    exact = copy.deepcopy(layer).double()
    stock, fused = pair(layer)
    x = torch.randn(64, SIZES[0], generator=torch.Generator().manual_seed(3)).to(x_dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        want, got = results(stock, x), results(fused, x)
    ref = results(exact, x.double())
    assert got.keys() == want.keys() == ref.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        # Products with the base weight round to the compute dtype, the parameters' gradients
        # are float32 until they take their own.
        dtypes = {got[name].dtype} | ({want["y"].dtype} if name in ("x", "y") else set())
        tolerance.assert_close(
            got[name], ref[name], want[name], tolerance.unit_roundoff(*dtypes), name
        )


def test_autocast_leaves_float64_alone() -> None:
    stock, fused = pair(mlp())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(fused, batch()), results(stock, batch()))


@pytest.mark.parametrize("grad", [True, False])
def test_one_op_and_no_other_product(grad: bool) -> None:
    """What "fused" means. (float64 runs on the eager backend, which is inside the op too.)"""
    _, fused = pair(mlp(lora_bias=True))
    up = fused.base_model.model.up
    x = batch().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert count_ops(lambda: up(x)) == {"lora_linear": 1}
    if grad:
        y = up(x)
        assert count_ops(lambda: y.sum().backward()) == {"lora_linear_backward": 1}


def test_op_counter_sees_the_products_of_stock_peft() -> None:
    stock, _ = pair(mlp())
    assert count_ops(lambda: stock.base_model.model.up(batch()[0])) == {"addmm": 1, "mm": 2}


def test_sgd_updates() -> None:
    stock, fused = pair(mlp())
    before = {name: p.detach().clone() for name, p in stock.named_parameters()}
    for model in (stock, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            (model(batch()) - step).square().mean().backward()
            optimizer.step()
    got, want = (
        {name: p.detach() - before[name] for name, p in model.named_parameters()}
        for model in (fused, stock)
    )
    assert any(update.norm() > 0.01 for update in want.values())
    assert_same(got, want)


# Dropout: PEFT's masks and ours differ, so PEFT's layer is given ours.


class Masked(nn.Module):
    """Dropout with the mask that `lora_linear` makes of this rng."""

    def __init__(self, rng: Tensor, p: float) -> None:
        super().__init__()
        self.rng, self.p = rng, p

    def forward(self, x: Tensor) -> Tensor:
        M, K = x.numel() // x.shape[-1], x.shape[-1]
        mask = lora_kernels.dropout_mask(self.rng, M, K, self.p)
        return x * mask.view(x.shape) / (1 - self.p)


def draw_rng() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)


def test_dropout_in_training() -> None:
    stock, fused = pair(mlp(lora_dropout=0.3).train())
    torch.manual_seed(4)
    got = results(fused, batch())
    torch.manual_seed(4)
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        layer.lora_dropout["default"] = Masked(draw_rng(), 0.3)
    assert_same(got, results(stock, batch()))


def test_each_adapter_draws_a_mask_of_its_own() -> None:
    model = mlp(lora_dropout=0.3)
    for name, p in (("second", 0.5), ("third", 0.0)):
        with_dropout = copy.deepcopy(model.peft_config["default"])
        with_dropout.lora_dropout, with_dropout.r, with_dropout.lora_alpha = p, 3, 4
        model.add_adapter(name, with_dropout)
        randomize(model, name, seed=5)
    model.base_model.set_adapter(["default", "second", "third"])
    stock, fused = pair(model.train())
    torch.manual_seed(4)
    got = results(fused, batch())
    torch.manual_seed(4)
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        layer.lora_dropout["default"] = Masked(draw_rng(), 0.3)
        layer.lora_dropout["second"] = Masked(draw_rng(), 0.5)
    assert_same(got, results(stock, batch()))
    assert count_ops(lambda: fused.base_model.model.up(batch())) == {"lora_linear": 3}
    row = explain(fused.float()).rows[0]
    assert row.state in ("composed", "not fused")  # not fused: without native kernels
    assert "3 calls" in row.strategy and "a mask of its own" in row.reason


def test_eval_ignores_dropout() -> None:
    stock, fused = pair(mlp(lora_dropout=0.3).eval())
    assert_same(results(fused, batch()), results(stock, batch()))


# Several active adapters


def two_adapters(**config: Any) -> Any:
    model = mlp(**config)
    second = copy.deepcopy(model.peft_config["default"])
    second.r, second.lora_alpha = 3, 4
    model.add_adapter("second", second)
    randomize(model, "second", seed=5)
    return model


@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"lora_dropout": 0.3}], ids=str)
def test_active_adapters_share_one_op(config: dict[str, Any]) -> None:
    model = two_adapters(**config)
    model.base_model.set_adapter(["default", "second"])
    stock, fused = pair(model.eval())
    got, want = results(fused, batch()), results(stock, batch())
    assert_same(got, want)
    assert any("second" in name for name in got)
    assert count_ops(lambda: fused.base_model.model.up(batch())) == {"lora_linear": 1}
    assert "stacked along the rank" in explain(fused).rows[0].reason


def test_adapters_on_different_layers() -> None:
    model = mlp()
    other = copy.deepcopy(model.peft_config["default"])
    other.target_modules = {"up"}
    model.add_adapter("only_up", other)
    randomize(model, "only_up", seed=5)
    model.set_adapter("only_up")
    stock, fused = pair(model)
    assert_same(results(fused, batch()), results(stock, batch()))
    up, down = explain(fused.float()).rows
    assert "no active adapter" not in up.reason
    assert down.state == "not fused" and "no active adapter" in down.reason


def test_scaling_as_a_tensor() -> None:
    """What PEFT's prepare_model_for_compiled_hotswap leaves behind."""
    stock, fused = pair(mlp())
    for layer in fused_layers(fused):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert_same(results(fused, batch()), results(stock, batch()), rtol=2**-23)  # 7/5 in float32


# Language models


def language_model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model: nn.Module
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**TINY))  # with biases in q, k and v
    return add_lora(model.double(), target_modules="all-linear", **config)


def loss_and_gradients(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_language_model(name: str) -> None:
    stock, fused = pair(language_model(name))
    assert len(fused_layers(fused)) == 14
    assert_same(loss_and_gradients(fused), loss_and_gradients(stock))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_the_masks(use_reentrant: bool) -> None:
    fused = fuse(language_model("llama", lora_dropout=0.1)).train()
    torch.manual_seed(4)
    want = loss_and_gradients(fused)
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(4)
    got: dict[str, Tensor] = {}
    ops = count_ops(lambda: got.update(loss_and_gradients(fused)))
    assert ops["lora_linear"] == 2 * len(fused_layers(fused))  # each forward ran twice
    assert_same(got, want)


def test_generate() -> None:
    stock, fused = pair(language_model("llama").eval())
    want, got = (m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (stock, fused))
    assert torch.equal(got, want)


# torch.compile


@pytest.mark.parametrize("config", [{"lora_bias": True}, {"lora_dropout": 0.3}], ids=str)
def test_compiles_without_graph_break(config: dict[str, Any]) -> None:
    """And keeps up with what changes after: shapes, train and eval, active adapters."""
    model = two_adapters(**config)
    stock, fused = pair(model.eval())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (batch(), batch()[:2]):
        assert_same(results(compiled, x), rename(results(stock, x)))
    for m in (stock, fused):
        m.base_model.set_adapter(["default", "second"])
    assert_same(results(compiled, batch()), rename(results(stock, batch())))
    fused.train()
    if config.get("lora_dropout"):
        assert not torch.equal(compiled(batch()), compiled(batch()))


def rename(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n if n in ("x", "y") else f"_orig_mod.{n}": t for n, t in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_whole_language_model_compiles_without_graph_break(quant: str | None) -> None:
    """Forward and backward, for another length too, as if it were not compiled."""
    torch.compiler.reset()  # of what other tests compiled there may only be so much
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY | {"hidden_size": 64, "intermediate_size": 128}))
    if quant:
        pytest.importorskip("bitsandbytes")
        quantize(base, quant, torch.float32, torch.device("cpu"))
    fused = fuse(add_lora(base, target_modules="all-linear"))
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:, :5]):
        got, want = (loss_and_gradients(model, ids) for model in (compiled, fused))
        got = {name.removeprefix("_orig_mod."): t for name, t in got.items()}
        assert len(want) == 29
        # Compiled, the elementwise operations between the layers may be rounded otherwise.
        assert_same(got, want, 2.0**-15)
