"""Fused layers on the path that a GPU takes, on CPU tensors, beside PEFT's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels.backends import decoder, library
from lora_kernels.backends.cpu import native
from lora_kernels.backends.eager import blocks as eager_blocks
from lora_kernels.backends.eager import linear as eager
from lora_kernels.bench.counter import _NativeDropout
from lora_kernels.core.call import Operands
from lora_kernels.core.problem import Problem
from lora_kernels.peft import FusedLinear, direct, explain, fuse, swap
from lora_kernels.peft import linear as peft_linear
from lora_kernels.peft.explain_rows import ADAPTER
from lora_kernels.quantization import quantize_4bit
from tests.support.assertions import assert_as_exact, assert_close_derived
from tests.support.peft_models import in_float64

K, N, R, ALPHA = 320, 192, 5, 7
f32, bf16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("gpu_path")


def model(
    quantized: bool = False,
    second: dict[str, Any] | None = None,
    base: nn.Module | None = None,
    **config: Any,
) -> Any:
    """One PEFT layer, its adapters as if trained. second: the config of another active one."""
    torch.manual_seed(0)
    base = base or nn.Sequential(nn.Linear(K, N))
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
def test_fused_step_equals_peft_with_its_dropout(setting, quantized, M, monkeypatch) -> None:
    """In float32, the masks too: both draw them by one kernel from one generator."""
    found = model(quantized, **copy.deepcopy(SETTINGS[setting]))
    want = results(found, M)
    monkeypatch.setattr(swap, "heavier_reason", lambda layer: None)
    fuse(found)
    assert "Fused" in type(found.base_model.model[0]).__name__
    for _ in range(2):
        assert_close_derived(results(found, M), want, terms=K, layers=2)  # DoRA's norm is a sum too


DEVICE_HOOKS: dict[str, Callable[[], ModelHook]] = {
    "cpu": lambda: AlignDevicesHook("cpu"),
    "device": lambda: AlignDevicesHook(torch.device("cpu"), io_same_device=True),
    "none": lambda: AlignDevicesHook(),
    "sequence": lambda: SequentialHook(AlignDevicesHook("cpu"), AlignDevicesHook()),
}


def parts_of(layer: Any) -> dict[str, nn.Module]:
    names = ("lora_A", "lora_B", "lora_dropout")
    return {"base": layer.base_layer} | {name: getattr(layer, name)["default"] for name in names}


@pytest.mark.parametrize("M", [3, 100])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("hook", DEVICE_HOOKS)
def test_direct_call_under_device_hooks_that_move_nothing_equals_peft(
    hook: str, quantized: bool, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`device_map` puts one on each module. The call does not go the general way."""
    found = model(quantized)
    want = results(found, M)
    fuse(found)
    for part in parts_of(found.base_model.model[0]).values():
        add_hook_to_module(part, DEVICE_HOOKS[hook]())
    unread = mock.Mock(side_effect=AssertionError("read by the general way"))
    monkeypatch.setattr(peft_linear, "read_call", unread)
    assert_close_derived(results(found, M), want, terms=K, layers=2)


class Recording(ModelHook):
    """Doubles the result."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.calls += 1
        return 2 * output


class Doubling(AlignDevicesHook):
    """A device hook by its class's name alone."""

    calls = 0
    pre_forward, post_forward = Recording.pre_forward, Recording.post_forward


@pytest.mark.parametrize("part", ["base", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    ("hook", "wrap"),
    [
        (Recording(), lambda hook: hook),
        (Recording(), lambda hook: SequentialHook(AlignDevicesHook("cpu"), hook)),
        (Doubling("cpu"), lambda hook: hook),
    ],
    ids=["other", "sequence", "subclass"],
)
def test_other_hooks_of_accelerate_are_called(hook: Any, wrap: Any, part: str) -> None:
    stock = model()
    fused = fuse(copy.deepcopy(stock))
    for found in (stock, fused):
        add_hook_to_module(parts_of(found.base_model.model[0])[part], wrap(hook))
    want, hook.calls = results(stock, 100), 0
    assert_close_derived(results(fused, 100), want, terms=K, layers=2)
    assert hook.calls == 2


@pytest.mark.parametrize("part", ["base", "lora_A", "lora_B", "lora_dropout"])
def test_device_hook_that_may_act_is_no_common_state(part: str) -> None:
    layer = fuse(model()).base_model.model[0]
    module, hook = parts_of(layer)[part], AlignDevicesHook("cpu")
    add_hook_to_module(module, hook)
    assert direct.read(layer) is not None
    for name, value in {"execution_device": "meta", "offload": True, "no_grad": True}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hook, name, value)
            assert direct.read(layer) is None
    hook.execution_device = 0  # a GPU's number
    assert direct.read(layer) is None


