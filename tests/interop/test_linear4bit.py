"""PEFT's LoRA over bitsandbytes' 4-bit linear, fused: what it computes, says, and leaves alone.

The stock model stays in training mode where it is called: in eval mode, without gradients,
bitsandbytes repacks the weight for a CPU with AVX512-BF16, and rounds its scales for good.
Properties of every kind of layer are in test_layer_kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import lora_linear
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import tolerance
from lora_kernels.peft import explain, fuse, unfuse
from lora_kernels.peft.explain_rows import ADAPTER, KERNELS, LIBRARY
from lora_kernels.quantization import QuantizedWeight
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
    assert_close_to_reference,
    derived_rtol,
)
from tests.support.peft_models import (
    ALPHA,
    MLP,
    SIZES_4BIT,
    Masked,
    R,
    adalora_mlp,
    add_adapter,
    add_lora,
    batch,
    count_ops,
    draw_rng,
    four_bit,
    four_bit_mlp,
    in_float64,
    pair,
    results,
)

bnb = pytest.importorskip("bitsandbytes")
# Of a lora_bias beside a base without one, which cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True")
needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")
f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Whether PEFT takes the model for one that transformers has loaded in 4 bits.
loaded_or_not = pytest.mark.parametrize("loaded", [False, True])


def decoded(base: Any) -> Tensor:
    return QuantizedWeight.from_bitsandbytes(base.weight).dequantize(f32)


def rows(dtype: torch.dtype = f32) -> Tensor:
    return batch(dtype, SIZES_4BIT[0])


def up(model: Any) -> Any:
    return model.base_model.model.up


def assert_close(got: Any, ref: Any, eager: Any, *dtypes: torch.dtype) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    assert len(got) > 3
    roundoff = tolerance.unit_roundoff
    assert_close_to_reference(got, ref, eager, lambda name, dtype: roundoff(dtype, *dtypes))


def packed(model: Any) -> list[Tensor]:
    """Copies of all that bitsandbytes holds of its weights, as bytes, which are never NaN."""
    tensors = []
    for layer in (up(model), model.base_model.model.down):
        weight = layer.base_layer.weight
        tensors += [weight.data, *weight.quant_state.as_dict(packed=True).values()]
    return [t.detach().clone().view(-1).view(torch.uint8) for t in tensors]


# Results


@pytest.mark.parametrize("compress", [pytest.param(False, marks=pytest.mark.proof), True])
def test_compiled_model_follows_codes_that_move(compress: bool) -> None:
    """Without a graph break, and with other codes at another address."""
    torch.compiler.reset()  # of what other tests compiled there may only be so much
    config = {"target_modules": ["up"]}  # a second layer is traced once more
    fused = fuse(four_bit_mlp(loaded=True, config=config, compress_statistics=compress))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_bitwise_equal(results(compiled, rows()), results(fused, rows()))
        weight = up(fused).base_layer.weight
        weight.data = torch.flipud(weight.data).clone()


@loaded_or_not
@pytest.mark.parametrize("storage", [torch.uint8, bf16], ids=str)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_format_equals_peft(quant_type, compress, storage, loaded) -> None:
    settings = {"quant_type": quant_type, "compress_statistics": compress, "compute_dtype": f32}
    stock, fused = pair(four_bit_mlp(loaded, **settings, quant_storage=storage))
    assert up(stock).base_layer.weight.dtype is storage
    want, before = results(stock, rows()), packed(fused)
    assert_close_derived(results(fused, rows()), want)
    assert_bitwise_equal(packed(fused), before)


@loaded_or_not
@pytest.mark.parametrize("autocast", [None, bf16], ids=str)
@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("compute", [None, f32, bf16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_dtypes_and_rounding_are_pefts(x_dtype, compute, adapter, autocast, loaded) -> None:
    model = four_bit_mlp(loaded, compute_dtype=compute)
    for name, module in model.named_modules():
        if "lora_" in name:
            module.to(adapter)
    wide, (stock, fused), x = up(in_float64(model)), pair(up(model)), rows(x_dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        want, got = results(stock, x), results(fused, x)
    coarsest = (compute or x_dtype, x_dtype, adapter, autocast or f32)
    assert_close(got, results(wide, x.double()), want, *coarsest)
    assert got["y"].dtype is x_dtype


@loaded_or_not
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_weights_that_were_16_bit_lose_no_more_than_peft(dtype: torch.dtype, loaded: bool) -> None:
    """Transformers loads them so: x, bias and weight before quantization in 16 bits."""
    model = four_bit_mlp(loaded, dtype=dtype, compute_dtype=dtype)
    wide, (stock, fused), x = up(in_float64(model)), map(up, pair(model)), rows(dtype)
    assert_close(results(fused, x), results(wide, x.double()), results(stock, x), dtype)


@loaded_or_not
@pytest.mark.parametrize("compute", [None, f32], ids=str)
def test_float64_is_exact(compute: torch.dtype | None, loaded: bool) -> None:
    """No codes are decoded beside it, and bitsandbytes' CPU kernel gets it wrong."""
    fused = fuse(four_bit_mlp(loaded, compute_dtype=compute).double())
    assert_close_derived(results(fused, rows(f64)), results(in_float64(fused), rows(f64)))
    assert {row.state for row in explain(fused, x_dtype=f64).rows} == {LIBRARY}


