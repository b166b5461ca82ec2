"""PEFT's AdaLoRA, fused: outputs, each gradient, its budget over a training, files, reasons."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_kernels import selection
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.measure import tolerance
from lora_kernels.peft import FusedSVDLinear, explain, fuse, unfuse
from lora_kernels.peft.linear import Fused
from lora_kernels.quantization import Weight4bit

from .test_equivalence import IDS, TINY, Masked, draw_rng, rename
from .tiny import MLP, SIZES, assert_same, batch, count_ops, pair, randomize, results

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
R, ALPHA = 5, 7


def config(**kwargs: Any) -> AdaLoraConfig:
    settings = {
        "init_r": R, "target_r": 2, "lora_alpha": ALPHA, "target_modules": ["up", "down"],
        "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2,
    }  # fmt: skip
    return AdaLoraConfig(**{**settings, **kwargs})


def adalora(dtype: torch.dtype = f64, **kwargs: Any) -> Any:
    """With E, A and B random, as if they had been trained."""
    torch.manual_seed(0)
    model = get_peft_model(MLP().to(dtype), config(**kwargs))
    randomize(model, "default")
    return model


def two_adapters(**kwargs: Any) -> Any:
    """Both active, of different ranks and scalings; AdaLoRA trains one of them at most."""
    model = adalora(**kwargs)
    model.add_adapter("second", config(init_r=3, lora_alpha=4, inference_mode=True))
    randomize(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    return model


def up(model: Any) -> Any:
    return model.base_model.model.up


# What it computes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"init_r": 1, "target_r": 1}, {"lora_alpha": -1}], ids=str)
def test_outputs_and_gradients(kwargs: dict[str, Any], training: bool) -> None:
    stock, fused = (model.train(training) for model in pair(adalora(**kwargs)))
    assert type(up(fused)) is FusedSVDLinear
    got = results(fused, batch())
    for kind in ("lora_A", "lora_B", "lora_E"):
        assert sum(f".{kind}." in name for name in got) == 2
    assert_same(got, results(stock, batch()))


@pytest.mark.parametrize("shape", [(SIZES[0],), (0, SIZES[0]), (1, SIZES[0]), (2, 2, 3, SIZES[0])])
def test_shapes(shape: tuple[int, ...]) -> None:
    stock, fused = pair(adalora())
    x = torch.randn(shape, dtype=f64)
    assert_same(results(fused, x), results(stock, x))


@pytest.mark.parametrize("grad", [True, False])
def test_one_op_and_no_other_product(grad: bool) -> None:
    _, fused = pair(two_adapters())
    x = batch().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert count_ops(lambda: up(fused)(x)) == {"lora_linear": 1}
    if grad:
        y = up(fused)(x)
        assert count_ops(lambda: y.sum().backward()) == {"lora_linear_backward": 1}


def test_fused_in_float32() -> None:
    stock, fused = (model.float() for model in pair(two_adapters()))
    explain(fused).assert_fused()
    assert "adapters stacked along the rank" in explain(fused).rows[0].reason
    # Sums of at most 41 terms through two layers and back, in two orders: under 2⁶ roundoffs.
    assert_same(results(fused, batch(f32)), results(stock, batch(f32)), rtol=2.0**-18)


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
def test_dtypes_and_rounding(
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    pooled: dict[str, list[list[Tensor]]] = {}
    for seed in range(52):  # 256 elements of E's gradient
        layer = up(adalora(base_dtype))
        randomize(layer, "default", seed)
        layer.ranknum.requires_grad_(False)  # which PEFT trains, one element of it
        for name, param in layer.named_parameters():
            if name.startswith(("lora_", "ranknum")):
                param.data = param.data.to(adapter_dtype)
        exact = copy.deepcopy(layer).double()
        stock, fused = pair(nn.ModuleDict({"up": layer}))
        x = torch.randn(64, SIZES[0], generator=torch.Generator().manual_seed(seed)).to(x_dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            want, got = results(stock["up"], x), results(fused["up"], x)
        ref = results(exact, x.double())
        assert got.keys() == want.keys() == ref.keys()
        for name in want:
            assert got[name].dtype is want[name].dtype, name
            sets = pooled.setdefault(name, [[], [], []])
            for kept, one in zip(sets, (got, ref, want), strict=True):
                kept.append(one[name])
    for name, (gots, refs, eagers) in pooled.items():
        dtypes = {gots[0].dtype} | ({want["y"].dtype} if name in ("x", "y") else set())
        u = tolerance.unit_roundoff(*dtypes)
        tolerance.assert_close(gots, refs, eagers, u, name)


def test_each_adapter_draws_a_mask_of_its_own() -> None:
    """PEFT's masks and ours differ, so PEFT's layer is given ours."""
    model = adalora(lora_dropout=0.3)
    model.add_adapter("second", config(init_r=3, lora_dropout=0.5, inference_mode=True))
    randomize(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    stock, fused = pair(model.train())
    torch.manual_seed(4)
    got = results(fused, batch())
    torch.manual_seed(4)
    for layer in (stock.base_model.model.up, stock.base_model.model.down):
        layer.lora_dropout["default"] = Masked(draw_rng(), 0.3)
        layer.lora_dropout["second"] = Masked(draw_rng(), 0.5)
    assert_same(got, results(stock, batch()))
    assert count_ops(lambda: up(fused)(batch())) == {"lora_linear": 2}
    assert "2 calls" in explain(fused).rows[0].strategy
    assert count_ops(lambda: up(fused.eval())(batch())) == {"lora_linear": 1}


def test_scaling_as_a_tensor() -> None:
    stock, fused = pair(adalora())
    up(fused).scaling["default"] = torch.tensor(7.0, dtype=f64)
    assert_same(results(fused, batch()), results(stock, batch()))


# A training


def language_model(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).double()
    model = get_peft_model(model, config(target_modules=["q_proj", "down_proj"], **kwargs))
    randomize(model, "default")
    return model


def train(model: Any, steps: int, lr: float = 0.05) -> list[dict[str, Tensor]]:
    """The loss, with its orthogonality, each gradient, and each parameter, of each step."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, seen = torch.optim.SGD(parameters.values(), lr=lr), []
    for step in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        named = {f"{n}.grad": p.grad.clone() for n, p in parameters.items()}
        named["loss"] = loss.detach()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        seen.append(named | {n: p.detach().clone() for n, p in parameters.items()})
    return seen


