"""PEFT's LoRA over bitsandbytes' 4-bit linear, fused: what it computes, says, and leaves alone.

Sizes are multiples of 64: on a CPU, bitsandbytes' own kernel is wrong where a block straddles rows.
The stock model stays in training mode where it is called: in eval mode, without gradients,
bitsandbytes repacks the weight for a CPU with AVX512-BF16, and rounds its scales for good.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from lora_kernels import lora_linear
from lora_kernels.backends import native
from lora_kernels.measure import tolerance
from lora_kernels.peft import FusedLinear, explain, fuse, unfuse
from lora_kernels.peft.linear import Fused
from lora_kernels.quantization import Weight4bit

from .tiny import ALPHA, R, add_lora, assert_same, count_ops, pair, randomize, results

bnb = pytest.importorskip("bitsandbytes")
# Of a lora_bias beside a base without one, which cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True")
needs_native = pytest.mark.skipif(native.module is None, reason="no native kernels")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (64, 192, 128)
# Fewer than 2**9 terms in a sum, through two layers and back: under 2**7 unit roundoffs.
FLOAT32_RTOL = 2.0**-17
# Whether PEFT takes the model for one that transformers has loaded in 4 bits.
LOADED = [False, True]


class MLP(nn.Module):
    def __init__(self, linear: Any = nn.Linear) -> None:
        super().__init__()
        self.up = linear(SIZES[0], SIZES[1])
        self.down = linear(SIZES[1], SIZES[2], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def quantized(dtype: torch.dtype = f32, **kwargs: Any) -> MLP:
    torch.manual_seed(0)
    kwargs = {"quant_type": "nf4"} | kwargs
    return MLP(lambda *args, **more: bnb.nn.Linear4bit(*args, **kwargs, **more)).to(dtype).to("cpu")


def mlp(loaded: bool = False, config: dict[str, Any] | None = None, **kwargs: Any) -> PeftModel:
    model = quantized(**kwargs)
    if loaded:
        model.is_loaded_in_4bit = True
    return add_lora(model, init_lora_weights=False, **config or {})


def exact(model: PeftModel, config: dict[str, Any] | None = None) -> PeftModel:
    """The same model in float64 over the weights that the codes stand for."""
    dense = MLP()
    for name in ("up", "down"):
        base, linear = getattr(model.base_model.model, name).base_layer, getattr(dense, name)
        linear.weight = nn.Parameter(Weight4bit.from_bitsandbytes(base.weight).dequantize(f32))
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach().clone())
    wide = add_lora(dense, **config or {})
    state = {n: p for n, p in model.state_dict().items() if ".lora_" in n}
    assert not wide.load_state_dict(state, strict=False).unexpected_keys
    return wide.double()


def batch(dtype: torch.dtype = f32, width: int = SIZES[0]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 8, width, generator=generator).to(dtype)


def assert_close(
    got: dict[str, Tensor], ref: dict[str, Tensor], want: dict[str, Tensor], *dtypes: torch.dtype
) -> None:
    """dtypes are PEFT's, and little more is lost than PEFT loses (see tolerance)."""
    assert got.keys() == want.keys() == ref.keys() and len(got) > 3
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        u = tolerance.unit_roundoff(got[name].dtype, *dtypes)
        tolerance.assert_close(got[name], ref[name], want[name], u, name)


def layers(model: nn.Module) -> list[Fused]:
    return [module for module in model.modules() if isinstance(module, Fused)]


def packed(model: PeftModel) -> list[Tensor]:
    """Copies of all that bitsandbytes holds of its weights, as bytes, of which none is a NaN."""
    tensors = []
    for name in ("up", "down"):
        weight = getattr(model.base_model.model, name).base_layer.weight
        tensors += [weight.data, *weight.quant_state.as_dict(packed=True).values()]
    return [t.detach().clone().view(-1).view(torch.uint8) for t in tensors]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# What it computes


