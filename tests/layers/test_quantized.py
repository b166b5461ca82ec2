"""QLoRALinear: `lora_linear` over its bytes, and the bytes' life."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels
from lora_kernels import lora_linear
from lora_kernels.layers import (
    LoRALinear,
    QLoRALinear,
    count_lora_parameters,
    load_lora_weights,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)
from lora_kernels.oracle import forms
from lora_kernels.oracle.tolerance import unit_roundoff
from lora_kernels.quantization import quantize_4bit
from tests.support.assertions import (
    assert_bitwise_equal,
    assert_close_derived,
)
from tests.support.models import gradients

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
R, ALPHA = 5, 7
# N, K: rows of whole blocks; blocks that straddle rows; an odd number of elements
SIZES = [(33, 128), (33, 70), (33, 63)]
BYTES = ["weight", "weight_absmax", "weight_code"]
NESTED = ["weight_nested_absmax", "weight_nested_code", "weight_offset"]


def make_layer(N=33, K=70, seed=0, **kwargs):
    """A layer as if it had been trained: B and the bias are not zero."""
    torch.manual_seed(seed)
    layer = QLoRALinear(K, N, R, ALPHA, **kwargs)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer


def batch(K=70, dtype=f32, M=17):
    return torch.randn(3, M, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def stored(layer):
    """Copies of the bytes that stand for the weight."""
    names = [name for name in BYTES + NESTED if getattr(layer, name) is not None]
    assert names[3:] == NESTED * layer.quantized.nested or names[3:] == ["weight_nested_code"]
    return {name: layer.get_parameter(name).detach().clone() for name in names}


def assert_stored(layer, want):
    assert stored(layer).keys() == want.keys()
    for name, t in want.items():
        param = layer.get_parameter(name)
        assert param.dtype is torch.uint8 and param.dim() == 1 and not param.requires_grad
        assert torch.equal(param, t), name
    held = layer.quantized
    assert held.packed.data_ptr() == layer.weight.data_ptr()
    assert_bitwise_equal(held.code.view(torch.uint8), layer.weight_code)
    if held.offset is not None:
        assert held.offset.data_ptr() == layer.weight_offset.data_ptr()


# Arithmetic


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        *(
            (size, {"quant_type": quant_type, "double_quant": nested})
            for size in SIZES
            for quant_type in ("nf4", "fp4")
            for nested in (False, True)
        ),
        *(((33, 70), {"blocksize": blocksize}) for blocksize in (32, 4096)),
        *(
            ((33, 96), {"quant_type": quant_type, "double_quant": nested})
            for quant_type in ("mxfp4", "nvfp4")
            for nested in (False, True)
        ),
        *(((33, 70), {"lora_dtype": dtype}) for dtype in (f32, bf16, f16)),
        *(((33, 70), {"dtype": dtype}) for dtype in (bf16, f16)),
    ],
    ids=str,
)
def test_layer_of_every_format_and_dtype_is_lora_linear_of_its_parts(size, options, bias):
    layer = make_layer(*size, bias=bias, **options)
    weight, dtype = layer.quantized, options.get("dtype", f32)
    found = {"quant_type": weight.quant_type, "double_quant": weight.nested}
    found |= {"blocksize": weight.blocksize, "dtype": weight.dtype}
    found["lora_dtype"] = layer.lora_B.dtype if layer.lora_A.dtype is layer.lora_B.dtype else None
    assert found | options == found
    if bias:
        assert layer.bias.dtype is dtype
        layer.bias.requires_grad_()
    x, adapter = batch(size[1], dtype), (layer.lora_A, layer.lora_B, ALPHA / R)
    want = gradients(layer, x, lambda x: lora_linear(x, weight, *adapter, layer.bias))
    assert_bitwise_equal(gradients(layer, x), want)


@pytest.mark.parametrize("compute_dtype", [None, f32, bf16])
@pytest.mark.parametrize("x_dtype", [f32, bf16])
def test_compute_dtype_is_obeyed_to_the_bit(x_dtype, compute_dtype):
    layer, x = make_layer(compute_dtype=compute_dtype), batch(dtype=x_dtype)
    plain = x, layer.quantized, layer.lora_A, layer.lora_B, layer.scaling
    with lora_kernels.backend("eager"):  # kernels of some instruction sets keep more bits
        y = layer(x)
        assert y.dtype is x_dtype
        assert_bitwise_equal(y, lora_linear(*plain, compute_dtype=compute_dtype))
        assert torch.equal(y, lora_linear(*plain)) is (compute_dtype in (None, x_dtype))
        with torch.autocast("cpu", bf16):
            assert_bitwise_equal(layer(x), lora_linear(*plain))


def test_a_backward_keeps_no_dense_weight():
    saved = []
    layer, x = make_layer(N=64, K=128), batch(128)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert saved and not any(t.is_floating_point() and t.numel() == 64 * 128 for t in saved)


@pytest.mark.parametrize("x_dtype", [f32, bf16, f16], ids=str)
def test_disabled_layer_is_its_base_in_any_dtype(x_dtype):
    layer, x = make_layer(bias=True, dropout=0.5), batch(dtype=x_dtype)
    layer.enabled = False
    y = layer(x)
    want = F.linear(x, layer.quantized.dequantize(x_dtype), layer.bias.to(x_dtype))
    assert_bitwise_equal(y, want)
    layer.merge()
    assert_bitwise_equal(layer(x), want)
    with torch.autocast("cpu", bf16):
        assert layer(x).dtype is bf16
    layer.unmerge()
    layer.enabled = True
    assert not torch.equal(layer.eval()(x), want)


# The bytes and what moves, copies and stores them


@pytest.mark.parametrize("double_quant", [False, True])
def test_parameters_are_bytes_and_adapter(double_quant):
    layer = make_layer(bias=True, double_quant=double_quant)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    uint8 = [n for n, p in layer.named_parameters() if p.dtype is torch.uint8]
    assert uint8 == BYTES + NESTED * double_quant
    assert list(layer.state_dict()) == [n for n, _ in layer.named_parameters()]
    assert layer.weight.numel() == 33 * 70 // 2
    assert sum(t.numel() for t in stored(layer).values()) == layer.quantized.nbytes
    assert layer.quantized is layer.quantized


@pytest.mark.parametrize("dtype", [bf16, f16, f64, None])
def test_to_dtype_leaves_the_bits_alone(dtype):
    layer = make_layer(bias=True)
    want, decoded = stored(layer), layer.quantized.dequantize(f32)
    moved = layer.half() if dtype is f16 else layer.to(dtype) if dtype else layer.bfloat16()
    assert moved is layer
    assert_stored(layer, want)
    assert layer.lora_A.dtype is layer.bias.dtype is (dtype or bf16)
    assert_bitwise_equal(layer.quantized.dequantize(f32), decoded)
    assert layer.quantized.dtype is f32
    if dtype is f64:
        with pytest.raises(TypeError, match="float64"):
            layer(batch(dtype=dtype))
        return
    y = layer(batch(dtype=dtype or bf16))
    assert y.dtype is (dtype or bf16)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("store", ["memory", "torch.save", "safetensors"])
def test_state_dict_loads_anywhere(store, size, double_quant, meta, tmp_path):
    kwargs = {"bias": True, "double_quant": double_quant}
    kwargs |= {} if size[1] % 16 else {"quant_type": "nvfp4"}
    layer, x = make_layer(*size, **kwargs), batch(size[1])
    y, want, state = layer(x), stored(layer), layer.state_dict()
    if store == "torch.save":
        torch.save(state, tmp_path / "state")
        state = torch.load(tmp_path / "state")
    elif store == "safetensors":
        save_file(state, tmp_path / "state")
        state = load_file(tmp_path / "state")
    other = make_layer(*size, seed=7, device="meta" if meta else None, **kwargs)
    if not meta:
        assert not torch.equal(other(x), y)
    other.load_state_dict(state, assign=meta)
    assert_stored(other, want)
    assert_bitwise_equal(other(x), y)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(("storage_offset", "address"), [(0, 1), (1, 0), (1, 1)])
def test_bytes_that_float32_cannot_view_load(storage_offset, address):
    """PyTorch wants a whole number of float32 before them; a CPU, an aligned address."""
    layer, state = make_layer(bias=True), {}
    for name, t in layer.state_dict().items():
        state[name] = t
        if t.dtype is torch.uint8:
            pool = bytearray(t.numel() + 8)
            start = torch.frombuffer(pool, dtype=torch.uint8).data_ptr()
            first = (address - storage_offset - start) % 4
            whole = torch.frombuffer(pool, dtype=torch.uint8, offset=first)
            state[name] = whole[storage_offset : storage_offset + t.numel()].copy_(t)
            assert state[name].storage_offset() == storage_offset
            assert state[name].data_ptr() % 4 == address
    other = make_layer(bias=True, device="meta")
    other.load_state_dict(state, assign=True)
    assert_bitwise_equal(other(batch()), layer(batch()))
    assert all(other.get_parameter(name).data_ptr() % 4 == 0 for name in BYTES + NESTED)


def test_states_of_another_format_are_refused():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="weight_offset"):
        layer.load_state_dict(make_layer(double_quant=False).state_dict())
    with pytest.raises(RuntimeError, match="weight_absmax"):
        layer.load_state_dict(make_layer(blocksize=128).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(LoRALinear(70, 33, R).state_dict(), strict=False)


def test_quantized_weight_follows_the_parameters():
    layer, other, x = make_layer(), make_layer(seed=7), batch()
    want = other.quantized.dequantize()
    assert not torch.equal(layer.quantized.dequantize(), want)
    layer.load_state_dict(other.state_dict())  # in place
    assert_bitwise_equal(layer.quantized.dequantize(), want)
    third = make_layer(seed=8)
    for name in BYTES + NESTED:  # replaced
        setattr(layer, name, nn.Parameter(getattr(third, name).detach().clone(), False))
    assert_bitwise_equal(layer.quantized.dequantize(), third.quantized.dequantize())
    for name in BYTES + NESTED:  # moved
        getattr(layer, name).data = getattr(other, name).data.clone()
    assert_bitwise_equal(layer.quantized.dequantize(), want)
    layer.share_memory()
    assert layer.quantized.packed.is_shared() and torch.equal(layer.quantized.dequantize(), want)
    layer.to("meta")
    assert layer.quantized.device.type == "meta"
    layer.to_empty(device="cpu").load_state_dict(third.state_dict())
    assert_bitwise_equal(layer(x), third(x))


# Other ways to make one


def test_layer_starts_as_its_base():
    torch.manual_seed(0)
    linear = nn.Linear(70, 33)
    torch.manual_seed(0)
    layer, x = QLoRALinear(70, 33, r=R, bias=True), batch()
    want = quantize_4bit(linear.weight)
    assert_bitwise_equal(layer.quantized.packed, want.packed)
    assert_bitwise_equal(layer.quantized.scales(), want.scales())
    assert torch.equal(layer.bias, linear.bias) and torch.count_nonzero(layer.lora_B) == 0
    assert_close_derived(layer(x), F.linear(x, want.dequantize(), linear.bias))


def test_from_linear_quantizes_and_leaves_the_linear():
    linear = nn.Linear(70, 33, dtype=bf16).eval()
    layer = QLoRALinear.from_linear(
        linear, R, ALPHA, 0.5, quant_type="fp4", blocksize=32, double_quant=False, compute_dtype=f32
    )
    assert layer.bias is linear.bias and not linear.weight.requires_grad
    assert linear.weight.dtype is bf16 and not layer.training and layer.compute_dtype is f32
    want = quantize_4bit(linear.weight, "fp4", 32, False)
    assert torch.equal(layer.weight, want.packed) and repr(layer.quantized) == repr(want)
    assert layer.lora_A.dtype is f32 and layer.scaling == ALPHA / R
    with pytest.raises(TypeError, match="linear: got LoRALinear, want exactly"):
        QLoRALinear.from_linear(LoRALinear(12, 10))


def test_from_quantized_shares_memory():
    for double_quant in (False, True):
        weight = quantize_4bit(torch.randn(33, 70), double_quant=double_quant)
        bias = torch.randn(33)
        layer = QLoRALinear.from_quantized(weight, R, ALPHA, bias=bias, compute_dtype=bf16)
        held = layer.quantized
        for field in ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"):
            want, got = getattr(weight, field), getattr(held, field)
            assert (want is None) is (got is None)
            assert want is None or got.data_ptr() == want.data_ptr(), field
        assert layer.bias.data_ptr() == bias.data_ptr() and not layer.bias.requires_grad
        assert layer.lora_A.requires_grad and layer.scaling == ALPHA / R
        assert layer.compute_dtype is bf16 and repr(held) == repr(weight)
        assert torch.count_nonzero(layer.lora_A) and not torch.count_nonzero(layer.lora_B)


FORMS = (
    "signed4-64", "int4-32-half-shift", "int8-16-nested-shift", "uint8-32-shift", "e4m3-64-half",
    "int4-16-nested",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_layer_of_any_form_has_its_weight_through_copies_casts_and_files(form, tmp_path):
    weight, other = (forms.build(torch.randn(33, 64), form) for _ in range(2))
    layer = QLoRALinear.from_quantized(weight, R, ALPHA)
    loaded = QLoRALinear.from_quantized(other, R, ALPHA)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x, want = batch(64), weight.dequantize(f32)
    for each in (layer, loaded, copy.deepcopy(layer), copy.deepcopy(layer).to(bf16)):
        held = each.quantized
        for field in ("packed", "absmax", "code", "nested_absmax", "nested_code"):
            pair = getattr(weight, field), getattr(held, field)
            assert (pair[0] is None) is (pair[1] is None)
            if pair[0] is not None:
                assert pair[0].dtype is pair[1].dtype and pair[0].shape == pair[1].shape, field
                assert torch.equal(*(t.view(torch.uint8) for t in pair)), field
        assert repr(held) == repr(weight) and weight.format in repr(each)
        assert_bitwise_equal(held.dequantize(f32), want)
    assert_close_derived(layer(x), (x.double() @ want.double().t()).to(f32))
    assert_bitwise_equal(loaded(x), layer(x))
    assert_bitwise_equal(layer.merged_layer().layer.weight, want)
    with pytest.raises(ValueError, match=f"requantize: got a weight of {weight.format}"):
        layer.merged_layer(requantize=True)


# Merging


@pytest.mark.parametrize("weight_dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16, f16], ids=str)
def test_merged_layer_takes_any_x(x_dtype, weight_dtype):
    """The result has x's dtype, or autocast's, as before merging."""
    layer, x = make_layer(bias=True, dtype=weight_dtype).eval(), batch(dtype=x_dtype)
    y = layer(x)
    layer.merge()
    u = unit_roundoff(x_dtype, weight_dtype)
    got = layer(x)
    assert got.dtype is y.dtype is x_dtype
    # Roundings of the weights, the sum and the result, each under u in norm.
    assert (got.double() - y.double()).norm() < 4 * u * y.double().norm()
    with torch.autocast("cpu", bf16):
        assert layer(x).dtype is bf16


def test_merged_layer_moves_to_other_dtypes():
    layer = make_layer(bias=True).eval()
    layer.to(bf16)
    layer.merge()
    assert layer(batch(dtype=bf16)).dtype is bf16
    layer.half()
    assert layer(batch(dtype=f16)).dtype is f16


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "mxfp4", "nvfp4"])
def test_merged_layer_is_a_linear_or_4_bits_again(quant_type, double_quant):
    kwargs = {"quant_type": quant_type, "double_quant": double_quant}
    layer = make_layer(K=64, bias=True, **kwargs).eval()
    x = batch(64)
    y, want = layer(x), stored(layer)
    B, A = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    exact = layer.quantized.dequantize(f64) + layer.scaling * B @ A

    linear, change = layer.merged_layer()
    assert type(linear) is nn.Linear and not linear.training
    assert linear.weight.dtype is f32 and not linear.weight.requires_grad
    assert change < 1e-7 and math.isclose(
        change, (linear.weight.double() - exact).norm() / exact.norm(), abs_tol=1e-7
    )
    assert_close_derived(linear(x), y)

    again, change = layer.merged_layer(requantize=True)
    assert type(again) is QLoRALinear and not again.training and again.init == layer.init
    assert (again.r, again.alpha, again.quant_type) == (R, ALPHA, quant_type)
    layer.scaling = 0.7  # as rsLoRA's, not alpha / r
    assert layer.merged_layer(requantize=True).layer.scaling == 0.7
    layer.scaling = again.scaling
    assert again.quantized.nested is double_quant and not torch.count_nonzero(again.lora_B)
    held = again.quantized.dequantize(f64)
    assert math.isclose(change, (held - exact).norm() / exact.norm(), rel_tol=1e-4)
    # A step of 4 bits is up to a third of the largest of a block; the rms is a tenth of the rms.
    assert 0.02 < change < 0.3
    error = (again(x) - y).norm() / y.norm()
    assert change / 4 < error < 4 * change

    linear.bias.zero_()
    assert torch.count_nonzero(layer.bias) == 33
    assert_stored(layer, want)
    assert torch.equal(layer(x), y) and not layer.merged


@pytest.mark.parametrize("requantize", [False, True])
def test_merged_change_is_of_the_sum_in_float32(requantize):
    """Neither W̃, nor the sum, nor the weights of the new layer are rounded before."""
    layer = make_layer(dtype=bf16)
    update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    want = layer.quantized.dequantize(f32).double() + update
    made, change = layer.merged_layer(requantize)
    held = made.quantized.dequantize(f32) if requantize else made.weight
    assert math.isclose(change, (held.double() - want).norm() / want.norm(), rel_tol=1e-5)


@pytest.mark.parametrize("requantize", [False, True])
def test_merged_layer_of_a_moved_layer_runs(requantize):
    """The bias has moved with the module; the layer is in the weight's dtype all over."""
    layer = make_layer(bias=True).to(bf16)
    assert layer.merged_layer(requantize).layer(batch()).dtype is f32
    layer = make_layer(bias=True, dtype=bf16).float()
    assert layer.merged_layer(requantize).layer(batch(dtype=bf16)).dtype is bf16


