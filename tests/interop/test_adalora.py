"""PEFT's AdaLoRA, fused: dtypes, dropout, its budget over a training, bases, reasons.

What holds of every kind of layer is in test_layer_kinds.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_kernels.measure import tolerance
from lora_kernels.peft import FusedSVDLinear, explain, fuse, unfuse
from lora_kernels.peft.linear import Fused
from lora_kernels.quantization import Weight4bit
from tests.support.assertions import assert_close_derived, assert_close_to_reference, derived_rtol
from tests.support.peft_models import (
    ALPHA,
    IDS,
    MLP,
    SIZES,
    Masked,
    R,
    adalora_config,
    adalora_mlp,
    assert_same_files,
    assert_trains_alike,
    batch,
    conv1d,
    count_ops,
    draw_rng,
    llama,
    pair,
    randomize,
    results,
    set_masks,
    train,
    two_adapters,
)

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def up(model: Any) -> Any:
    return model.base_model.model.up


# What it computes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"init_r": 1, "target_r": 1}, {"lora_alpha": -1}], ids=str)
def test_outputs_and_gradients(kwargs: dict[str, Any], training: bool) -> None:
    stock, fused = (model.train(training) for model in pair(adalora_mlp(**kwargs)))
    assert type(up(fused)) is FusedSVDLinear
    got = results(fused, batch())
    for kind in ("lora_A", "lora_B", "lora_E"):
        assert sum(f".{kind}." in name for name in got) == 2
    assert_close_derived(got, results(stock, batch()))


@pytest.mark.parametrize(
    ("x_dtype", "base_dtype", "adapter_dtype", "autocast"),
    [
        (f32, f32, f32, None),
        (bf16, bf16, bf16, None),
        (bf16, bf16, f32, None),  # what PEFT makes of such a base
        (f16, f16, f32, None),
        (f32, bf16, f32, bf16),
        (bf16, f32, f32, bf16),
    ],
)
def test_dtypes_and_rounding_are_pefts(x_dtype, base_dtype, adapter_dtype, autocast) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    pools: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for seed in range(52):  # 256 elements of E's gradient
        layer = up(adalora_mlp(base_dtype))
        randomize(layer, "default", seed)
        layer.ranknum.requires_grad_(False)  # which PEFT trains, one element of it
        for name, param in layer.named_parameters():
            if name.startswith(("lora_", "ranknum")):
                param.data = param.data.to(adapter_dtype)
        exact = copy.deepcopy(layer).double()
        stock, fused = pair(nn.ModuleDict({"up": layer}))
        x = torch.randn(64, SIZES[0], generator=torch.Generator().manual_seed(seed)).to(x_dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            got, want = results(fused["up"], x), results(stock["up"], x)
        for pool, found in zip(pools, (got, results(exact, x.double()), want), strict=True):
            for name, t in found.items():
                pool.setdefault(name, []).append(t)
        assert {name: t.dtype for name, t in got.items()} == {n: t.dtype for n, t in want.items()}

    def roundoff(name: str, dtype: torch.dtype) -> float:
        return tolerance.unit_roundoff(dtype, *[want["y"].dtype] * (name in ("x", "y")))

    assert_close_to_reference(*pools, roundoff)


def test_each_adapter_draws_a_mask_of_its_own() -> None:
    stock, fused = pair(two_adapters(adalora_mlp(lora_dropout=0.3), lora_dropout=0.5).train())
    torch.manual_seed(4)
    got = results(fused, batch())
    set_masks(stock, {"default": 0.3, "second": 0.5}, seed=4)
    assert_close_derived(got, results(stock, batch()))
    assert count_ops(lambda: up(fused)(batch())) == {"lora_linear": 2}
    assert "2 calls" in explain(fused).rows[0].strategy
    assert count_ops(lambda: up(fused.eval())(batch())) == {"lora_linear": 1}


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
    # Twelve steps, each of which takes the difference of the last one on.
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


def test_no_rank_left() -> None:
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


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return scale * super().forward(x)


@pytest.mark.parametrize("change", ["hook", "subclass", "argument"])
def test_base_called_as_a_module(change: str) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        inner = MLP()
        if change != "hook":
            inner.up = Scaled(*SIZES[:2])
        model = adalora_mlp(base=inner)
        if change == "hook":
            up(model).base_layer.register_forward_hook(lambda module, args, out: out * 1.5)
        return model

    stock, fused = made(), fuse(made())
    args = (3.0,) if change == "argument" else ()
    assert_close_derived(results(up(fused), batch(), *args), results(up(stock), batch(), *args))
    row = explain(fused).rows[0]
    assert row.state == "adapter only" and row.reason.startswith("base layer: ")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("autocast", [None, bf16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_4bit_base(dropout: float, autocast: torch.dtype | None, loaded: bool) -> None:
    """Against the formula in float64 on the decoded weight."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    K, N = 64, 192
    inner = MLP()
    inner.up = bnb.nn.Linear4bit(K, N, bias=True, compute_dtype=f32, quant_type="nf4").to("cpu")
    inner.is_loaded_in_4bit = loaded
    model = adalora_mlp(f32, inner, target_modules=["up"], lora_dropout=dropout)
    kind = type(up(model))
    assert kind.__name__ == ("SVDLinear4bit" if loaded else "SVDLinear")
    layer = up(fuse(model.train()))
    assert type(layer).__name__ == f"Fused{kind.__name__}"
    tensors = [getattr(layer, name)["default"] for name in ("lora_A", "lora_B", "lora_E")]
    x, dy = torch.randn(9, K, requires_grad=True), torch.randn(9, N)
    torch.manual_seed(3)
    with torch.autocast("cpu", bf16, enabled=autocast is not None):
        state = explain(model).rows[0].state
        y = layer(x)
    assert y.dtype is f32 and state == "fused"
    got = (y, *torch.autograd.grad(y, [x, *tensors], dy))

    weight = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32).double()
    torch.manual_seed(3)
    mask = Masked(draw_rng(), dropout) if dropout else nn.Identity()
    wide = [t.detach().double().requires_grad_() for t in (x, *tensors)]
    update = (mask(wide[0]) @ (wide[1] * wide[3]).T @ wide[2].T) * ALPHA / (R + 1e-5)
    ref = wide[0] @ weight.T + layer.base_layer.bias.detach().double() + update
    want = (ref, *torch.autograd.grad(ref, wide, dy.double()))
    # Float32 sums of at most 192 terms; under autocast x, W and y are rounded to 8 bits each.
    rtol = derived_rtol(f32, terms=192, layers=1) if autocast is None else 2.0**-7
    assert_close_derived([t.double() for t in got], want, rtol)
    if not autocast:
        unfuse(model)
        assert type(up(model)) is kind
        assert_close_derived(up(model).eval()(x), layer(x))