def test_a_compute_dtype_that_is_not_ours() -> None:
    fused = fuse(four_bit_mlp(compute_dtype=f64))
    for row in explain(fused).rows:
        assert row.state == ADAPTER and "compute_dtype is torch.float64" in row.reason
    assert fused(rows()).dtype is f32


@pytest.mark.parametrize("compute", [None, f32, bf16, f16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_compute_dtype_is_obeyed_to_the_bit(x_dtype, compute) -> None:
    """Too fine or too coarse a product would pass where only errors are bounded."""
    layer, x = up(fuse(four_bit_mlp(compute_dtype=compute))), rows(x_dtype)
    weight = QuantizedWeight.from_bitsandbytes(layer.base_layer.weight)
    adapter = (layer.lora_A.default.weight, layer.lora_B.default.weight, ALPHA / R)
    arguments = (x, weight, *adapter, layer.base_layer.bias)
    with lora_kernels.backend("eager"):  # kernels of some instruction sets keep more bits
        got = {dtype: lora_linear(*arguments, compute_dtype=dtype) for dtype in (f32, bf16, f16)}
        y, want = layer(x), got.pop(compute or x_dtype)
    assert_bitwise_equal(y, want)
    for dtype, other in got.items():  # beside x in bfloat16 the two finer ones may agree
        if x_dtype is f32 or bf16 in (dtype, compute or x_dtype):
            assert not torch.equal(y, other), dtype


def test_compute_dtype_is_settled_as_bitsandbytes_settles_it() -> None:
    """The first x settles it for good."""
    stock, fused = map(up, pair(four_bit_mlp()))
    for x in (rows(bf16), rows(f32)):
        assert fused(x).dtype is stock(x).dtype is x.dtype
        a, b = fused.base_layer, stock.base_layer
        assert a.compute_type_is_set and b.compute_type_is_set
        assert a.compute_dtype is b.compute_dtype is bf16


VARIANTS = [
    (variant, dropout, autocast, loaded)
    for variant in ("adalora", "dora")
    for dropout in (0.0, 0.4)
    for autocast in (None, bf16)
    for loaded in (False, True)
    if variant == "adalora" or (loaded and not autocast)
]


@pytest.mark.parametrize(("variant", "dropout", "autocast", "loaded"), VARIANTS)
def test_variant_over_4_bits_follows_its_formula(variant, dropout, autocast, loaded) -> None:
    """In float64 on the decoded weight, with AdaLoRA's mask that is ours and DoRA's, PEFT's own."""
    ada = variant == "adalora"
    base = MLP(partial(bnb.nn.Linear4bit, compute_dtype=f32, quant_type="nf4"), SIZES_4BIT)
    base.to("cpu").is_loaded_in_4bit = loaded
    config = {"target_modules": ["up"], "lora_dropout": dropout}
    model = adalora_mlp(f32, base, **config) if ada else add_lora(base, use_dora=True, **config)
    layer, kind = up(model.train()), type(up(model))
    fuse(model)
    names = ["lora_A", "lora_B", "lora_E" if ada else "lora_magnitude_vector"]
    found = [getattr(layer, name)["default"] for name in names]
    tensors = [getattr(each, "weight", each) for each in found]
    if ada:
        assert kind.__name__ == ("SVDLinear4bit" if loaded else "SVDLinear")
        assert type(layer).__name__ == f"Fused{kind.__name__}"
    x = rows()[0].requires_grad_()
    dy = torch.randn(len(x), SIZES_4BIT[1], generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    with torch.autocast("cpu", bf16, enabled=autocast is not None):
        state = explain(model).rows[0].state
        y = layer(x)
    assert y.dtype is f32 and state == KERNELS
    got = (y, *torch.autograd.grad(y, [x, *tensors], dy))

    weight, bias = decoded(layer.base_layer).double(), layer.base_layer.bias.detach().double()
    wide, A, B, last = (t.detach().double().requires_grad_() for t in (x, *tensors))
    torch.manual_seed(3)
    if ada:
        mask = Masked(draw_rng(), dropout) if dropout else nn.Identity()
        ref = wide @ weight.T + bias + mask(wide) @ (A * last).T @ B.T * ALPHA / (R + 1e-5)
    else:
        kept = nn.functional.dropout(torch.ones_like(x), dropout).double() if dropout else 1.0
        dropped, norm = wide * kept, (weight + ALPHA / R * B @ A).detach().norm(dim=1)
        z = dropped @ weight.T + ALPHA / R * (dropped @ A.T) @ B.T
        ref = last / norm * z + (wide - dropped) @ weight.T + bias
    want = (ref, *torch.autograd.grad(ref, [wide, A, B, last], dy.double()))
    # Float32 sums of at most 192 terms; under autocast x, W and y are rounded to 8 bits each.
    rtol = derived_rtol(f32, 192, layers=1 if ada else 2) if autocast is None else 2.0**-7
    assert_close_derived([t.double() for t in got], want, rtol)
    if ada and not autocast:
        unfuse(model)
        assert type(layer) is kind
        assert_close_derived(layer.eval()(x), fuse(model).base_model.model.up(x))


# Reports and behavior


@needs_native
@pytest.mark.parametrize("storage", [torch.uint8, bf16], ids=str)
@loaded_or_not
def test_explain_says_fused_for_every_x(loaded: bool, storage: torch.dtype) -> None:
    model = four_bit_mlp(loaded, quant_storage=storage)
    assert [row.reason for row in explain(model).rows] == ["not fused: call fuse()"] * 2
    explanation = explain(fuse(model))
    explanation.assert_fused(kernels=True)
    assert explanation.summary() == f"2 LoRA layers: 2 {KERNELS}"
    assert {(row.state, row.backend) for row in explanation.rows} == {(KERNELS, "cpu")}
    with torch.autocast("cpu", dtype=bf16):
        explain(model, x_dtype=f32).assert_fused(kernels=True)
    for x_dtype in (f32, bf16, f16):
        explain(model, x_dtype=x_dtype).assert_fused(kernels=True)


@loaded_or_not
def test_eval_forward_does_not_repack(loaded: bool) -> None:
    fused = fuse(four_bit_mlp(loaded, compute_dtype=f32))
    before, want = packed(fused), fused(rows())
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert_bitwise_equal(fused.eval()(rows()), want)
        assert_bitwise_equal(packed(fused), before)
        for layer in (up(fused), fused.base_model.model.down):
            state = layer.base_layer.weight.quant_state
            assert not getattr(state, "packing_format_for_cpu", False)
    assert {row.state for row in explain(fused).rows} <= {KERNELS, LIBRARY}


def disabled(model: Any, x: Tensor) -> None:
    with model.disable_adapter():
        model(x)


def merged(model: Any, x: Tensor) -> None:
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()


PEFT_FORWARDS: dict[str, Callable[[Any, Tensor], object]] = {
    "disabled": disabled,
    "merged": merged,
    "rows of the base": lambda model, x: model(x, adapter_names=["__base__"] * len(x)),
    "hooked": lambda model, x: up(model).base_layer.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("forward", PEFT_FORWARDS)
def test_eval_forward_of_pefts_does_not_repack_and_gradients_stay(forward: str) -> None:
    """bitsandbytes would repack the codes in it, after which gradients were off by 99 %."""
    fused = fuse(four_bit_mlp(True, compute_dtype=f32)).eval()
    with torch.no_grad():
        PEFT_FORWARDS[forward](fused, rows())
        fused(rows())
    for layer in (up(fused), fused.base_model.model.down):
        state = layer.base_layer.weight.quant_state
        assert not getattr(state, "packing_format_for_cpu", False)
    if forward != "merged":  # a merge quantizes again
        fresh = fuse(four_bit_mlp(True, compute_dtype=f32))
        assert_bitwise_equal(packed(fused), packed(fresh))
    if forward in ("disabled", "rows of the base"):
        assert_close_derived(results(fused.train(), rows()), results(fresh, rows()))
    base = up(unfuse(fused)).base_layer
    assert base.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()


@loaded_or_not
@pytest.mark.parametrize("fused_before", [False, True])
def test_repacked_weight_is_left_to_bitsandbytes(fused_before: bool, loaded: bool) -> None:
    model = four_bit_mlp(loaded, compute_dtype=f32)
    if not up(model).base_layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights where the CPU has AVX512-BF16 alone")
    if fused_before:
        fuse(model)(rows())
        unfuse(model)
    with torch.no_grad():
        want = model.eval()(rows())
        fuse(model)
        assert count_ops(lambda: up(model)(rows()))["lora_linear"] == 1
        # Their kernel rounds its operands to bfloat16: another order of the adapter's sums in one
        # layer may flip a few roundings in the next.
        assert_close_derived(model(rows()), want, tolerance.unit_roundoff(bf16))
    for row in explain(model).rows:
        assert row.state == ADAPTER and "repacked for its CPU kernel" in row.reason
    with pytest.raises(RuntimeError, match=r"2 adapter only(?s:.)*before its first eval forward"):
        explain(model).assert_fused()


@loaded_or_not
def test_weight_not_quantized_yet_is_adapter_only(loaded: bool) -> None:
    torch.manual_seed(0)
    model: Any = MLP(bnb.nn.Linear4bit, SIZES_4BIT)  # never moved to a device
    if loaded:
        model.is_loaded_in_4bit = True
    fused = fuse(add_lora(model, init_lora_weights=False))
    for row in explain(fused).rows:
        assert row.state == ADAPTER and "its weight is not quantized yet" in row.reason
    fused.to("cpu")
    assert {row.state for row in explain(fused).rows} <= {KERNELS, LIBRARY}
    assert count_ops(lambda: up(fused)(rows())) == {"lora_linear_quantized": 1}


def test_hook_or_subclass_of_the_base_is_obeyed() -> None:
    fused = fuse(four_bit_mlp(compute_dtype=f32))
    seen: list[Any] = []
    hook = up(fused).base_layer.register_forward_hook(lambda *args: seen.append(args))
    up(fused)(rows())
    assert len(seen) == 1 and explain(fused).rows[0].state == ADAPTER
    hook.remove()
    up(fused).base_layer.__class__ = type("Doubled", (bnb.nn.Linear4bit,), {})
    assert "Doubled is not exactly nn.Linear" in explain(fused).rows[0].reason


class Packed(nn.Parameter):
    """A weight in a format of its own."""


def test_weight_that_is_not_read_is_named() -> None:
    fused = fuse(four_bit_mlp(compute_dtype=f32))
    layer = up(fused)
    layer.lora_A.to("meta"), layer.lora_B.to("meta")
    assert explain(fused).rows[0].reason.startswith("base layer: its weight is on cpu, x on meta")
    fused = fuse(four_bit_mlp(compute_dtype=f32))
    base = up(fused).base_layer
    base.weight = Packed(base.weight.data, requires_grad=False)
    assert explain(fused).rows[0].reason.startswith("base layer: its weight is a Packed")


@loaded_or_not
def test_replaced_weight_is_seen(loaded: bool) -> None:
    model = fuse(four_bit_mlp(loaded, compute_dtype=f32))
    before, other = model(rows()), four_bit(quant_type="fp4", compute_dtype=f32)
    for name in ("up", "down"):
        getattr(model.base_model.model, name).base_layer.weight = getattr(other, name).weight
    got = model(rows())
    assert not torch.equal(got, before)
    assert_close_derived(unfuse(model)(rows()), got)


# Merging, which requantizes


def merge(model: Any, *adapters: str) -> None:
    with pytest.warns(UserWarning, match="rounding errors"):  # PEFT's own
        model.merge_adapter([*adapters] or None)


def test_merge_into_4_bits_says_what_it_alone_lost() -> None:
    """In `explain`, as the distance from the sum of the decoded weight and the adapter's."""
    model = fuse(four_bit_mlp(loaded=True))
    add_adapter(model)
    layer = up(model)
    for adapter in ("default", "second"):
        delta = layer.get_delta_weight(adapter).detach()
        want = decoded(layer.base_layer) + delta
        merge(model, adapter)
        lost = (decoded(layer.base_layer) - want).norm()  # to √12288 roundings, 7e-6
        assert layer.merge_loss.relative_to_weight == pytest.approx(
            float(lost / want.norm()), rel=1e-4
        )
        assert layer.merge_loss.relative_to_adapter == pytest.approx(
            float(lost / delta.norm()), rel=1e-4
        )
        assert lost > 0.01 * want.norm()
        for row in explain(model).rows:
            assert "rounding to 4 bits again moved the weight by" in row.reason
    with pytest.warns(UserWarning, match="rounding errors"):
        model.unmerge_adapter()
    assert layer.merge_loss is None and "merged" not in str(explain(model))


def test_unfuse_forgets_what_a_merge_into_4_bits_lost() -> None:
    model = fuse(four_bit_mlp(loaded=True))
    merge(model)
    assert up(model).merge_loss is not None
    assert up(fuse(unfuse(model))).merge_loss is None


def test_merge_of_a_dora_into_4_bits_is_not_measured() -> None:
    model = fuse(four_bit_mlp(loaded=True, config={"use_dora": True}))
    merge(model)
    assert up(model).merge_loss is None


def test_merge_again_keeps_what_the_merge_lost() -> None:
    model = fuse(four_bit_mlp(loaded=True))
    merge(model)
    lost = up(model).merge_loss
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert lost is not None and up(model).merge_loss is lost


@pytest.mark.parametrize("together", [True, False])
def test_merge_of_a_dora_beside_another_adapter_is_not_measured(together: bool) -> None:
    """Nor is the loss of the adapter that was merged before."""
    model = fuse(four_bit_mlp(loaded=True))
    add_adapter(model, use_dora=True)
    if together:
        merge(model, "default", "second")
    else:
        merge(model, "default")
        assert up(model).merge_loss is not None
        merge(model, "second")
    assert up(model).merge_loss is None


def test_merge_into_codes_that_cannot_be_read_is_not_measured(monkeypatch) -> None:
    model = fuse(four_bit_mlp(loaded=True))
    monkeypatch.setattr("lora_kernels.peft.linear4bit.unreadable_4bit", lambda *args: "repacked")
    monkeypatch.setattr("lora_kernels.peft.linear4bit.quantized_weight", None)
    merge(model)
    assert up(model).merged and up(model).merge_loss is None


def test_safe_merge_of_nan_leaves_the_codes() -> None:
    model = fuse(four_bit_mlp(loaded=True))
    before = packed(model)
    nn.init.constant_(up(model).lora_B["default"].weight, float("nan"))
    with (
        pytest.warns(UserWarning, match="rounding errors"),
        pytest.raises(ValueError, match="NaNs detected"),
    ):
        model.merge_adapter(safe_merge=True)
    assert_bitwise_equal(packed(model), before)
    assert not up(model).merged and up(model).merge_loss is None


def test_cached_weight_whose_memory_was_freed_is_made_again() -> None:
    """FSDP2 frees gathered codes, and those of another gathering may come to lie there."""
    from bitsandbytes.functional import quantize_4bit

    from lora_kernels.quantization.bitsandbytes import cached_weight

    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    first = cached_weight(packed, state)
    want = first.dequantize(torch.float32)
    assert cached_weight(packed, state) is first
    first.codes.packed.set_()  # type: ignore[call-overload]
    assert torch.equal(cached_weight(packed, state).dequantize(torch.float32), want)