# Other functions on the layer


class Model(nn.Module):
    def __init__(self, cls, **kwargs):
        super().__init__()
        self.up = cls(70, 33, R, ALPHA, bias=True, **kwargs)
        self.down = nn.Linear(33, 8)
        nn.init.normal_(self.up.lora_B)


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_adapter_functions_leave_the_bytes(cls, tmp_path, capsys):
    model, path = Model(cls), tmp_path / "adapter.safetensors"
    keys = ["up.lora_A", "up.lora_B"]
    model.up.lora_A.requires_grad_(False)
    mark_only_lora_as_trainable(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == keys
    assert list(lora_state_dict(model)) == keys
    lora, base = count_lora_parameters(model)
    assert lora == R * (70 + 33) and base == sum(p.numel() for p in model.parameters()) - lora
    save_lora_weights(model, path)
    assert list(load_file(path)) == keys
    for other in (Model(LoRALinear), Model(QLoRALinear, lora_dtype=bf16)):
        base = copy.deepcopy(other.up.weight)
        load_lora_weights(other, path)
        for name in ("lora_A", "lora_B"):
            got = getattr(other.up, name)
            assert_bitwise_equal(got, getattr(model.up, name).to(got.dtype))
        assert_bitwise_equal(other.up.weight, base)


@pytest.mark.parametrize("size", [*SIZES, (128, 128)], ids=str)  # the last: 256 blocks
@pytest.mark.parametrize("double_quant", [False, True])
def test_layer_on_meta_has_the_shapes_of_one_that_is_not(double_quant, size):
    quant_type = "nf4" if size[1] % 32 else "mxfp4"
    layer, meta = (
        make_layer(
            *size, quant_type=quant_type, double_quant=double_quant, dtype=bf16, device=device
        )
        for device in ("cpu", "meta")
    )
    want, got = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (layer, meta))
    assert got == want
    meta.to_empty(device="cpu").reset_parameters()
    assert meta.quantized.dtype is bf16 and repr(meta.quantized) == repr(layer.quantized)