def test_device_hook_moves_an_x_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fuse(model()).base_model.model[0]
    moved: list[nn.Module] = []
    pre_forward = AlignDevicesHook.pre_forward

    def spy(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(module)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", spy)
    parts = list(parts_of(layer).values())
    for part in parts:
        add_hook_to_module(part, AlignDevicesHook("meta"))
    assert direct.read(layer) is not None
    assert layer(torch.ones(100, K)).is_meta
    assert set(moved) == set(parts)


class Called(nn.Linear):
    """A base that is called as a module, as each subclass is."""


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "swapped": lambda x: x.view(3, 4, K).transpose(0, 1),
    "features first": lambda x: x.view(K, 3, 4).permute(1, 2, 0),
    "padded": lambda x: torch.nn.functional.pad(x, (2, 5))[:, 2:-5].unflatten(0, (3, 4)),
    "expanded": lambda x: x[:4].expand(3, 4, K),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("setting", [name for name in SETTINGS if "dropout" in name])
@pytest.mark.parametrize("base", ["dense", "nf4", "called"])
def test_dropout_of_a_strided_input_draws_peft_s_masks(base, setting, layout, monkeypatch) -> None:
    """PyTorch's kernel draws in the order of x's memory, whatever x's dimensions."""
    torch.manual_seed(1)
    x, dy = STRIDED[layout](torch.randn(12, K)).requires_grad_(), torch.randn(12, N)
    own_base = nn.Sequential(Called(K, N)) if base == "called" else None
    found = model(base == "nf4", base=own_base, **copy.deepcopy(SETTINGS[setting]))

    def step() -> dict[str, Tensor]:
        torch.manual_seed(1)
        named = {n: p for n, p in found.named_parameters() if p.requires_grad}
        with _NativeDropout():  # CUDA's
            y = found(x)
        grads = torch.autograd.grad(y, [x, *named.values()], dy.view(y.shape))
        return {"y": y.detach(), "dx": grads[0], **dict(zip(named, grads[1:], strict=True))}

    want = step()
    monkeypatch.setattr(swap, "heavier_reason", lambda layer: None)
    fuse(found)
    assert "Fused" in type(found.base_model.model[0]).__name__
    assert_close_derived(step(), want, terms=K, layers=2)


def _change_bias(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.randn(N), requires_grad=False)


def _write_bias(layer: Any) -> None:
    layer.base_layer.bias.data = torch.randn(N)


def _drop(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5)


def _rescale(layer: Any) -> None:
    layer.set_scale("default", 3.0)


def _write_adapter(layer: Any) -> None:
    layer.lora_B["default"].weight.data = torch.randn(N, R)


def _narrow_adapter(layer: Any) -> None:
    for of, at in ((layer.lora_A, (slice(3),)), (layer.lora_B, (slice(None), slice(3)))):
        of["default"].weight.data = of["default"].weight.data[at].clone()


CHANGES = (
    *(_change_bias, _write_bias, _drop, _rescale, _write_adapter, _narrow_adapter),
    *(nn.Module.eval, lambda layer: layer.base_layer.weight.mul_(2)),
)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("M", [3, 100])
@pytest.mark.parametrize("change", CHANGES)
def test_change_between_two_calls_is_pefts(
    change: Callable[[Any], object], M: int, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the extension and without."""
    if not is_native:
        monkeypatch.setattr(native, "module", None)
    stock = model(lora_dropout=0.2)
    fused = fuse(copy.deepcopy(stock))
    for found in (stock, fused):
        results(found, M)
        torch.manual_seed(9)
        with torch.no_grad():
            change(found.base_model.model[0])
    for _ in range(2):
        assert_close_derived(results(fused, M), results(stock, M), terms=K)


PARTS = [f"{name}.default" for name in ("lora_A", "lora_B", "lora_dropout")]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("path", ["base_layer", *PARTS])
def test_hook_on_a_part_of_a_layer_is_called(path: str, kind: str) -> None:
    fused, seen = fuse(model()), list[bool]()
    part = fused.base_model.model[0].get_submodule(path)
    getattr(part, f"register_{kind}_hook")(lambda *args: seen.append(True))
    results(fused, 3)
    assert seen == [True]


@pytest.mark.parametrize("path", ["base_layer", *PARTS])
def test_replaced_forward_of_a_part_of_a_layer_is_called(path: str) -> None:
    fused, seen = fuse(model()), list[bool]()
    part = fused.base_model.model[0].get_submodule(path)
    forward = part.forward
    part.forward = lambda x: (seen.append(True), forward(x))[1]
    results(fused, 3)
    assert seen == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trained_bias_of_the_base_has_pefts_gradient(dtype: torch.dtype) -> None:
    stock = model(bias="all").to(dtype)
    fused, x = fuse(copy.deepcopy(stock)), torch.randn(100, K, dtype=dtype)
    for found in (stock, fused):
        found(x).sum().backward()
    got, want = (found.base_model.model[0].base_layer.bias.grad for found in (fused, stock))
    assert_close_derived(got, want, terms=100)


@pytest.mark.parametrize("grad", [True, False])
def test_later_call_says_what_is_wrong_with_x(grad: bool) -> None:
    fused = fuse(model()).eval()
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            want = fused(torch.ones(100, K))
        with pytest.raises(ValueError, match=r"x: got shape \[100, 7\], want \[\.\.\., 320\]"):
            fused(torch.ones(100, 7))
        assert torch.equal(fused(torch.ones(100, K)), want)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_between_calls_is_pefts(grad: bool) -> None:
    stock = model().eval()
    fused, x = fuse(copy.deepcopy(stock)), torch.randn(100, K)
    exact = in_float64(stock)(x.double())
    with torch.set_grad_enabled(grad):
        for on in (False, False, True, True, False):
            with torch.autocast("cpu", enabled=on):
                got, want = fused(x), stock(x)
            assert_as_exact({"y": got}, {"y": exact}, {"y": want})


@pytest.mark.parametrize("rows", [(3,), (100,), (2, 50)], ids=str)
def test_stacking_depends_on_the_rows(rows, monkeypatch) -> None:
    called: list[int] = []
    original, add = eager.lora_linear, eager_blocks.add_update_

    def counting(operands: Operands, *rest: Any) -> Any:
        called.append(operands.lora_A.shape[0])
        return original(operands, *rest)

    def counting_adds(y: Tensor, x: Tensor, lora_A: Tensor, *rest: Any) -> Any:
        called.append(lora_A.shape[0])
        return add(y, x, lora_A, *rest)

    found = fuse(model(second={"r": 9}))
    monkeypatch.setattr(eager, "lora_linear", counting)
    monkeypatch.setattr(eager_blocks, "add_update_", counting_adds)
    found(torch.randn(*rows, K))
    M = math.prod(rows)
    assert called == ([R, 9] if M == 3 else [R + 9])
    row = explain(found, rows=M).rows[0]
    assert ("2 calls" in row.strategy) == (M == 3)
    assert ("stacking adapters would copy them" in row.reason) == (M == 3)


@pytest.mark.parametrize("autocast", [None, bf16], ids=str)
@pytest.mark.parametrize("setting", ["two", "DoRA"])
def test_explain_asks_for_the_choice_that_the_op_asks_for(
    setting: str, autocast: Any, asked: list[Problem]
) -> None:
    """Autocast casts x and the adapters on a GPU before the choice."""
    found = fuse(model(**copy.deepcopy(SETTINGS[setting])))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        found(torch.randn(100, K))
        by_op = {*asked}
        asked.clear()
        explain(found, rows=100)
    assert len(by_op) == 1 and {*asked} == by_op


WIDE, NARROW = (64, 192), (192, 64)  # K, N
# Config, dtype of the adapters beside bfloat16, and the sizes of layers that PEFT keeps.
LEFT = {
    "dropout": ({"lora_dropout": 0.1}, bf16, ()),
    "dropout, many ranks": ({"lora_dropout": 0.1, "r": 8}, bf16, (NARROW,)),
    "dropout, many float32 ranks": ({"lora_dropout": 0.1, "r": 8}, f32, ()),
    "dropout, more float32 ranks than columns": ({"lora_dropout": 0.1, "r": 65}, f32, (NARROW,)),
    "DoRA": ({"use_dora": True}, bf16, ()),
    "DoRA with dropout": ({"use_dora": True, "lora_dropout": 0.1}, bf16, (NARROW,)),
    "DoRA with dropout, many ranks": (
        {"use_dora": True, "lora_dropout": 0.1, "r": 8}, bf16, (WIDE, NARROW),
    ),
    "DoRA with dropout in float32": ({"use_dora": True, "lora_dropout": 0.1}, f32, ()),
    "two": ({"second": {}}, bf16, ()),
    "two of more ranks than columns": ({"second": {"r": 60}}, bf16, (NARROW,)),
    "two, one with dropout": ({"second": {"lora_dropout": 0.1}}, bf16, (NARROW,)),
    "two with dropout": ({"second": {}, "lora_dropout": 0.1}, bf16, (NARROW,)),
    "two with dropout in float32": ({"second": {}, "lora_dropout": 0.1}, f32, ()),
    "two with dropout in float32, 64 ranks": (
        {"second": {"r": 64}, "lora_dropout": 0.1}, f32, (NARROW,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("setting", LEFT)
def test_fuse_leaves_layers_whose_bytes_peft_s_moves_fewer_of(setting, sizes, training) -> None:
    """Dropout counts in eval mode too: the layer may train later."""
    config, dtype, left = LEFT[setting]
    base = nn.Sequential(nn.Linear(*sizes, dtype=bf16))
    found = model(base=base, **copy.deepcopy(config)).to(dtype).train(training)
    found.base_model.model[0].base_layer.to(bf16)
    (row,) = explain(fuse(found)).rows
    assert (row.backend == "peft") is (sizes in left), row
    if sizes in left:
        assert row.reason.startswith("PEFT's own forward moves fewer bytes for ")
        assert f"{sizes[0]} columns of x and {sizes[1]} of y" in row.reason
        assert ("with dropout" in row.reason) is ("dropout" in setting)


def test_fuse_leaves_a_float16_dora_with_dropout_of_any_size() -> None:
    base = nn.Sequential(nn.Linear(64, 640, dtype=torch.float16))
    found = model(base=base, use_dora=True, lora_dropout=0.1).to(torch.float16)
    (row,) = explain(fuse(found)).rows
    assert row.backend == "peft" and "DoRA with dropout" in row.reason


def test_fuse_on_a_cpu_takes_layers_that_peft_s_moves_fewer_bytes_of(monkeypatch) -> None:
    base = nn.Sequential(nn.Linear(*NARROW, dtype=bf16))
    found = model(base=base, use_dora=True, lora_dropout=0.1).to(bf16)
    with monkeypatch.context() as on_cpu:
        on_cpu.setattr(library, "emulates_gpu", False)
        fuse(found)
    assert type(found.base_model.model[0]) is FusedLinear
    assert explain(found).rows[0].backend == "eager"  # and stays fused


def test_explain_of_equal_layers_prints_one_line() -> None:
    base = nn.Sequential(*(nn.Linear(K, K) for _ in range(30)))
    targets = [str(i) for i in range(30)]
    found = fuse(get_peft_model(base, LoraConfig(r=R, target_modules=targets)))
    _, line, _ = str(explain(found)).splitlines()
    assert line.startswith("30 × base_model.model.*  ")
    assert len(str(explain(found, all=True)).splitlines()) == 32


def _raise(*args: Any) -> Tensor:
    raise RuntimeError("no kernel image")


def _off(self: Any, found: Tensor) -> Tensor:
    return found * 1.25


BREAKAGES: dict[str, tuple[Callable[..., Any], str]] = {
    "a wrong product": (_off, "gemm_4bit of nf4 differs from the reference"),
    "with nested scales": (
        lambda self, found: found if self.offset is None else _off(self, found),
        "gemm_4bit of nf4 differs from the reference",
    ),
    "an exception": (_raise, "raised RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_bitsandbytes_that_fails_its_check_is_not_used(breakage, monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        pytest.skip("bitsandbytes is older than 0.50, without gemm_4bit")
    from lora_kernels.quantization import bitsandbytes

    (broken, said), name = BREAKAGES[breakage], "bitsandbytes_gemm"
    original = getattr(decoder, name)
    found = model(quantized=True)
    want = results(found, 5)
    for module in (decoder, bitsandbytes):  # which imports the function
        monkeypatch.setattr(module, name, lambda w, *args: broken(w, original(w, *args)))
    decoder.bitsandbytes_reasons.clear()
    fuse(found)
    reason = explain(found).rows[0].reason
    assert "; no GEMM of few rows decodes inside: bitsandbytes " in reason and said in reason
    assert_close_derived(results(found, 5), want, terms=K, layers=1)


def test_fuse_takes_a_layer_without_active_adapters() -> None:
    """Such a layer computes the base alone, in both."""
    found = model()
    found.base_model.model[0]._active_adapter = []
    fuse(found)
    assert type(found.base_model.model[0]) is FusedLinear


def test_explain_says_what_decodes() -> None:
    pytest.importorskip("bitsandbytes")
    decoder.bitsandbytes_reasons.clear()
    reason = explain(fuse(model(quantized=True))).rows[0].reason
    assert "PyTorch decodes in three kernels: no Triton kernels for device type 'cpu'" in reason
    assert "few rows" not in reason


def test_explain_of_a_4_bit_base_that_is_called_does_not_say_who_decodes_it() -> None:
    fused = fuse(model(quantized=True))
    codes = quantize_4bit(torch.ones(2, 64)).codes
    said = decoder.decoded_by(torch.device("cpu"), codes, 64, torch.float32)
    (row,) = explain(fused).rows
    assert said in row.reason
    fused.base_model.model[0].base_layer.register_forward_hook(lambda *args: None)
    (row,) = explain(fused).rows
    assert row.state == ADAPTER and said not in row.reason