def test_the_budget_falls_as_in_the_unfused_model() -> None:
    """Through warmup, the cubic fall, the last allocation and the steps after it."""
    stock, fused = pair(language_model())
    assert sum(isinstance(m, Fused) for m in fused.modules()) == 4
    kept = []
    for got, want in zip(train(fused, 12), train(stock, 12), strict=True):
        # Twelve steps, each of which takes the difference of the last one on.
        assert_same(got, want, rtol=2.0**-30)
        kept.append(sum(int(t.count_nonzero()) for n, t in got.items() if n.endswith("E.default")))
    pattern = fused.peft_config["default"].rank_pattern
    assert pattern == stock.peft_config["default"].rank_pattern
    assert kept[0] == 4 * R and kept[-1] == 4 * 2 and 4 * 2 < kept[4] < 4 * R


def test_saved_with_its_ranks_and_loaded(tmp_path: Path) -> None:
    stock, fused = pair(language_model())
    for name, model in (("stock", stock), ("fused", fused)):
        assert list(model.state_dict()) == list(stock.state_dict())
        model.save_pretrained(tmp_path / name)
        train(model, 12)
        model.save_pretrained(tmp_path / f"{name}-trained")
    bits = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("stock", "fused")]
    assert bits[0] == bits[1]

    stock, fused = (
        PeftModel.from_pretrained(language_model().unload(), tmp_path / f"{name}-trained")
        for name in ("stock", "fused")
    )
    ranks = [m.r["default"] for m in fuse(fused).modules() if isinstance(m, FusedSVDLinear)]
    assert sum(ranks) == 4 * 2 and len(set(ranks)) > 1
    # Of PEFT's two, since ranknum, which it trains, it does not save.
    torch.testing.assert_close(fused(input_ids=IDS).logits, stock(input_ids=IDS).logits)


def test_no_rank_left() -> None:
    stock, fused = pair(adalora())
    for model in (stock, fused):
        pattern = {"up.lora_E": [False] * R, "down.lora_E": [True, False, True, False, True]}
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    first, second = explain(fused).rows
    assert first.state == "not fused" and "'default': every rank was taken from it" in first.reason
    assert "rank" not in second.reason
    assert_same(results(fused, batch()), results(stock, batch()))


