"""`adapter_names`: each row of a batch has an adapter of its own, in one call a layer."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels
from lora_kernels.backends import library
from lora_kernels.backends.cpu import native
from lora_kernels.ops.registry import IMPLEMENTATIONS
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import ADAPTER, KERNELS, LIBRARY
from tests.support.assertions import assert_as_exact, assert_close_derived
from tests.support.peft_models import (
    MLP,
    SIZES,
    add_adapter,
    add_lora,
    batch,
    conv1d,
    count_ops,
    in_float64,
    mlp,
    pair,
    results,
    train,
)

NAMES = ["second", "__base__", "default"]


def several(model: Any = None, **config: Any) -> Any:
    """Three adapters of different ranks and scalings, the third on one layer only."""
    model = model or mlp()
    for i, (name, r, targets) in enumerate([("second", 3, {"up", "down"}), ("third", 8, {"down"})]):
        settings = {"r": r, "lora_alpha": 2 * r + 1, "target_modules": targets}
        add_adapter(model, name, 5 + i, **settings | config)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)
    return model.eval()


def assert_close(
    got: dict[str, Tensor], want: dict[str, Tensor], rtol: float | None = None
) -> None:
    """Results are PEFT's; an adapter that no row has gets zeros where PEFT gives nothing."""
    for name in got.keys() - want.keys():
        assert not got.pop(name).any()
    assert_close_derived(got, want, rtol)


def assert_equals_peft(stock: Any, fused: Any, names: list[str], x: Tensor) -> None:
    got, want = (results(model, x, adapter_names=names) for model in (fused, stock))
    assert_close(got, want)


@pytest.mark.parametrize(
    "names",
    [NAMES, ["third", "second", "third"], ["default"] * 3, ["__base__"] * 3, ["third"] * 3],
    ids="-".join,
)
def test_rows_that_name_their_adapters_equal_peft(names: list[str]) -> None:
    """In float64. PEFT adds row by row into a copy of the base's result, as exactly."""
    stock, fused = pair(several())
    assert_equals_peft(stock, fused, names, batch())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("names", [NAMES, ["third", "second", "third"]], ids="-".join)
def test_rows_that_name_their_adapters_on_the_gpu_path_equal_peft(
    names: list[str], dtype: torch.dtype
) -> None:
    stock, fused = pair(several(mlp(dtype)))
    want = results(stock, batch(dtype), adapter_names=names)
    with library.as_on_gpu():
        assert_close(results(fused, batch(dtype), adapter_names=names), want)