def test_reset_parameters_starts_anew():
    layer, x = make_layer(bias=True), batch()
    before = stored(layer)
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(7)
    want = QLoRALinear(70, 33, R, ALPHA, bias=True)
    assert not torch.equal(layer.weight, before["weight"])
    assert not torch.equal(want.weight, layer.weight)
    for made in (layer, QLoRALinear(70, 33, R, ALPHA, bias=True, device="meta")):
        made.reset_parameters()
        made.to_empty(device="cpu")
        torch.manual_seed(7)
        made.reset_parameters()
        assert_stored(made, stored(want))
        assert_bitwise_equal(made(x), want(x))


@pytest.mark.parametrize("merged", [False, True])
def test_bytes_that_are_not_aligned_are_loaded_into_a_merged_layer_too(merged: bool) -> None:
    """A memory-mapped file may hold float32 values at any byte."""
    source, layer = (QLoRALinear(64, 64, r=2) for _ in range(2))
    if merged:
        layer.merge()
    state = {}
    for name, t in source.state_dict().items():
        if t.dtype is torch.uint8:
            memory = torch.empty(t.numel() + 1, dtype=torch.uint8)
            memory[1:] = t.reshape(-1)
            t = memory[1:].view(t.shape)
        state[name] = t
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer.quantized.dequantize(), source.quantized.dequantize())
