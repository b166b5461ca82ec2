"""Without gradients a layer remembers its last call: the same bits, and given up for all that
matters."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends import library
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import native
from lora_kernels.backends.cpu.linear import PreparedCall
from lora_kernels.layers import LoRALinear, QLoRALinear
from lora_kernels.layers.cache import CallCache, PreparedLinear, prepare
from lora_kernels.ops import linear
from lora_kernels.quantization import quantize_4bit
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.models import skip_unless_few, watch_prepared_calls

pytestmark = [
    pytest.mark.skipif(native.module is None, reason="no native kernels"),
    pytest.mark.usefixtures("looks"),
]

K, N = 128, 192
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[LoRALinear, QLoRALinear])
def layer(request: pytest.FixtureRequest) -> LoRALinear:
    torch.manual_seed(0)
    layer: LoRALinear = request.param(K, N, r=4, bias=True, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    return layer.eval()


def x(rows: int = 1) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(3))


def the_long_way(layer: LoRALinear, x: Tensor) -> Tensor:
    layer._cache.call = CallCache()
    return layer(x)  # type: ignore[no-any-return]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    return watch_prepared_calls(monkeypatch)


@torch.no_grad()
def test_decoding_gives_the_same_bits(layer: LoRALinear, answers: list[Tensor | None]) -> None:
    y = layer(x())
    assert not answers
    assert torch.equal(layer(x()), y)
    assert answers[0] is not None
    assert layer(x(200)).shape == (200, N)  # too many rows for it, which it survives
    assert torch.equal(layer(x()), y)
    assert answers[1] is None and answers[2] is not None
    with lora_kernels.backend("eager"):
        assert not torch.equal(layer(x()), y)
    assert answers[3] is None


def step(layer: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x, lora_A, lora_B and bias."""
    leaves = x.requires_grad_(), layer.lora_A, layer.lora_B, layer.bias
    y = layer(x)
    dy = torch.arange(1.0, N + 1).to(y).expand_as(y)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_few_rows_with_gradients_give_the_same_bits(
    layer: LoRALinear, dtype: torch.dtype, bias_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prepared call returns P too, from which the backward makes dB."""
    skip_unless_few(len(x()), dtype, isinstance(layer, QLoRALinear))
    assert isinstance(layer.bias, Tensor)
    layer.bias.requires_grad_(bias_grad)
    found, whole = [], PreparedCall.forward

    def record(self: PreparedCall, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
        found.append(whole(self, x, bias))
        return found[-1]

    monkeypatch.setattr(PreparedCall, "forward", record)
    layer, given = layer.to(dtype), x().to(dtype)
    for surrounding in (contextlib.nullcontext, *SURROUNDINGS.values()):
        step(layer, given)  # which prepares the next
        found.clear()
        with surrounding():
            got, want = step(layer, given), step(copy.deepcopy(layer), given)
        is_used = any(each is not None for each in found)
        assert is_used == (surrounding in (contextlib.nullcontext, torch.enable_grad))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    step(layer, given)
    layer.lora_A.data = layer.lora_A.data.clone()
    found.clear()
    assert torch.equal(step(layer, given)[0], the_long_way(layer, given))
    assert found[0] is None


def test_decoding_prepares_few_rows_with_gradients(
    layer: LoRALinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step of many rows, the call that decoding prepares is a step's too."""
    want = step(copy.deepcopy(layer), x())
    step(layer, x(200))
    with torch.no_grad():
        layer(x())
    monkeypatch.setattr(linear, "FAMILY", linear.FAMILY._replace(forward=None))
    for got, expected in zip(step(layer, x()), want, strict=True):
        assert torch.equal(got, expected)


def test_with_gradients_it_is_not_asked(layer: LoRALinear, answers: list[Tensor | None]) -> None:
    with torch.no_grad():
        y = layer(x())
    layer(x()).sum().backward()
    assert layer.lora_A.grad is not None
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x()), y)  # dropout
    assert not answers


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 200])
def test_later_calls_draw_the_masks_that_first_calls_draw(
    layer: LoRALinear, rows: int, grad: bool
) -> None:
    """In training, where a prepared call must neither reuse a state nor draw one more."""
    found, layer = [], layer.train()
    for call in (layer, functools.partial(the_long_way, layer)):
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            found.append([call(x(rows)) for _ in range(3)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(found[0][0], found[0][1])


def lower_rank(layer: Any) -> None:
    """In the same memory."""
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data[:2], layer.lora_B.data[:, :2]


def loaded(layer: Any) -> None:
    flipped = {name: getattr(layer, name).flip(0) for name in ("weight", "lora_A")}
    layer.load_state_dict(layer.state_dict() | flipped)


def merged(layer: Any) -> None:
    layer.lora_B.mul_(2)
    layer.merge()


def setter(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value(layer))


new_parameter = setter("lora_A", lambda layer: nn.Parameter(layer.lora_A.detach() * 2))
CHANGES: dict[str, Callable[[Any], Any]] = {
    "new_parameter": new_parameter,
    "new_data": lambda layer: setattr(layer.lora_B, "data", layer.lora_B.data * 2),
    "in_place": lambda layer: layer.lora_B.mul_(2),
    "lower_rank": lower_rank,
    "new_weight": setter("weight", lambda layer: nn.Parameter(layer.weight.flip(0), False)),
    "new_weight_data": lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(0)),
    "scaled": setter("scaling", lambda layer: layer.scaling * 2),
    "new_bias": setter("bias", lambda layer: nn.Parameter(torch.ones(N))),
    "loaded": loaded,
    "disabled": setter("enabled", lambda layer: False),
    "merged": merged,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_decoding_notices_a_change(layer: LoRALinear, change: str) -> None:
    before = layer(x())
    CHANGES[change](layer)
    got = layer(x())
    assert_bitwise_equal(got, the_long_way(layer, x()))
    assert not torch.equal(got, before)


def gradients(layer: Any, rows: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of the parameters that have one."""
    layer.zero_grad()
    y = layer(rows)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [
        y.detach(),
        *(p.grad.clone() for p in (rows, *layer.parameters()) if p.grad is not None),
    ]


IN_TRAINING: dict[str, Callable[[Any], Any]] = {
    "frozen_A": lambda layer: layer.lora_A.requires_grad_(False),
    "bias_in_place": lambda layer: layer.bias.mul_(2),
}


@pytest.mark.parametrize("on_gpu_path", [False, True])
@pytest.mark.parametrize("change", CHANGES | IN_TRAINING)
def test_a_call_with_gradients_notices_a_change(
    layer: LoRALinear, change: str, on_gpu_path: bool
) -> None:
    given = x(5)
    with library.as_on_gpu() if on_gpu_path else contextlib.nullcontext():
        before = gradients(layer, given.clone().requires_grad_())
        again = gradients(layer, given.clone().requires_grad_())
        assert_bitwise_equal(again, before)
        assert isinstance(layer._cache.call._kept, tuple)
        with torch.no_grad():
            (CHANGES | IN_TRAINING)[change](layer)
        got = gradients(layer, given.clone().requires_grad_())
        layer._cache.call = CallCache()
        want = gradients(layer, given.clone().requires_grad_())
    assert_bitwise_equal(got, want)
    assert len(got) != len(before) or not all(map(torch.equal, got, before))


def test_a_weight_that_is_trained_later_is_an_error() -> None:
    layer = LoRALinear(K, N, r=4)
    layer(x())
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight: got requires_grad=True"):
        layer(x())


def test_a_call_with_gradients_notices_another_x(layer: LoRALinear) -> None:
    layer(x())
    with pytest.raises(ValueError, match=f"x: got shape .*want .*{K}"):
        layer(x()[:, :-1])
    with pytest.raises(ValueError, match="device"):
        layer(x().to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x()).dtype is torch.bfloat16
    assert layer(x()).dtype is torch.float32


@torch.no_grad()
def test_weight_or_bias_of_another_shape_is_an_error() -> None:
    layer = LoRALinear(K, N, r=4, bias=True).eval()
    layer(x())
    bias, layer.bias = layer.bias, nn.Parameter(torch.ones(N - 1))
    with pytest.raises(ValueError, match="bias"):
        layer(x())
    layer.bias, layer.weight.data = bias, layer.weight.data[:-1]
    with pytest.raises(ValueError, match="weight"):
        layer(x())


@torch.no_grad()
def test_decoding_notices_a_weight_transposed_where_it_lies() -> None:
    layer = LoRALinear(K, K, r=4).eval()
    y = layer(x())
    assert torch.equal(layer(x()), y)
    layer.weight.data = layer.weight.data.t()
    assert_close_derived(layer(x()), the_long_way(layer, x()))
    assert not torch.allclose(layer(x()), y)


@torch.no_grad()
def test_decoding_notices_another_compute_dtype() -> None:
    layer = QLoRALinear(K, N, r=4).eval()
    before = layer(x())
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(got := layer(x()), the_long_way(layer, x()))
    assert not torch.equal(got, before)


@torch.no_grad()
def test_copies_start_anew(layer: LoRALinear) -> None:
    y = layer(x())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.lora_B.mul_(2)
        assert torch.equal(other(x()), y)
        layer.lora_B.div_(2)
        other.lora_B.mul_(2)
        assert torch.equal(layer(x()), y)
        assert not torch.equal(other(x()), y)


@torch.no_grad()
def test_what_was_remembered_is_let_go(layer: LoRALinear) -> None:
    skip_unless_few(len(x()), bf16, isinstance(layer, QLoRALinear))
    for change in (lambda: layer.to(torch.bfloat16), lambda: new_parameter(layer)):
        layer(x().to(layer.lora_A.dtype))
        held = weakref.ref(layer._cache.call._kept.few)
        assert held() is not None
        change()
        layer(x(200).to(layer.lora_A.dtype))  # for which no call is prepared
        assert held() is None


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_layer_without_the_native_extension_is_called_again(cls, monkeypatch) -> None:
    """Without a compiler no call is prepared, with gradients or without."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "not built: no compiler")
    layer, x = cls.from_linear(torch.nn.Linear(64, 32), r=4), torch.randn(2, 64)
    first = layer(x)
    for _ in range(2):
        layer(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), first) and torch.equal(layer(x), first)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_prepared_call_of_a_computed_adapter_does_not_keep_it(name: str) -> None:
    """Its graph would stay in memory."""
    layer = LoRALinear(64, 32, r=4).eval()
    computed = getattr(layer, name).detach().clone().requires_grad_() * 2
    alive = weakref.ref(computed)
    with torch.no_grad():
        for _ in range(2):
            torch.func.functional_call(layer, {name: computed}, (torch.ones(1, 64),))
    del computed
    gc.collect()
    assert alive() is None


def operands(rows: int = 1, dtype: torch.dtype = f32) -> list[Any]:
    """x, a weight, A and B."""
    torch.manual_seed(0)
    return [torch.randn(s).to(dtype) for s in ((rows, K), (N, K), (4, K), (N, 4))]


def by_columns(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


@torch.no_grad()
def test_prepare_of_what_the_kernels_do_not_read_in_place_is_none() -> None:
    x, W, A, B = operands()
    assert prepare(x, W, A, B, 2.0) is not None
    assert prepare(x, W, A, by_columns(B), 2.0) is not None
    assert prepare(x, W, by_columns(A), B, 2.0) is None
    assert prepare(x, by_columns(W), A, B, 2.0) is None
    assert prepare(x, W.repeat_interleave(2, 1)[:, ::2], A, B, 2.0) is None
    assert prepare(x, W.to(bf16), A, B, 2.0) is None
    with torch.autocast("cpu", bf16):
        assert prepare(x, W, A, B, 2.0) is None and prepare(x, W.to(bf16), A, B, 2.0) is None


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(N, K), (4096, 4096)])
@pytest.mark.parametrize("four_bit", [False, True])
def test_prepare_takes_as_many_rows_as_the_gemv(four_bit: bool, rows: int, columns: int) -> None:
    """4-bit weights of 2²⁴ elements take more rows on some instruction sets."""
    W: Any = torch.zeros(rows, columns)
    W = quantize_4bit(W) if four_bit else W
    A, B = torch.zeros(1, columns), torch.zeros(rows, 1)
    few = cpu_heuristics.few_rows(f32, four_bit, rows * columns)
    assert prepare(torch.ones(few, columns), W, A, B, 2.0) is not None
    assert prepare(torch.ones(few + 1, columns), W, A, B, 2.0) is None


@torch.no_grad()
@pytest.mark.parametrize("place", [1, 2, 3], ids=["weight", "lora_A", "lora_B"])
def test_prepared_call_notices_other_bits_at_the_same_address(place: int) -> None:
    """float16 read as bfloat16: address, strides and shape stay."""
    tensors = operands(dtype=f16)
    skip_unless_few(len(tensors[0]), f16)
    call = prepare(*tensors, 2.0)
    assert call is not None and call(tensors[0]) is not None
    tensors[place].data = tensors[place].data.view(bf16)
    assert call(tensors[0]) is None


@contextlib.contextmanager
def other_isa() -> Iterator[None]:
    """Another instruction set in use, which another number of rows may suit."""
    before = native.isa
    native.use_isa("scalar" if before != "scalar" else native.ISAS[-1])
    try:
        yield
    finally:
        native.use_isa(str(before))


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", bf16),
    "backend": lambda: lora_kernels.backend("eager"),
    "same_backend": lambda: lora_kernels.backend("cpu", "library"),
    "isa": other_isa,
}


@torch.no_grad()
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_prepared_call_of_few_rows_is_none_inside(surrounding: str) -> None:
    x, W, A, B = operands()
    call = prepare(x, W, A, B, 2.0)
    assert call is not None and call(x) is not None
    with SURROUNDINGS[surrounding]():
        assert call(x) is None


@torch.no_grad()
def test_prepared_linear_follows_its_weight() -> None:
    x, W, *_ = operands()
    call, bias = PreparedLinear(), torch.randn(N)
    for weight in (W, W, -W, by_columns(W), W):
        y = call(x, weight, bias)
        if weight.stride(1) == 1:
            assert y is not None
            torch.testing.assert_close(y, x @ weight.t() + bias)
        else:
            assert y is None
    assert call(x, None, bias) is None and call(x, W.to("meta"), bias) is None
    assert pickle.loads(pickle.dumps(call))(x, W, bias) is not None
