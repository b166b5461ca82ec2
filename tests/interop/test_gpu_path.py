"""Fused layers on the path that a GPU takes, on CPU tensors, beside PEFT's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends import decode4bit, eager
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.core.call import Operands
from lora_kernels.peft import FusedLinear, explain, fuse, traffic, unfuse
from lora_kernels.traffic import _NativeDropout
from tests.support.assertions import assert_bitwise_equal, assert_close_derived

K, N, R, ALPHA = 320, 192, 5, 7
f32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def gpu_path() -> Iterator[None]:
    traffic._counted.clear()
    before = dict(decode4bit.bitsandbytes_reasons)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield
    decode4bit.bitsandbytes_reasons.clear()
    decode4bit.bitsandbytes_reasons.update(before)


def model(quantized: bool = False, second: dict[str, Any] | None = None, **config: Any) -> Any:
    """One PEFT layer, its adapters as if trained. second: the config of another active one."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N))
    if quantized:
        bnb = pytest.importorskip("bitsandbytes").nn
        linear = bnb.Linear4bit(K, N, bias=False, compute_dtype=f32, quant_type="nf4")
        linear.weight = bnb.Params4bit(base[0].weight.data, False, quant_type="nf4")
        base = nn.Sequential(linear.to("cpu"))
        base.is_loaded_in_4bit = True
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["0"]} | config
    found = get_peft_model(base, LoraConfig(**config))
    if second is not None:
        found.add_adapter("second", LoraConfig(**config | second))
        found.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape))
    return found.train()


def results(found: Any, M: int) -> dict[str, Tensor]:
    """y, dx and the adapters' gradients of one step, the same draws of dropout each time."""
    torch.manual_seed(1)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    named = {n: p for n, p in found.named_parameters() if p.requires_grad}
    with _NativeDropout():  # CUDA's: PEFT's masks are then those of the same kernel
        y = found(x)
    grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(named, grads[1:], strict=True))}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "two": {"second": {}},
    "two of another scaling": {"second": {"lora_alpha": 3, "r": 9}},
    "two of another dropout": {"second": {"lora_dropout": 0.6}, "lora_dropout": 0.3},
    "one of two with dropout": {"second": {"lora_dropout": 0.6}},
    "two with dropout": {"second": {"r": 9}, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("M", [3, 100])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_fused_step_equals_peft_with_its_dropout(setting: str, quantized: bool, M: int) -> None:
    """In float32, the masks too: both draw them by one kernel from one generator."""
    found = model(quantized, **copy.deepcopy(SETTINGS[setting]))
    want = results(found, M)
    fuse(found)
    assert "Fused" in type(found.base_model.model[0]).__name__
    assert_close_derived(results(found, M), want, terms=K, layers=2)  # DoRA's norm is a sum too


@pytest.mark.parametrize("rows", [(3,), (100,), (2, 50)], ids=str)
def test_stacking_depends_on_the_rows(rows, monkeypatch) -> None:
    called: list[int] = []
    original = eager.lora_linear

    def counting(operands: Operands, *rest: Any) -> Any:
        called.append(operands.lora_A.shape[0])
        return original(operands, *rest)

    found = fuse(model(second={"r": 9}))
    monkeypatch.setattr(eager, "lora_linear", counting)
    found(torch.randn(*rows, K))
    M = math.prod(rows)
    assert called == ([R, 9] if M == 3 else [R + 9])
    row = explain(found, rows=M).rows[0]
    assert ("2 calls" in row.strategy) == (M == 3)
    assert ("stacking adapters would copy them" in row.reason) == (M == 3)


@pytest.mark.parametrize(
    ("wasteful", "said"),
    [
        ("_expand", "its forward with 1 row of x would move"),
        ("_gradient_A", "its training step with 1 row of x"),  # the backward counts too
    ],
)
def test_fuse_leaves_a_layer_that_would_move_more(
    wasteful: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(eager, wasteful)

    def copying(first: Tensor, second: Any, third: Tensor, *rest: Any, **options: Any) -> Tensor:
        for _ in range(20):
            third.double()
        return original(first, second, third, *rest, **options)

    monkeypatch.setattr(eager, wasteful, copying)
    found = fuse(model())
    assert type(found.base_model.model[0]) is not FusedLinear
    row = explain(found).rows[0]
    assert row.backend == "peft" and said in row.reason
    assert row.reason.count(". ") == 0  # one sentence


@pytest.mark.parametrize("training", [True, False])
def test_fuse_counts_dropout_whatever_the_mode(training: bool) -> None:
    """A DoRA with dropout and few columns moves more as ours: also if fused in eval mode."""
    base = nn.Sequential(nn.Linear(1024, 128, bias=False, dtype=bf16))
    config = LoraConfig(r=R, lora_dropout=0.1, use_dora=True, target_modules=["0"])
    found = get_peft_model(base, config, autocast_adapter_dtype=False).to(bf16).train(training)
    row = explain(fuse(found)).rows[0]
    assert row.backend == "peft" and "rows of x would move" in row.reason


def test_explain_of_equal_layers_prints_one_line() -> None:
    base = nn.Sequential(*(nn.Linear(K, K) for _ in range(30)))
    targets = [str(i) for i in range(30)]
    found = fuse(get_peft_model(base, LoraConfig(r=R, target_modules=targets)))
    _, line, _ = str(explain(found)).splitlines()
    assert line.startswith("30 × base_model.model.*  ")
    assert len(str(explain(found, all=True)).splitlines()) == 32


def test_what_decides_the_traffic_is_told_apart() -> None:
    """No layer reuses the count of a different one."""
    changes = ({"lora_dropout": 0.1}, {"r": R + 1}, {"use_dora": True}, {"lora_bias": True})
    found = [model(), *(model(**change) for change in changes), model(second={}), model().to(bf16)]
    keys = [traffic._signature(each.base_model.model[0]) for each in found]
    assert len(set(keys)) == len(keys)
    assert keys[0] == traffic._signature(model().base_model.model[0])


def test_parameters_of_another_kind_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2's, for one: what lies on the card is not known before the forward."""

    class Sharded(nn.Parameter):
        pass

    monkeypatch.setattr(traffic, "_count", lambda *args: pytest.fail("counted"))
    layer = model().base_model.model[0]
    layer.get_base_layer().weight = Sharded(torch.zeros(N, K), requires_grad=False)
    assert traffic.excess(layer, FusedLinear) is None


def test_fuse_leaves_a_layer_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Any, rows: int) -> tuple[int, int]:
        raise RuntimeError("no such op\nand more")

    monkeypatch.setattr(traffic, "_count", broken)
    row = explain(fuse(model())).rows[0]
    assert row.backend == "peft"
    assert row.reason == "its memory traffic could not be counted: RuntimeError: no such op"


def test_counted_once_for_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = traffic._count
    monkeypatch.setattr(traffic, "_count", lambda layer, M: counted.append(M) or original(layer, M))
    layers = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K), nn.Linear(K, N))
    found = get_peft_model(layers, LoraConfig(r=R, target_modules=["0", "1", "2"]))
    fuse(found)
    explain(found)
    assert len(counted) == 2 * 2 * len(traffic.ROWS)  # two kinds, PEFT's and ours
    assert all(p.device.type == "cpu" for p in found.parameters())


