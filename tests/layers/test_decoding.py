"""A layer's direct call has `lora_linear`'s bits, reads every change, and refuses what it must."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels.backends import library
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import native
from lora_kernels.choice import choose as selection
from lora_kernels.core import forced
from lora_kernels.core.problem import Problem, Strategy
from lora_kernels.layers import LoRALinear, QLoRALinear
from lora_kernels.ops import direct
from lora_kernels.oracle import tolerance
from lora_kernels.quantization import quantize_4bit
from tests.support.assertions import assert_bitwise_equal, assert_close_derived
from tests.support.models import general_way, watch_direct_calls
from tests.support.peft_models import OpCounter
from tests.support.threads import asked_threads
from tests.support.threads import threads as threads

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


def by_lora_linear(layer: LoRALinear, x: Tensor) -> Tensor:
    with general_way():
        return layer(x)  # type: ignore[no-any-return]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    return watch_direct_calls(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 20, 200])
def test_decoding_gives_lora_linears_bits(
    layer: LoRALinear, rows: int, answers: list[Tensor | None]
) -> None:
    y = layer(x(rows))
    assert torch.equal(by_lora_linear(layer, x(rows)), y)
    is_few = rows <= cpu_heuristics.few_rows(f32, True, N * K)
    is_panels = isinstance(layer, QLoRALinear) and native.isa in ("scalar", "avx2") and not is_few
    assert (answers[0] is None) == is_panels  # 4-bit codes are decoded for oneDNN or MKL
    with lora_kernels.backend("eager"):
        assert not torch.equal(layer(x(rows)), y)
    assert answers[-1] is None


def step(layer: Any, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x, lora_A, lora_B and bias."""
    leaves = x.requires_grad_(), layer.lora_A, layer.lora_B, layer.bias
    y = layer(x)
    dy = torch.arange(1.0, N + 1).to(y).expand_as(y)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("bias_grad", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_step_gives_lora_linears_bits(
    layer: LoRALinear, rows: int, dtype: torch.dtype, bias_grad: bool, answers: list[Any]
) -> None:
    assert isinstance(layer.bias, Tensor)
    layer.bias.requires_grad_(bias_grad)
    layer, given = layer.to(dtype), x(rows).to(dtype)
    for surrounding in (contextlib.nullcontext, *SURROUNDINGS.values()):
        with surrounding():
            got = step(layer, given)
            is_direct = answers[-1] is not None
            with general_way():
                want = step(layer, given)
        if surrounding in (contextlib.nullcontext, torch.enable_grad) and native.isa != "scalar":
            assert is_direct or (isinstance(layer, QLoRALinear) and native.isa == "avx2")
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 200])
def test_later_calls_draw_the_masks_that_first_calls_draw(
    layer: LoRALinear, rows: int, grad: bool
) -> None:
    """In training a direct call must draw one state for each call, also if it refuses x or what
    surrounds the call."""
    layer.train()
    for surrounding in (contextlib.nullcontext, *SURROUNDINGS.values()):
        found = []
        for call in (layer, functools.partial(by_lora_linear, layer)):
            torch.manual_seed(7)
            with surrounding(), torch.set_grad_enabled(grad):
                found.append([call(x(rows)) for _ in range(3)])
        assert_bitwise_equal(*found)
        assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("compute_dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_step_in_a_compute_dtype_gives_lora_linears_bits(
    rows: int, compute_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """With the same dy for each row, which is expanded, and with another one, which is not."""
    torch.manual_seed(0)
    layer = QLoRALinear(K, N, r=4, bias=True)
    nn.init.normal_(layer.lora_B)
    layer.compute_dtype = compute_dtype
    given = x(rows).to(dtype)
    for differentiate in (step, gradients):
        got = differentiate(layer, given.clone().requires_grad_())
        with general_way():
            want = differentiate(layer, given.clone().requires_grad_())
        assert_bitwise_equal(got, want)


def test_step_after_another_number_of_threads_is_on_so_many(layer: LoRALinear) -> None:
    """Each kernel of both directions asks for as many threads as `lora_linear`'s do.

    Kernels of 70 rows would not be divided on every instruction set.
    """
    for number in (1, 3, 2):
        torch.set_num_threads(number)
        with asked_threads() as asked:
            gradients(layer, x(600).requires_grad_())
        with general_way(), asked_threads() as want:
            gradients(layer, x(600).requires_grad_())
        assert asked == want
        assert max(asked, default=1) == number


def test_direct_call_beside_a_backend_of_the_environment_is_none(
    layer: LoRALinear, answers: list[Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """$LORA_KERNELS_BACKEND is the default that no context has entered."""
    with lora_kernels.backend("eager"):
        want = layer(x())
    default = forced.Forced("eager")
    monkeypatch.setattr(forced, "DEFAULT", default)
    monkeypatch.setattr(forced, "current", ContextVar("of the environment", default=default))
    assert_bitwise_equal(layer(x()), want)
    assert answers == [None, None]


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
    assert_bitwise_equal(got, by_lora_linear(layer, x()))
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
        with torch.no_grad():
            (CHANGES | IN_TRAINING)[change](layer)
        got = gradients(layer, given.clone().requires_grad_())
        with general_way():
            want = gradients(layer, given.clone().requires_grad_())
    if on_gpu_path:  # other sums
        assert_close_derived(got, want, terms=max(K, N))
    else:
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
    assert_close_derived(layer(x()), by_lora_linear(layer, x()))
    assert not torch.allclose(layer(x()), y)


@torch.no_grad()
def test_decoding_notices_another_compute_dtype() -> None:
    layer = QLoRALinear(K, N, r=4).eval()
    before = layer(x())
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(got := layer(x()), by_lora_linear(layer, x()))
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


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_layer_without_the_native_extension_is_called_again(cls, monkeypatch) -> None:
    """Without a compiler `lora_linear` computes each call."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "not built: no compiler")
    layer, x = cls.from_linear(torch.nn.Linear(64, 32), r=4), torch.randn(2, 64)
    first = layer(x)
    for _ in range(2):
        layer(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        assert torch.equal(layer(x), first) and torch.equal(layer(x), first)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_call_of_a_computed_adapter_does_not_keep_it(name: str) -> None:
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
@pytest.mark.parametrize("rows", [1, 100])
def test_direct_call_of_what_the_kernels_do_not_read_in_place_is_none(rows: int) -> None:
    x, W, A, B = operands(rows)
    bias = torch.randn(N)
    wide = W.repeat_interleave(2, 1)[:, ::2]
    assert direct.call(x, W, A, B, bias, 2.0) is not None
    assert direct.call(x.view(rows, 1, K), W, A, by_columns(B), bias, 2.0) is not None
    assert direct.call(nn.Parameter(x), W, A, B, bias.to(bf16), 2.0) is not None
    assert direct.call(x, torch.cat([W, W], 1)[:, :K], A, B, None, 2.0) is not None
    for refused in (
        (x, W, by_columns(A), B, bias),
        (x, by_columns(W), A, B, bias),
        (x, wide, A, B, bias),
        (x, W.to(bf16), A, B, bias),
        (x.to(bf16), W, A, B, bias),
        (torch.cat([x, x], 1)[:, :K], W, A, B, bias) if rows > 1 else (x.double(), W, A, B, bias),
        (x, W, A[:0], B[:, :0], bias),
        (x[:0], W, A, B, bias),
        (x[:, :-1], W, A, B, bias),
        (x, W[:-1], A, B, bias),
        (x, W, A, B[:-1], bias),
        (x, W, A, B, bias[:-1]),
        (x, W, A, B[:, :-1], bias),
        (x, W, A.repeat(65, 1), B.repeat(1, 65), bias),  # a rank above the kernels'
        (x, W, A, B, bias.to("meta")),
        (x.sum().float(), W, A, B, bias),
        (x, W, A, B.double(), bias),
    ):
        assert direct.call(*refused, 2.0) is None
    with torch.autocast("cpu", bf16):
        assert direct.call(x, W, A, B, bias, 2.0) is None


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("place", range(1, 5), ids=["weight", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("rows", [1, 70])
def test_direct_call_of_a_strided_operand_gives_lora_linears_bits(
    rows: int, place: int, dtype: torch.dtype
) -> None:
    """The weight's and A's rows lie apart, and B's and the bias's elements, with NaN between."""
    tensors = [*operands(rows, dtype), torch.randn(N).to(dtype)]
    t = tensors[place]
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=dtype)
    strided = wide[..., : t.shape[-1]] if place in (1, 2) else wide[..., ::2]
    tensors[place] = strided.copy_(t)
    leaves = [t.requires_grad_() for i, t in enumerate(tensors) if i != 1]
    x, W, A, B, bias = tensors
    results = []
    for y in (
        direct.call(x, W, A, B, bias, 2.0),
        lora_kernels.lora_linear(x, W, A, B, 2.0, bias),
    ):
        assert y is not None
        dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert_bitwise_equal(*results)


@torch.no_grad()
@pytest.mark.parametrize("place", range(5), ids=["x", "weight", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("kind", ["negated", "freed", "subclass"])
def test_direct_call_of_an_unusual_tensor_is_none(kind: str, place: int) -> None:
    tensors = [*operands(), torch.randn(N)]
    assert direct.call(*tensors, 2.0) is not None
    t = tensors[place]
    if kind == "negated":
        tensors[place] = t._neg_view()
    elif kind == "freed":
        t.untyped_storage().resize_(0)
    else:
        tensors[place] = t.as_subclass(type("Subclass", (Tensor,), {}))
    assert direct.call(*tensors, 2.0) is None


@torch.no_grad()
@pytest.mark.parametrize("place", [1, 2, 3], ids=["weight", "lora_A", "lora_B"])
def test_direct_call_reads_other_bits_at_the_same_address(place: int) -> None:
    """float16 read as bfloat16: address, strides and shape stay."""
    tensors = operands(dtype=f16)
    tensors[place].data = tensors[place].data.view(bf16)
    got = direct.call(*tensors, None, 2.0)
    if place == 1:
        assert got is None  # W and x go together
    else:
        assert got is not None and torch.equal(got, lora_kernels.lora_linear(*tensors, 2.0))


@pytest.mark.parametrize("field", ["packed", "absmax", "code", "nested_absmax", "nested_code"])
def test_direct_call_of_too_few_codes_is_none(field: str) -> None:
    x, W, A, B = operands()
    codes = quantize_4bit(W).codes
    with torch.no_grad():
        assert direct.call(x, codes, A, B, None, 2.0) is not None
        assert direct.call(x, codes._replace(blocksize=96), A, B, None, 2.0) is None
        short = codes._replace(**{field: getattr(codes, field).flatten()[:-1].contiguous()})
        assert direct.call(x, short, A, B, None, 2.0) is None
        strided = getattr(codes, field).flatten().repeat_interleave(2)[::2]
        assert direct.call(x, codes._replace(**{field: strided}), A, B, None, 2.0) is None


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("isa", native.ISAS)
def test_direct_call_runs_the_strategy_of_choose(
    isa: str, dtype: torch.dtype, is_quantized: bool
) -> None:
    """Bit for bit, in one row and around the last row of the GEMV kernel."""
    with using_isa(isa):
        if native.isa != isa:
            pytest.skip("this machine or build lacks the instruction set")
        few = cpu_heuristics.few_rows(dtype, is_quantized, N * K)
        for rows in {1, max(few, 1), few + 1}:
            x, W, A, B = operands(rows, dtype)
            problem = Problem("cpu", *[dtype] * 4, 4, rows, is_quantized, N, K)
            strategy = selection.choose(problem).strategy
            weight = quantize_4bit(W) if is_quantized else W
            leaves, dy = [t.requires_grad_() for t in (x, A, B)], torch.randn(rows, N).to(dtype)
            with lora_kernels.backend("cpu", strategy):
                y = lora_kernels.lora_linear(x, weight, A, B, 2.0)
                want = [y, *torch.autograd.grad(y, leaves, dy)]
            packed = weight.codes if is_quantized else weight
            got = direct.call(x, packed, A, B, None, 2.0)
            if is_quantized and strategy == Strategy.LIBRARY:  # Python decodes codes in panels
                assert got is None
                continue
            assert got is not None
            assert_bitwise_equal([got, *torch.autograd.grad(got, leaves, dy)], want)


@contextlib.contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """An instruction set in use, if the processor has it."""
    before = native.isa
    native.use_isa(isa)
    try:
        yield
    finally:
        native.use_isa(str(before))


def other_isa() -> contextlib.AbstractContextManager[None]:
    """Another instruction set in use, which another number of rows may suit."""
    return using_isa("scalar" if native.isa != "scalar" else native.ISAS[-1])


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", bf16),
    "backend": lambda: lora_kernels.backend("eager"),
    "same_backend": lambda: lora_kernels.backend("cpu"),
    "isa": other_isa,
    "mode": OpCounter,
}


@torch.no_grad()
def test_direct_call_without_an_adapter_is_the_frozen_linears() -> None:
    x, W, *_ = operands()
    bias = torch.randn(N)
    for weight in (W, -W, by_columns(W)):
        y = direct.call(x, weight, None, None, bias, 0.0)
        if weight is W or weight.stride(1) == 1:
            assert y is not None
            exact = x.double() @ weight.double().t() + bias
            eager = torch.nn.functional.linear(x, weight, bias)
            assert tolerance.compare(y, exact, eager, tolerance.unit_roundoff(f32), [K]).ok
        else:
            assert y is None
    for weight in (None, W.to("meta"), quantize_4bit(W).codes):
        assert direct.call(x, weight, None, None, bias, 0.0) is None