# Bases


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_conv1d() -> None:
    torch.manual_seed(0)
    base = MLP()
    base.up, base.down = Conv1D(SIZES[1], SIZES[0]), Conv1D(SIZES[2], SIZES[1])  # type: ignore[assignment]
    nn.init.normal_(base.up.bias)
    model = get_peft_model(base.double(), config(fan_in_fan_out=True))
    randomize(model, "default")
    stock, fused = pair(model)
    assert_same(results(fused, batch()), results(stock, batch()))
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
        model = get_peft_model(inner.double(), config())
        randomize(model, "default")
        if change == "hook":
            up(model).base_layer.register_forward_hook(lambda module, args, out: out * 1.5)
        return model

    stock, fused = made(), fuse(made())
    args = (3.0,) if change == "argument" else ()
    assert_same(results(up(fused), batch(), *args), results(up(stock), batch(), *args))
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
    inner.is_loaded_in_4bit = loaded  # type: ignore[assignment]
    model = get_peft_model(inner, config(target_modules=["up"], lora_dropout=dropout))
    randomize(model, "default")
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
    rtol = 2.0**-18 if autocast is None else 2.0**-7
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= rtol * b.norm()
    if not autocast:
        unfuse(model)
        assert type(up(model)) is kind
        torch.testing.assert_close(up(model).eval()(x), layer(x))


# When it is left to PEFT, and PEFT's life


def test_merge_disable_and_trainable_base() -> None:
    stock, fused = pair(two_adapters().eval())
    want = stock(batch())
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(batch()), stock(batch()))
        assert all("disabled" in row.reason for row in explain(fused).rows)
    for model in (stock, fused):
        model.merge_adapter()
    assert torch.equal(fused(batch()), stock(batch()))
    assert all("merged" in row.reason for row in explain(fused).rows)
    for model in (stock, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(fused(batch()), want)
    for model in (stock, fused):
        up(model).base_layer.weight.requires_grad_()
    assert explain(fused).rows[0].reason == "the base weight is trainable"
    assert_same(results(fused, batch()), results(stock, batch()))
    merged = fused.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(batch()), want)


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
    stock, fused = pair(adalora().eval())
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
        assert_same(results(fused, batch()), results(stock, batch()))


def test_convolutions_stay_pefts_own() -> None:
    inner = nn.ModuleDict({"up": nn.Conv2d(3, 4, 3), "down": nn.Linear(4, 4)})
    fused = fuse(get_peft_model(inner, config()))
    assert explain(fused).rows[0].reason == "PEFT's SVDConv2d is not covered in this version"


def test_copies_and_unfuse() -> None:
    model = adalora().eval()
    before = [vars(up(model)).copy(), type(up(model))]
    want = model(batch())
    fuse(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(up(twin)) is FusedSVDLinear
        assert torch.equal(twin(batch()), model(batch()))
    unfuse(model)
    assert [vars(up(model)), type(up(model))] == before and torch.equal(model(batch()), want)


def test_switching_adapters() -> None:
    stock, fused = pair(two_adapters())
    for active in (["second"], ["default"]):
        for model in (stock, fused):
            model.base_model.set_adapter(active)
        assert_same(results(fused, batch()), results(stock, batch()))


def test_all_linear_targets_the_bases_of_fused_layers() -> None:
    stock, fused = pair(adalora())
    for model in (stock, fused):
        model.add_adapter("second", config(target_modules="all-linear", inference_mode=True))
    assert list(fused.state_dict()) == list(stock.state_dict())


def test_compiles_without_graph_break() -> None:
    stock, fused = pair(two_adapters())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (batch(), batch()[:2]):
        assert_same(results(compiled, x), rename(results(stock, x)))


@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
def test_explain_asks_for_the_choice_that_the_op_asks_for(
    adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fuse(two_adapters(dtype=f32))
    model.base_model.set_adapter(adapters)
    choose, asked = selection.choose, []

    def recorder(problem: Problem) -> Choice:
        asked.append(problem._replace(rows=None))  # which explain does not know
        return choose(problem)

    monkeypatch.setattr(selection, "choose", recorder)
    explain(model)
    by_explain = list(asked)
    asked.clear()
    up(model)(batch(f32)), model.base_model.model.down(torch.ones(2, SIZES[1]))
    assert by_explain == asked and len(asked) == 2