def test_counting_leaves_the_layer_and_its_weight_alone() -> None:
    found = model(quantized=True)
    layer = found.base_model.model[0]
    before = {name: p.clone() for name, p in found.named_parameters()}
    training, state = layer.training, layer.get_base_layer().weight.quant_state
    fuse(found)
    assert layer.training is training and layer.get_base_layer().weight.quant_state is state
    assert_bitwise_equal(dict(found.named_parameters()), before)
    unfuse(found)


def _raise(*args: Any) -> Tensor:
    raise RuntimeError("no kernel image")


def _off(self: Any, found: Tensor) -> Tensor:
    return found * (1 + 2**-6)


BREAKAGES: dict[str, tuple[str, Callable[..., Any], str]] = {
    "dense": ("dense", _off, "dequantize_4bit of nf4 differs from the reference"),
    "dense with nested scales": (
        "dense",
        lambda self, found: found if self.offset is None else _off(self, found),
        "dequantize_4bit of nf4 differs from the reference",
    ),
    "dense of fp4": (
        "dense",
        lambda self, found: _off(self, found) if self.quant_type == "fp4" else found,
        "dequantize_4bit of fp4 differs from the reference",
    ),
    "GEMM": (
        "gemm",
        lambda self, found: found * 1.25,
        "gemm_4bit of nf4 differs from the reference",
    ),
    "an exception": ("dense", _raise, "raised RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_bitsandbytes_that_fails_its_check_is_not_used(breakage, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    if breakage == "GEMM" and not decode4bit.has_gemm_4bit():
        pytest.skip("bitsandbytes is older than 0.50, without gemm_4bit")
    from lora_kernels.quantization import bitsandbytes

    name, broken, said = BREAKAGES[breakage]
    name = f"bitsandbytes_{name}"
    original = getattr(decode4bit, name)
    found = model(quantized=True)
    want = results(found, 5)
    for module in (decode4bit, bitsandbytes):  # which imports the function
        monkeypatch.setattr(module, name, lambda w, *args: broken(w, original(w, *args)))
    decode4bit.bitsandbytes_reasons.clear()
    fuse(found)
    reason = explain(found).rows[0].reason
    assert "PyTorch decodes in three kernels: bitsandbytes " in reason and said in reason
    assert_close_derived(results(found, 5), want, terms=K, layers=1)


def test_fuse_takes_a_layer_without_active_adapters_uncounted() -> None:
    """Such a layer computes the base alone, in both."""
    found = model()
    found.base_model.model[0]._active_adapter = []
    fuse(found)
    assert type(found.base_model.model[0]) is FusedLinear
    assert "could not be counted" not in explain(found).rows[0].reason


def test_explain_says_what_decodes() -> None:
    pytest.importorskip("bitsandbytes")
    decode4bit.bitsandbytes_reasons.clear()
    reason = explain(fuse(model(quantized=True))).rows[0].reason
    assert reason.endswith("bitsandbytes decodes")
