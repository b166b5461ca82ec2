"""Base layers of other libraries' quantizers: called, and the update added in place to the result.

`make matrix` installs the libraries; without one its case is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels.ops import in_place
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import ADAPTER
from lora_kernels.peft.linear import Fused
from tests.support.assertions import assert_bitwise_equal
from tests.support.peft_models import MLP, randomize

SIZES = (128, 256, 128)
X = torch.randn(4, 25, SIZES[0], generator=torch.Generator().manual_seed(0))


def bitsandbytes(net: MLP) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for name in ("up", "down"):
        linear = getattr(net, name)
        base = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        base.load_state_dict(linear.state_dict())
        setattr(net, name, base.to("cpu"))
    net.is_loaded_in_8bit = True  # PEFT asks


def torchao(net: MLP) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())


def hqq(net: MLP) -> None:
    quantize = pytest.importorskip("hqq.core.quantize", exc_type=ImportError)
    for name in ("up", "down"):
        settings = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        base = getattr(net, name)
        made = quantize.HQQLinear(base, settings, compute_dtype=torch.float32, device="cpu")
        setattr(net, name, made)


def compressed_tensors(net: MLP) -> None:
    ct = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    weights = ct.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    ct.apply_quantization_config(net, ct.QuantizationConfig(config_groups={"group": scheme}))
    for layer in (net.up, net.down):
        layer.weight_scale.data.copy_(layer.weight.abs().amax(1, keepdim=True) / 127)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data.zero_()


def gptq(net: MLP) -> None:
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    for name in ("up", "down"):
        base, group = getattr(net, name), 32
        N, K = base.weight.shape
        scales = base.weight.detach().view(N, K // group, group).abs().amax(-1) / 7
        made = qlinear.TorchLinear(4, group, True, False, K, N, bias=base.bias is not None)
        made.pack(base, scales, torch.full_like(scales, 8), torch.arange(K).int() // group)
        made.post_init()
        setattr(net, name, made)
    net.norm = nn.Identity()
    net.norm.weight = nn.Parameter(torch.ones(1), requires_grad=False)  # PEFT asks for its device


# bitsandbytes quantizes x to 8 bits: what the adapter of the first layer changes in its last bit
# can move an element of the second's x by one of 127 steps.
STEP = {bitsandbytes: 2.0**-7}
QUANTIZERS = [bitsandbytes, torchao, hqq, compressed_tensors, gptq]


def adapted(quantize: Callable[[MLP], None]) -> Any:
    torch.manual_seed(0)
    net = MLP(sizes=SIZES)
    quantize(net)
    model = get_peft_model(net, LoraConfig(r=5, lora_alpha=7, target_modules=["up", "down"]))
    randomize(model)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """The output and all gradients, after an evaluation."""
    with torch.no_grad():
        found = {"evaluation": model.eval()(X)}
    x = X.clone().requires_grad_()
    found["y"] = y = model.train()(x)
    y.square().sum().backward()
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"x": x.grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_quantized_base_trains_as_peft_s_with_the_update_in_place(
    quantize: Callable[[MLP], None], gpu_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(quantize)
    want = step(model)
    fuse(model)
    assert {row.state for row in explain(model).rows} == {ADAPTER}
    fresh, results, call, add = [], [], Fused._call_base, in_place.add_lora_linear_

    def record_call(*args: Any, **kwargs: Any) -> Any:
        y, is_fresh = call(*args, **kwargs)
        fresh.append(is_fresh and y.data_ptr())
        return y, is_fresh

    def record(y: Tensor, *args: Any) -> Tensor:
        results.append(y.data_ptr())
        return add(y, *args)

    monkeypatch.setattr(Fused, "_call_base", record_call)
    monkeypatch.setattr(in_place, "add_lora_linear_", record)
    got = step(model)
    # Two layers, an evaluation and a step: each base's own result is overwritten.
    assert len(results) == 4 and results == fresh
    assert got.keys() == want.keys() and len(got) == 7
    for name, ref in want.items():
        assert ref.norm() > 0, name
        # Sums of at most 256 float32 terms in another order: an rms of 16 half units, 2⁻²⁰.
        assert (got[name] - ref).norm() <= STEP.get(quantize, 2.0**-20) * ref.norm(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keeper", ["hook", "global hook", "instance", "class"])
def test_result_that_a_hook_or_a_replaced_forward_keeps_is_left(
    keeper: str, gpu_path: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = fuse(adapted(bitsandbytes).eval())
    base = model.base_model.model.up.base_layer
    exact, kept = base(X), []

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        if module is base:
            kept.append(y)

    if keeper == "hook":
        base.register_forward_hook(keep)
    elif keeper == "global hook":
        request.addfinalizer(nn.modules.module.register_module_forward_hook(keep).remove)
    else:
        owner = base if keeper == "instance" else type(base)
        forward = owner.forward

        @functools.wraps(forward)
        def keeping_forward(*args: Any) -> Tensor:
            y = forward(*args)
            keep(args[0] if len(args) > 1 else base, (), y)
            return y

        monkeypatch.setattr(owner, "forward", keeping_forward)
    with torch.no_grad():
        model(X)
    assert_bitwise_equal(kept[0], exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_quantized_base_on_a_cpu_equals_peft_s(quantize: Callable[[MLP], None]) -> None:
    model = adapted(quantize)
    want = step(model)
    got = step(fuse(model))
    assert {row.state for row in explain(model).rows} == {ADAPTER}
    for name, ref in want.items():
        # Our kernels may multiply float32 as three bfloat16, which leaves out products of 2⁻²⁴ and
        # adds three sums where there was one: two bits more than above.
        assert (got[name] - ref).norm() <= STEP.get(quantize, 2.0**-18) * ref.norm(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_quantized_base_without_its_adapter_is_the_base(
    quantize: Callable[[MLP], None], gpu_path: None
) -> None:
    model = fuse(adapted(quantize))
    with torch.no_grad(), model.disable_adapter():
        got = model(X)
    with torch.no_grad():
        assert_bitwise_equal(got, model.unload()(X))