# When it is left to PEFT


def test_trainable_base_is_left_to_peft() -> None:
    stock, fused = pair(two_adapters(adalora_mlp()).eval())
    for model in (stock, fused):
        up(model).base_layer.weight.requires_grad_()
    assert explain(fused).rows[0].reason == "the base weight is trainable"
    assert_close_derived(results(fused, batch()), results(stock, batch()))
    want = stock(batch())
    merged = fused.merge_and_unload()
    assert type(merged.up) is nn.Linear
    assert_close_derived(merged(batch()), want)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("dropout", "adapter 'default': its dropout is a AlphaDropout"),
        ("float64", "adapter 'default': float64 goes with float64 alone"),
        ("ranknum", "adapter 'default': its ranknum is on meta"),
        ("forward", "its forward was replaced"),
    ],
)
def test_left_to_peft(change: str, reason: str) -> None:
    stock, fused = pair(adalora_mlp().eval())
    for model in (stock, fused):
        layer = up(model)
        if change == "dropout":
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()
        elif change == "float64":
            for name in ("lora_A", "lora_B", "lora_E"):
                getattr(layer, name).float()
        elif change == "ranknum":
            layer.ranknum.to("meta")
        else:
            layer.forward = lambda x: x @ torch.ones(SIZES[0], SIZES[1], dtype=f64)
    row = explain(fused).rows[0]
    assert (row.state, row.backend) == ("not fused", "peft") and reason in row.reason
    if change in ("dropout", "forward"):  # the others PEFT cannot compute either
        assert_close_derived(results(fused, batch()), results(stock, batch()))


def test_convolutions_stay_pefts_own() -> None:
    inner = nn.ModuleDict({"up": nn.Conv2d(3, 4, 3), "down": nn.Linear(4, 4)})
    fused = fuse(get_peft_model(inner, adalora_config()))
    assert explain(fused).rows[0].reason == "PEFT's SVDConv2d is not covered in this version"