class Copies(TorchDispatchMode):
    """The sizes of tensors that are copied to the meta device, by our ops' implementations too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lora_kernels":
            with self, torch.no_grad(), lora_kernels.backend("eager"):
                kwargs = {name: value for name, value in kwargs.items() if name != "choice"}
                return IMPLEMENTATIONS[func.overloadpacket.__name__](*args, **kwargs)
        out = func(*args, **kwargs)
        given = args[0] if args else None
        if isinstance(given, Tensor) and given.is_cpu and isinstance(out, Tensor) and out.is_meta:
            assert kwargs.get("non_blocking"), "the host waits for a copy"
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        (["second", "second", "default"], 0),
        (["__base__", "third", "second"], 0),
        (["default", "second", "default"], 4),  # the order of the rows, in both directions
    ],
    ids=["together", "base", "apart"],
)
@pytest.mark.parametrize("T", [1, 5])
def test_rows_that_name_their_adapters_are_found_without_a_read_of_the_device(
    names: list[str], copies: int, T: int
) -> None:
    """A read of a meta tensor raises."""
    fused = fuse(several(mlp(torch.float32))).to("meta")
    x = torch.empty(3, T, SIZES[0], device="meta", requires_grad=True)
    with Copies() as found:
        fused(x, adapter_names=names).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert found.sizes == [3] * copies


def test_one_op_a_layer_and_explained() -> None:
    """In float32, by the kernels."""
    stock, fused = pair(several(mlp(torch.float32)))
    x = batch(torch.float32)
    assert_equals_peft(stock, fused, NAMES, x)
    ops = count_ops(lambda: fused(x, adapter_names=NAMES))
    assert ops == {"multi_lora_linear": 2}
    rows = explain(fused).rows
    for row, adapters in zip(rows, (2, 2), strict=True):
        assert f"rows name their adapters, as in the last call: {adapters} in one" in row.reason
        assert row.state == (KERNELS if native.module else LIBRARY)
    assert_close_derived(fused(x), stock(x))
    assert not any("rows name" in row.reason for row in explain(fused).rows)


def test_decoding_before_and_after() -> None:
    """A call prepared for one adapter is not taken for rows that name theirs, nor lost for long."""
    stock, fused = pair(several(mlp(torch.float32)))
    x = batch(torch.float32)[:, :1]
    with torch.no_grad():
        for names in (None, None, NAMES, None, ["third", "__base__", "second"], None):
            kwargs = {} if names is None else {"adapter_names": names}
            assert_close_derived(fused(x, **kwargs), stock(x, **kwargs))
    assert not any("rows name" in row.reason for row in explain(fused).rows)


def test_training_follows_peft() -> None:
    stock, fused = pair(several())

    def forward(model: Any, step: int) -> Tensor:
        names = (NAMES, ["third", "third", "second"], NAMES)[step]
        return model(batch(), adapter_names=names)

    assert_close(*(train(model, forward, steps=3) for model in (fused, stock)))


def test_conv1d_and_hooked_bases_equal_peft() -> None:
    torch.manual_seed(0)
    base = MLP(conv1d)
    base.down = nn.Linear(SIZES[1], SIZES[2])
    stock, fused = pair(several(add_lora(base.double(), fan_in_fan_out=True)))
    for m in (stock, fused):
        m.base_model.model.down.base_layer.register_forward_hook(lambda mod, a, out: out * 1.5)
    assert_equals_peft(stock, fused, NAMES, batch())
    assert explain(fused).rows[1].state == ADAPTER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit_base(dtype: torch.dtype) -> None:
    linear = partial(pytest.importorskip("bitsandbytes").nn.Linear4bit, compute_dtype=dtype)
    torch.manual_seed(0)
    model = several(add_lora(MLP(partial(linear, quant_type="nf4"), (64, 128, 40)).to("cpu")))
    for name in ("up", "down"):  # in eval mode bitsandbytes rounds the scales
        getattr(model.base_model.model, name).base_layer.train()
    stock, fused = pair(model)
    x, exact = torch.randn(3, 5, 64), in_float64(model)
    want, got = (results(m, x, adapter_names=NAMES) for m in (stock, fused))
    ref = results(exact, x.double(), adapter_names=NAMES)
    assert_as_exact({k: got[k] for k in want}, {k: ref[k] for k in want}, want)
    assert count_ops(lambda: fused(x, adapter_names=NAMES)) == {"multi_lora_linear_quantized": 2}


def test_dropout_in_a_layer() -> None:
    """PEFT's model refuses adapter_names while it trains; its layer takes them, and so does ours:
    on average, and with 1/(1 − p)."""
    model = several(mlp(torch.float32, lora_dropout=0.5), lora_dropout=0.5)
    stock, fused = (m.base_model.model.up.train() for m in pair(model))
    x = torch.ones(3, 2000, SIZES[0])
    torch.manual_seed(0)
    y, want = fused(x, adapter_names=NAMES), stock(x, adapter_names=NAMES).mean(1)
    got = y.mean(1)
    assert y.std(1)[[0, 2]].min() > 0
    # Means of 2000 independent draws: they differ by less than 6 of their standard deviations.
    spread = stock(x, adapter_names=NAMES).std(1) / 2000**0.5
    assert ((got - want).abs() <= 6 * 2**0.5 * spread + 1e-6).all()
    assert_close_derived(got[1], stock.base_layer(x).mean(1)[1])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 4)], ids=str)
def test_rows_of_any_number_of_dimensions_equal_peft(shape: tuple[int, ...]) -> None:
    stock, fused = pair(several())
    x = torch.randn(*shape, SIZES[0], dtype=torch.float64)
    assert_equals_peft(stock, fused, NAMES, x)
    assert count_ops(lambda: fused(x, adapter_names=NAMES)) == {"multi_lora_linear": 2}


def in_bfloat16(layer: Any) -> None:
    for part in (layer.lora_A, layer.lora_B):
        part["second"].bfloat16()


def with_tensor_scaling(layer: Any) -> None:
    layer.scaling["second"] = torch.tensor(layer.scaling["second"])


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        ({"lora_bias": True}, None, "'second' has a lora_bias, which a call with adapter_names"),
        ({"lora_dropout": 0.25}, None, "differ in dtype or dropout"),
        ({}, in_bfloat16, "differ in dtype or dropout"),
        ({}, with_tensor_scaling, "'second' has a scaling in a tensor"),
    ],
)
def test_unsupported_adapters_are_left_to_peft(config: Any, change: Any, reason: str) -> None:
    model = several(mlp(torch.float32), **config)
    if change:
        change(model.base_model.model.up)
    stock, fused = (copy.deepcopy(m).base_model.model.up for m in pair(model))
    if "lora_dropout" in config:
        stock.train(), fused.train()
    x = batch(torch.float32)
    torch.manual_seed(0)
    want = stock(x, adapter_names=NAMES)
    torch.manual_seed(0)
    assert_close_derived(fused(x, adapter_names=NAMES), want)
    assert reason in explain(fused).rows[0].reason


def test_lora_Bs_of_two_dtypes_are_left_to_peft_under_autocast() -> None:
    model = several(mlp(torch.float32))
    model.base_model.model.up.lora_B["second"].bfloat16()
    stock, fused = (m.base_model.model.up for m in pair(model))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (layer(batch(torch.float32), adapter_names=NAMES) for layer in (fused, stock))
    assert_close_derived(got, want)
    assert "differ in dtype or dropout" in explain(fused).rows[0].reason


def test_errors_are_pefts() -> None:
    stock, fused = pair(several())
    for names in (["second"], ["second", "nobody", "default"]):
        messages = []
        for model in (stock, fused):
            with pytest.raises(ValueError) as error:
                model(batch(), adapter_names=names)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    dora = fuse(mlp(use_dora=True).eval())
    with pytest.raises(ValueError, match="DoRA"):
        dora(batch(), adapter_names=["default"] * 3)
    path = "a call with adapter_names does not take"
    reason = explain(dora).rows[0].reason
    assert reason == f"adapter 'default' is a DoRA, whose column scale {path}"