@pytest.mark.parametrize("compress", [False, True])
def test_compiles_without_graph_break(compress: bool) -> None:
    """And goes on with the codes at hand, other ones at another address."""
    torch.compiler.reset()  # of what other tests compiled there may only be so much
    fused = fuse(mlp(loaded=True, compress_statistics=compress))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for turn in range(2):
        got = {n.removeprefix("_orig_mod."): t for n, t in results(compiled, batch()).items()}
        want = results(fused, batch())
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), turn
        up = fused.base_model.model.up.base_layer
        up.weight.data = torch.flipud(up.weight.data).clone()


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("storage", [torch.uint8, bf16], ids=str)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_outputs_and_gradients(
    quant_type: str, compress: bool, storage: torch.dtype, loaded: bool
) -> None:
    model = mlp(
        loaded,
        compute_dtype=f32,
        quant_type=quant_type,
        compress_statistics=compress,
        quant_storage=storage,
    )
    stock, fused = pair(model)
    assert stock.base_model.model.up.base_layer.weight.dtype is storage
    want, before = results(stock, batch()), packed(fused)
    assert_same(results(fused, batch()), want, FLOAT32_RTOL)
    assert_equal(packed(fused), before)


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize(
    "config", [{"lora_bias": True}, {"r": 1}, {"r": 300}, {"use_rslora": True}], ids=str
)
def test_configurations(config: dict[str, Any], loaded: bool) -> None:
    stock, fused = pair(mlp(loaded, config, compute_dtype=f32))
    assert_same(results(fused, batch()), results(stock, batch()), FLOAT32_RTOL)


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("autocast", [None, bf16], ids=str)
@pytest.mark.parametrize("adapter", [f32, bf16], ids=str)
@pytest.mark.parametrize("compute", [None, f32, bf16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_dtypes_and_rounding(
    x_dtype: torch.dtype,
    compute: torch.dtype | None,
    adapter: torch.dtype,
    autocast: torch.dtype | None,
    loaded: bool,
) -> None:
    model = mlp(loaded, compute_dtype=compute)
    for name, module in model.named_modules():
        if "lora_" in name:
            module.to(adapter)
    wide = exact(model).base_model.model.up
    stock, fused = pair(model.base_model.model.up)
    x = batch(x_dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        want, got = results(stock, x), results(fused, x)
    coarsest = (compute or x_dtype, x_dtype, adapter, autocast or f32)
    assert_close(got, results(wide, x.double()), want, *coarsest)
    assert got["y"].dtype is x_dtype


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_weights_that_were_16_bit(dtype: torch.dtype, loaded: bool) -> None:
    """As transformers loads them: x, bias and weight before quantization in 16 bits."""
    model = mlp(loaded, dtype=dtype, compute_dtype=dtype)
    wide = exact(model)
    stock, fused = (m.base_model.model.up for m in pair(model))
    x = batch(dtype)
    ref = results(wide.base_model.model.up, x.double())
    assert_close(results(fused, x), ref, results(stock, x), dtype)


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("compute", [None, f32], ids=str)
def test_float64(compute: torch.dtype | None, loaded: bool) -> None:
    """No codes are decoded beside it, and bitsandbytes' CPU kernel gets it wrong: it is exact."""
    fused = fuse(mlp(loaded, compute_dtype=compute).double())
    x = batch(torch.float64)
    assert_same(results(fused, x), results(exact(fused), x))
    assert {row.state for row in explain(fused, x_dtype=torch.float64).rows} == {"not fused"}


def test_a_compute_dtype_that_is_not_ours() -> None:
    fused = fuse(mlp(compute_dtype=torch.float64))
    for row in explain(fused).rows:
        assert row.state == "adapter only" and "compute_dtype is torch.float64" in row.reason
    assert fused(batch()).dtype is f32


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("shape", [(SIZES[0],), (0, SIZES[0]), (1, SIZES[0]), (2, 1, 3, SIZES[0])])
def test_shapes(shape: tuple[int, ...], loaded: bool) -> None:
    stock, fused = pair(mlp(loaded, compute_dtype=f32))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    got, want = fused(x), stock(x)
    assert got.shape == want.shape and got.dtype is want.dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loaded", LOADED)
def test_dropout(loaded: bool) -> None:
    """Masks differ; in eval mode there is none, and the expectation is the same."""
    config = {"lora_dropout": 0.5}
    model = mlp(loaded, config, compute_dtype=f32)
    wide = exact(model, config).eval()
    _, fused = pair(model)
    up = fused.base_model.model.up
    x, want = batch(), wide.base_model.model.up(batch().double()).float()
    assert not torch.equal(up(x), up(x))
    mean = torch.stack([up(x) for _ in range(400)]).mean(0)
    spread = torch.stack([up(x) for _ in range(50)]).std(0)
    # A mean of 400 lies within 6 standard deviations of itself, 20 times smaller than one's.
    assert ((mean - want).abs() <= 6 * spread.clamp_min(spread.mean()) / 20).all()
    torch.testing.assert_close(up.eval()(x), want)


@pytest.mark.parametrize("loaded", LOADED)
def test_several_adapters(loaded: bool) -> None:
    model = mlp(loaded, compute_dtype=f32)
    config = copy.copy(model.peft_config["default"])
    config.r, config.lora_alpha = 3, 4
    model.add_adapter("second", config)
    randomize(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    stock, fused = pair(model)
    got, want = results(fused, batch()), results(stock, batch())
    assert sum(".second." in name for name in got) == 4
    assert_same(got, want, FLOAT32_RTOL)
    assert count_ops(lambda: fused.base_model.model.up(batch())) == {"lora_linear_4bit": 1}
    assert "stacked" in explain(fused).rows[0].reason


@pytest.mark.parametrize("compute", [None, f32, bf16, f16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16], ids=str)
def test_compute_dtype(x_dtype: torch.dtype, compute: torch.dtype | None) -> None:
    """Bit for bit: too fine or too coarse a product would pass where only errors are bounded."""
    up = fuse(mlp(compute_dtype=compute)).base_model.model.up
    base, adapters = up.base_layer, (up.lora_A.default.weight, up.lora_B.default.weight)
    weight, scaling = Weight4bit.from_bitsandbytes(base.weight), ALPHA / R
    got = {
        dtype: lora_linear(
            batch(x_dtype), weight, *adapters, scaling, base.bias, compute_dtype=dtype
        )
        for dtype in (f32, bf16, f16)
    }
    y, want = up(batch(x_dtype)), got.pop(compute or x_dtype)
    assert torch.equal(y, want)
    for dtype, other in got.items():  # beside x in bfloat16 the two finer ones may agree
        if x_dtype is f32 or bf16 in (dtype, compute or x_dtype):
            assert not torch.equal(y, other), dtype


def test_compute_dtype_is_settled_as_bitsandbytes_settles_it() -> None:
    """By the first x, for good."""
    stock, fused = (m.base_model.model.up for m in pair(mlp()))
    for x in (batch(bf16), batch(f32)):
        got, want = fused(x), stock(x)
        assert got.dtype is want.dtype is x.dtype
        a, b = fused.base_layer, stock.base_layer
        assert a.compute_type_is_set and b.compute_type_is_set
        assert a.compute_dtype is b.compute_dtype is bf16


# What it says and does


@needs_native
@pytest.mark.parametrize("storage", [torch.uint8, bf16], ids=str)
@pytest.mark.parametrize("loaded", LOADED)
def test_explain(loaded: bool, storage: torch.dtype) -> None:
    model = mlp(loaded, quant_storage=storage)
    assert [row.reason for row in explain(model).rows] == ["fuse() was not called"] * 2
    explanation = explain(fuse(model))
    explanation.assert_fused()
    assert "2 LoRA layers: 2 fused" in str(explanation)
    assert {(row.state, row.backend) for row in explanation.rows} == {("fused", "cpu")}
    with torch.autocast("cpu", dtype=bf16):
        explain(model, x_dtype=f32).assert_fused()
    for x_dtype in (f32, bf16, f16):
        explain(model, x_dtype=x_dtype).assert_fused()


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("grad", [True, False])
def test_one_op_and_no_other_product(grad: bool, loaded: bool) -> None:
    _, fused = pair(mlp(loaded, {"lora_bias": True}))
    up, x = fused.base_model.model.up, batch().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        assert count_ops(lambda: up(x)) == {"lora_linear_4bit": 1}
    if grad:
        y = up(x)
        assert count_ops(lambda: y.sum().backward()) == {"lora_linear_backward_4bit": 1}


@pytest.mark.parametrize("loaded", LOADED)
def test_eval_forward_does_not_repack(loaded: bool) -> None:
    fused = fuse(mlp(loaded, compute_dtype=f32))
    before, want = packed(fused), fused(batch()).detach()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            y = fused.eval()(batch())
        assert torch.equal(y, want)
        assert_equal(packed(fused), before)
        for name in ("up", "down"):
            state = getattr(fused.base_model.model, name).base_layer.weight.quant_state
            assert not getattr(state, "packing_format_for_cpu", False)
    assert {row.state for row in explain(fused).rows} <= {"fused", "not fused"}


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("fused_before", [False, True])
def test_a_repacked_weight_is_bitsandbytes_own(fused_before: bool, loaded: bool) -> None:
    model = mlp(loaded, compute_dtype=f32)
    if not model.base_model.model.up.base_layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights where the CPU has AVX512-BF16 alone")
    if fused_before:
        fuse(model)(batch())
        unfuse(model)
    with torch.no_grad():
        want = model.eval()(batch())
        fuse(model)
        assert count_ops(lambda: model.base_model.model.up(batch()))["lora_linear"] == 1
        # Their kernel rounds its operands to bfloat16: another order of the adapter's sums in one
        # layer may flip a few roundings in the next.
        error = (model(batch()) - want).norm() / want.norm()
        assert error < tolerance.unit_roundoff(bf16)
    for row in explain(model).rows:
        assert row.state == "adapter only"
        assert "repacked for its CPU kernel" in row.reason
    with pytest.raises(RuntimeError, match=r"2 adapter only(?s:.)*before its first eval forward"):
        explain(model).assert_fused()


@pytest.mark.parametrize("loaded", LOADED)
def test_a_weight_not_quantized_yet(loaded: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = MLP(bnb.nn.Linear4bit)  # never moved to a device
    if loaded:
        model.is_loaded_in_4bit = True
    fused = fuse(add_lora(model, init_lora_weights=False))
    for row in explain(fused).rows:
        assert row.state == "adapter only"
        assert "its weight is not quantized yet" in row.reason
    fused.to("cpu")
    assert {row.state for row in explain(fused).rows} <= {"fused", "not fused"}
    assert count_ops(lambda: fused.base_model.model.up(batch())) == {"lora_linear_4bit": 1}


def test_what_else_is_on_the_base_is_obeyed() -> None:
    fused = fuse(mlp(compute_dtype=f32))
    up = fused.base_model.model.up
    seen: list[Any] = []
    hook = up.base_layer.register_forward_hook(lambda *args: seen.append(args))
    up(batch())
    assert len(seen) == 1 and explain(fused).rows[0].state == "adapter only"
    hook.remove()

    class Doubled(bnb.nn.Linear4bit):  # type: ignore[misc,name-defined]
        pass

    up.base_layer.__class__ = Doubled
    assert "Doubled is not exactly nn.Linear" in explain(fused).rows[0].reason


# fuse and unfuse


@pytest.mark.parametrize("loaded", LOADED)
def test_fuse_twice_and_unfuse(loaded: bool) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    from lora_kernels.peft.linear4bit import FusedLinear4bit

    model = mlp(loaded, compute_dtype=f32)
    stock_class, fused_class = (
        (Linear4bit, FusedLinear4bit) if loaded else (lora.Linear, FusedLinear)
    )
    up, down = model.base_model.model.up, model.base_model.model.down
    assert type(up) is type(down) is stock_class
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    before = [vars(layer).copy() for layer in (up, down)]
    want = model(batch())
    for _ in range(2):
        assert fuse(model) is model
        assert type(up) is type(down) is fused_class and layers(model) == [up, down]
        for layer, known in zip((up, down), before, strict=True):
            assert vars(layer).keys() - {"_prepared"} == known.keys()
            assert all(vars(layer)[name] == value for name, value in known.items())
        torch.testing.assert_close(model(batch()), want)
        assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert unfuse(model) is model
    assert type(up) is type(down) is stock_class and list(model.state_dict()) == keys
    assert [vars(layer) for layer in (up, down)] == before
    assert torch.equal(model(batch()), want)


@pytest.mark.parametrize("loaded", LOADED)
def test_state_dict_and_saved_files_are_the_same(loaded: bool, tmp_path: Path) -> None:
    stock, fused = pair(mlp(loaded, compute_dtype=f32))
    stock(batch()), fused(batch())
    a, b = stock.state_dict(), fused.state_dict()
    assert list(a) == list(b)
    assert_equal(list(b.values()), list(a.values()))
    files = []
    for name, model in (("stock", stock), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone: Any, loaded: bool) -> None:
    """A copy's weight is its own, and holds nothing of the first."""
    model = fuse(mlp(loaded, compute_dtype=f32))
    want = model(batch()).detach()
    fresh = len(pickle.dumps(mlp(loaded, compute_dtype=f32)))
    assert len(pickle.dumps(model)) < 1.1 * fresh
    other, before = clone(model), packed(model)
    for name in ("up", "down"):
        weight = getattr(model.base_model.model, name).base_layer.weight
        weight.data.zero_()
        weight.quant_state.absmax.zero_()
    assert_equal(packed(other), before)
    torch.testing.assert_close(other(batch()), want)
    assert (model(batch()) - want).norm() > want.norm() / 8


@pytest.mark.parametrize("loaded", LOADED)
def test_a_weight_that_was_replaced(loaded: bool) -> None:
    model = fuse(mlp(loaded, compute_dtype=f32))
    before, other = model(batch()), quantized(quant_type="fp4", compute_dtype=f32)
    for name in ("up", "down"):
        getattr(model.base_model.model, name).base_layer.weight = getattr(other, name).weight
    got = model(batch())
    assert not torch.equal(got, before)
    torch.testing.assert_close(unfuse(model)(batch()), got)


@pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
def test_merge_and_disable() -> None:
    """PEFT's own, which requantizes: the fused model sees the new weight, and the same."""
    stock, fused = pair(mlp(True, compute_dtype=f32))
    fused(batch())
    for model in (stock, fused):
        model.merge_adapter()
    torch.testing.assert_close(fused(batch()), stock(batch()))
    assert all("merged" in row.reason for row in explain(fused).rows)
    for model in (stock, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(fused(batch()), stock(batch()))
    assert count_ops(lambda: fused.base_model.model.up(batch())) == {"lora_linear_4bit": 1}
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(batch()), stock(batch()))


def test_sgd_updates() -> None:
    for loaded, compute in itertools.product(LOADED, (None, f32)):
        stock, fused = pair(mlp(loaded, compute_dtype=compute))
        before = {n: p.detach().clone() for n, p in stock.named_parameters() if p.requires_grad}
        for model in (stock, fused):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            for step in range(5):
                optimizer.zero_grad()
                (model(batch()) - step).square().mean().backward()
                optimizer.step()
        got, want = (
            {n: p.detach() - before[n] for n, p in m.named_parameters() if n in before}
            for m in (fused, stock)
        )
        # Five steps, each from where the one before has led.
        assert_same(got, want, rtol=4 * FLOAT32_RTOL)


def test_trains_after_inference_mode() -> None:
    """What is kept from call to call can be saved for a backward."""
    model, x = fuse(mlp()), torch.randn(3, SIZES[0])
    with torch.inference_mode():
        want = model(x)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, want)


def test_a_merge_into_4_bits_says_what_it_lost() -> None:
    """In `explain`, as the distance from the sum of the decoded weight and the adapter's."""
    model = fuse(mlp(loaded=True))
    layer = model.base_model.model.up
    before = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32)
    delta = layer.get_delta_weight("default").detach()
    want = before + delta
    with pytest.warns(UserWarning, match="rounding errors"):  # PEFT's own
        model.merge_adapter()
    got = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32)
    lost = float((got - want).norm() / want.norm())
    assert lost > 0.01 and layer.merge_loss.of_weight == pytest.approx(lost, rel=1e-4)
    assert layer.merge_loss.of_adapter == pytest.approx(
        float((got - want).norm() / delta.norm()), rel=1e-4
    )
    for row in explain(model).rows:
        assert "rounding to 4 bits again moved the weight by" in row.reason
    with pytest.warns(UserWarning, match="rounding errors"):
        model.unmerge_adapter()
    assert layer.merge_loss is None and "merged" not in str(explain(model))


def test_a_second_merge_into_4_bits_says_what_it_alone_lost() -> None:
    model = fuse(mlp(loaded=True))
    model.add_adapter("second", model.peft_config["default"])
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.lora_B["second"].weight.normal_()
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter(["default"])
    before = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32)
    want = before + layer.get_delta_weight("second").detach()
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter(["second"])
    got = Weight4bit.from_bitsandbytes(layer.base_layer.weight).dequantize(f32)
    lost = float((got - want).norm() / want.norm())
    assert layer.merge_loss.of_weight == pytest.approx(lost, rel=1e-4)


def test_a_dora_s_merge_into_4_bits_is_not_measured() -> None:
    model = fuse(mlp(loaded=True, config={"use_dora": True}))
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()
    assert model.base_model.model.up.merge_loss is None
