"""QLoRALinear: its arithmetic against plain PyTorch on the decoded weight, and its bytes' life."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

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
from lora_kernels.measure import tolerance
from lora_kernels.quantization import quantize_4bit

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
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
    names = BYTES + NESTED * layer.weight4bit.nested
    return {name: layer.get_parameter(name).detach().clone() for name in names}


def assert_stored(layer, want):
    assert stored(layer).keys() == want.keys()
    for name, t in want.items():
        param = layer.get_parameter(name)
        assert param.dtype is torch.uint8 and param.dim() == 1 and not param.requires_grad
        assert torch.equal(param, t), name
    held = layer.weight4bit
    assert held.packed.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(held.code.view(torch.uint8), layer.weight_code)
    if held.nested:
        assert held.offset.data_ptr() == layer.weight_offset.data_ptr()


def gradients(y, inputs):
    """y and the gradients of a weighted sum of it."""
    weights = ((torch.arange(y.numel()) % 7 - 3) / 4).to(y.dtype).view(y.shape)  # exact in any
    found = torch.autograd.grad((y * weights).sum(), list(inputs.values()))
    return {"y": y.detach(), **dict(zip(inputs, found, strict=True))}


def plain(layer, x, dtype):
    """What the layer computes, and its gradients, in plain PyTorch in `dtype`."""
    W = layer.weight4bit.dequantize(f32).to(dtype)
    leaves = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B, "bias": layer.bias}
    leaves = {
        # Of the parameters' own dtypes, so that their gradients are rounded to those, or exact.
        name: t.detach().to(torch.float64 if dtype is torch.float64 else t.dtype).requires_grad_()
        for name, t in leaves.items()
        if t is not None
    }
    a, b = leaves["lora_A"].to(dtype), leaves["lora_B"].to(dtype)
    bias = leaves["bias"].to(dtype) if "bias" in leaves else None
    wide = leaves["x"].to(dtype)
    y = F.linear(wide, W, bias) + (ALPHA / R) * (wide @ a.t()) @ b.t()
    return gradients(y.to(torch.float64 if dtype is torch.float64 else x.dtype), leaves)


def own(layer, x):
    x = x.clone().requires_grad_()
    inputs = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    if layer.bias is not None:
        inputs["bias"] = layer.bias
    return gradients(layer(x), inputs)


def assert_close(layer, x, coarsest=f32):
    if layer.bias is not None:
        layer.bias.requires_grad_()
    got, ref, eager = own(layer, x), plain(layer, x, torch.float64), plain(layer, x, f32)
    assert got.keys() == ref.keys()
    for name in got:
        assert got[name].dtype is eager[name].dtype, name
        u = tolerance.unit_roundoff(got[name].dtype, coarsest)
        tolerance.assert_close(got[name], ref[name], eager[name], u, name)


# Arithmetic


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size, quant_type, double_quant):
    layer = make_layer(*size, bias=True, quant_type=quant_type, double_quant=double_quant)
    assert layer.weight4bit.quant_type == quant_type and layer.weight4bit.nested is double_quant
    assert_close(layer, batch(size[1]))


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_blocksize(blocksize):
    layer = make_layer(blocksize=blocksize)
    assert layer.weight4bit.blocksize == blocksize
    assert_close(layer, batch())


@pytest.mark.parametrize("lora_dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_adapter_dtype(bias, lora_dtype):
    layer = make_layer(bias=bias, lora_dtype=lora_dtype)
    assert layer.lora_A.dtype is layer.lora_B.dtype is lora_dtype
    assert_close(layer, batch())


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_half_precision_x(dtype):
    """The base product rounds its operands and its result to x's dtype."""
    layer = make_layer(bias=True, dtype=dtype)
    assert layer.weight4bit.dtype is dtype
    assert layer.lora_A.dtype is f32 and layer.bias.dtype is dtype
    layer.bias.requires_grad_()
    x = batch(dtype=dtype)
    got, ref = own(layer, x), plain(layer, x, torch.float64)
    base = layer.weight4bit.dequantize(dtype)
    x = x.requires_grad_()
    A, B, bias = (t.detach().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.bias))
    y = F.linear(x, base, bias) + (layer.scaling * (x.float() @ A.t()) @ B.t()).to(dtype)
    eager = gradients(y, {"x": x, "lora_A": A, "lora_B": B, "bias": bias})
    for name in got:
        assert got[name].dtype is eager[name].dtype, name
        tolerance.assert_close(
            got[name], ref[name], eager[name], tolerance.unit_roundoff(got[name].dtype), name
        )


@pytest.mark.parametrize("shape", [(70,), (1, 70), (0, 70), (2, 0, 70), (2, 3, 1, 70)])
def test_shapes(shape):
    layer = make_layer(bias=True)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 33)
    torch.testing.assert_close(y, plain(layer, x, f32)["y"])


@pytest.mark.parametrize("compute_dtype", [None, f32, bf16])
@pytest.mark.parametrize("x_dtype", [f32, bf16])
def test_compute_dtype(x_dtype, compute_dtype):
    """Bit for bit `lora_linear`'s, and coarser exactly where the compute dtype is."""
    layer, x = make_layer(compute_dtype=compute_dtype), batch(dtype=x_dtype)
    y = layer(x)
    adapter = (layer.lora_A, layer.lora_B, layer.scaling)
    assert y.dtype is x_dtype
    assert torch.equal(y, lora_linear(x, layer.weight4bit, *adapter, compute_dtype=compute_dtype))
    ref = plain(layer, x, torch.float64)["y"]
    error = (y - ref).norm() / ref.norm()
    u = tolerance.unit_roundoff(x_dtype, compute_dtype or x_dtype)
    # One or two roundings of each term, or of the result: within 4 u, and not far below one.
    assert u / 16 < error < 4 * u
    with torch.autocast("cpu", bf16):
        assert torch.equal(layer(x), lora_linear(x, layer.weight4bit, *adapter))


def test_a_backward_keeps_no_dense_weight():
    saved = []
    layer, x = make_layer(N=64, K=128), batch(128)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert saved and not any(t.is_floating_point() and t.numel() == 64 * 128 for t in saved)


def test_dropout_in_training_only():
    layer, x = make_layer(dropout=0.5), batch()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    adapter = (layer.lora_A, layer.lora_B, layer.scaling)
    assert torch.equal(y, lora_linear(x, layer.weight4bit, *adapter, dropout_p=0.5))
    layer.eval()
    want = lora_linear(x, layer.weight4bit, *adapter)
    assert torch.equal(layer(x), want) and torch.equal(layer(x), want)


@pytest.mark.parametrize("x_dtype", [f32, bf16, f16], ids=str)
def test_enabled(x_dtype):
    layer, x = make_layer(bias=True, dropout=0.5), batch(dtype=x_dtype)
    layer.enabled = False
    y = layer(x)
    want = F.linear(x, layer.weight4bit.dequantize(x_dtype), layer.bias.to(x_dtype))
    assert torch.equal(y, want)
    layer.merge()
    assert torch.equal(layer(x), want)
    with torch.autocast("cpu", bf16):
        assert layer(x).dtype is bf16
    layer.unmerge()
    layer.enabled = True
    assert not torch.equal(layer.eval()(x), want)


def test_functional_call():
    layer, other, x = make_layer(bias=True), make_layer(bias=True, seed=7), batch()
    params = {name: p.detach().clone() for name, p in other.named_parameters()}
    before = layer(x)
    assert torch.equal(torch.func.functional_call(layer, params, x), other(x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compile(dropout):
    torch._dynamo.reset()
    layer, x = make_layer(bias=True, dropout=dropout), batch()
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        torch.manual_seed(1)
        results.append(gradients(run(x), {"lora_A": layer.lora_A, "lora_B": layer.lora_B}))
    if not dropout:
        for name, t in results[0].items():
            assert torch.equal(results[1][name], t), name
    layer.eval()
    assert torch.equal(compiled(x), layer(x))
    layer.load_state_dict(make_layer(bias=True, seed=7).state_dict(), assign=True)
    assert torch.equal(compiled(x), layer(x))


# The bytes and what moves, copies and stores them


@pytest.mark.parametrize("double_quant", [False, True])
def test_parameters(double_quant):
    layer = make_layer(bias=True, double_quant=double_quant)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    uint8 = [n for n, p in layer.named_parameters() if p.dtype is torch.uint8]
    assert uint8 == BYTES + NESTED * double_quant
    assert list(layer.state_dict()) == [n for n, _ in layer.named_parameters()]
    assert layer.weight.numel() == 33 * 70 // 2
    assert sum(t.numel() for t in stored(layer).values()) == layer.weight4bit.nbytes
    assert layer.weight4bit is layer.weight4bit


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(clone, double_quant):
    layer, x = make_layer(bias=True, double_quant=double_quant), batch()
    y, want = layer(x), stored(layer)
    other = clone(layer)
    assert repr(other) == repr(layer)
    assert_stored(other, want)
    with torch.no_grad():
        for t in layer.state_dict().values():
            t.zero_()
    assert torch.equal(other(x), y)
    assert_stored(other, want)


@pytest.mark.parametrize("dtype", [bf16, f16, torch.float64, None])
def test_to_dtype_leaves_the_bits_alone(dtype):
    layer = make_layer(bias=True)
    want, decoded = stored(layer), layer.weight4bit.dequantize(f32)
    moved = layer.half() if dtype is f16 else layer.to(dtype) if dtype else layer.bfloat16()
    assert moved is layer
    assert_stored(layer, want)
    assert layer.lora_A.dtype is layer.bias.dtype is (dtype or bf16)
    assert torch.equal(layer.weight4bit.dequantize(f32), decoded)
    assert layer.weight4bit.dtype is f32
    if dtype is torch.float64:
        with pytest.raises(TypeError, match="float64"):
            layer(batch(dtype=dtype))
        return
    y = layer(batch(dtype=dtype or bf16))
    assert y.dtype is (dtype or bf16)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("store", ["memory", "torch.save", "safetensors"])
def test_state_dict(store, size, double_quant, meta, tmp_path):
    kwargs = {"bias": True, "double_quant": double_quant}
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
    assert torch.equal(other(x), y)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_bytes_at_any_address():
    """A file that is mapped puts a tensor of bytes anywhere; the tables in it are float32."""
    layer, x = make_layer(bias=True), batch()
    y, want, state = layer(x), stored(layer), dict(layer.state_dict())
    for name, t in want.items():
        state[name] = torch.cat([torch.zeros(1, dtype=torch.uint8), t])[1:]
        assert state[name].data_ptr() % 4 == 1
    other = make_layer(bias=True, device="meta")
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), y)
    assert_stored(other, want)


def test_states_of_another_format_are_refused():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="weight_offset"):
        layer.load_state_dict(make_layer(double_quant=False).state_dict())
    with pytest.raises(RuntimeError, match="weight_absmax"):
        layer.load_state_dict(make_layer(blocksize=128).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(LoRALinear(70, 33, R).state_dict(), strict=False)


def test_meta():
    layer = QLoRALinear(70, 33, R, bias=True, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert {n: p.shape for n, p in layer.named_parameters()} == {
        n: p.shape for n, p in make_layer(bias=True).named_parameters()
    }
    assert layer(torch.empty(5, 70, device="meta")).shape == (5, 33)
    assert layer.weight4bit.device.type == "meta"


def test_weight4bit_follows_the_parameters():
    layer, other, x = make_layer(), make_layer(seed=7), batch()
    want = other.weight4bit.dequantize()
    assert not torch.equal(layer.weight4bit.dequantize(), want)
    layer.load_state_dict(other.state_dict())  # in place
    assert torch.equal(layer.weight4bit.dequantize(), want)
    third = make_layer(seed=8)
    for name in BYTES + NESTED:  # replaced
        setattr(layer, name, nn.Parameter(getattr(third, name).detach().clone(), False))
    assert torch.equal(layer.weight4bit.dequantize(), third.weight4bit.dequantize())
    for name in BYTES + NESTED:  # moved
        getattr(layer, name).data = getattr(other, name).data.clone()
    assert torch.equal(layer.weight4bit.dequantize(), want)
    layer.share_memory()
    assert layer.weight4bit.packed.is_shared() and torch.equal(layer.weight4bit.dequantize(), want)
    layer.to("meta")
    assert layer.weight4bit.device.type == "meta"
    layer.to_empty(device="cpu").load_state_dict(third.state_dict())
    assert torch.equal(layer(x), third(x))


# Other ways to make one


def test_starts_as_its_base():
    torch.manual_seed(0)
    linear = nn.Linear(70, 33)
    torch.manual_seed(0)
    layer, x = QLoRALinear(70, 33, r=R, bias=True), batch()
    want = quantize_4bit(linear.weight)
    assert torch.equal(layer.weight4bit.packed, want.packed)
    assert torch.equal(layer.weight4bit.scales(), want.scales())
    assert torch.equal(layer.bias, linear.bias) and torch.count_nonzero(layer.lora_B) == 0
    torch.testing.assert_close(layer(x), F.linear(x, want.dequantize(), linear.bias))


def test_from_linear():
    linear = nn.Linear(70, 33, dtype=bf16).eval()
    layer = QLoRALinear.from_linear(
        linear, R, ALPHA, 0.5, quant_type="fp4", blocksize=32, double_quant=False, compute_dtype=f32
    )
    assert layer.bias is linear.bias and not linear.weight.requires_grad
    assert linear.weight.dtype is bf16 and not layer.training and layer.compute_dtype is f32
    want = quantize_4bit(linear.weight, "fp4", 32, False)
    assert torch.equal(layer.weight, want.packed) and repr(layer.weight4bit) == repr(want)
    assert layer.lora_A.dtype is f32 and layer.scaling == ALPHA / R
    with pytest.raises(TypeError, match="linear: got LoRALinear, want exactly"):
        QLoRALinear.from_linear(LoRALinear(12, 10))


def test_from_weight4bit_shares_memory():
    for double_quant in (False, True):
        weight = quantize_4bit(torch.randn(33, 70), double_quant=double_quant)
        bias = torch.randn(33)
        layer = QLoRALinear.from_weight4bit(weight, R, ALPHA, bias=bias, compute_dtype=bf16)
        held = layer.weight4bit
        for field in ("packed", "absmax", "code", "nested_absmax", "nested_code", "offset"):
            want, got = getattr(weight, field), getattr(held, field)
            assert (want is None) is (got is None)
            assert want is None or got.data_ptr() == want.data_ptr(), field
        assert layer.bias.data_ptr() == bias.data_ptr() and not layer.bias.requires_grad
        assert layer.lora_A.requires_grad and layer.scaling == ALPHA / R
        assert layer.compute_dtype is bf16 and repr(held) == repr(weight)
        assert torch.count_nonzero(layer.lora_A) and not torch.count_nonzero(layer.lora_B)


# Merging


@pytest.mark.parametrize("bias", [False, True])
def test_merge_and_unmerge(bias):
    layer, x = make_layer(bias=bias, dropout=0.5).eval(), batch()
    y, want, state = layer(x), stored(layer), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged and layer.merged_weight.dtype is f32
    torch.testing.assert_close(layer(x), y)
    assert layer.state_dict().keys() == state.keys()
    assert_stored(layer, want)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), y)
    assert_stored(layer, want)


@pytest.mark.parametrize("weight_dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("x_dtype", [f32, bf16, f16], ids=str)
def test_merged_takes_any_x(x_dtype, weight_dtype):
    """As unmerged: x's dtype, or autocast's."""
    layer, x = make_layer(bias=True, dtype=weight_dtype).eval(), batch(dtype=x_dtype)
    y = layer(x)
    layer.merge()
    u = tolerance.unit_roundoff(x_dtype, weight_dtype)
    got = layer(x)
    assert got.dtype is y.dtype is x_dtype
    # Roundings of the weights, the sum and the result, each under u in norm.
    assert (got.double() - y.double()).norm() < 4 * u * y.double().norm()
    with torch.autocast("cpu", bf16):
        assert layer(x).dtype is bf16


def test_merged_after_to_dtype():
    layer = make_layer(bias=True).eval()
    layer.to(bf16)
    layer.merge()
    assert layer(batch(dtype=bf16)).dtype is bf16
    layer.half()
    assert layer(batch(dtype=f16)).dtype is f16


def test_merged_layer_refuses_to_train():
    layer, x = make_layer(), batch()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged and in training mode.*unmerge\(\)"):
        layer(x)


def test_loading_into_a_merged_layer_merges_afresh():
    layer, other, x = make_layer().eval(), make_layer(seed=7).eval(), batch()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert layer.merged
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_merged_layer(quant_type, double_quant):
    layer, x = (
        make_layer(bias=True, quant_type=quant_type, double_quant=double_quant).eval(),
        batch(),
    )
    y, want = layer(x), stored(layer)
    B, A = layer.lora_B.detach().double(), layer.lora_A.detach().double()
    exact = layer.weight4bit.dequantize(torch.float64) + layer.scaling * B @ A

    linear, change = layer.merged_layer()
    assert type(linear) is nn.Linear and not linear.training
    assert linear.weight.dtype is f32 and not linear.weight.requires_grad
    assert change < 1e-7 and math.isclose(
        change, (linear.weight.double() - exact).norm() / exact.norm(), abs_tol=1e-7
    )
    torch.testing.assert_close(linear(x), y)

    again, change = layer.merged_layer(requantize=True)
    assert type(again) is QLoRALinear and not again.training and again.init == layer.init
    assert (again.r, again.alpha, again.quant_type) == (R, ALPHA, quant_type)
    assert again.weight4bit.nested is double_quant and not torch.count_nonzero(again.lora_B)
    held = again.weight4bit.dequantize(torch.float64)
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
def test_merged_layer_of_a_moved_layer_runs(requantize):
    """The bias has moved with the module; the layer is in the weight's dtype all over."""
    layer = make_layer(bias=True).to(bf16)
    assert layer.merged_layer(requantize).layer(batch()).dtype is f32
    layer = make_layer(bias=True, dtype=bf16).float()
    assert layer.merged_layer(requantize).layer(batch(dtype=bf16)).dtype is bf16


# What the other functions see of it


class Model(nn.Module):
    def __init__(self, cls, **kwargs):
        super().__init__()
        self.up = cls(70, 33, R, ALPHA, bias=True, **kwargs)
        self.down = nn.Linear(33, 8)
        nn.init.normal_(self.up.lora_B)


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_adapter_functions(cls, tmp_path, capsys):
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
            assert torch.equal(got, getattr(model.up, name).to(got.dtype))
        assert torch.equal(other.up.weight, base)


def test_repr():
    layer = QLoRALinear(12, 10, r=3, alpha=6, dropout=0.1)
    text = "QLoRALinear(in_features=12, out_features=10, bias=False, r=3, alpha=6, dropout=0.1"
    assert repr(layer) == text + ", nf4, blocksize=64, nested)"
    layer = QLoRALinear(12, 10, 3, 6, 0.1, quant_type="fp4", blocksize=32, double_quant=False)
    layer.merge()
    layer.enabled = False
    assert repr(layer) == text + ", merged, disabled, fp4, blocksize=32)"


def test_reset_parameters():
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
        assert torch.equal(made(x), want(x))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"quant_type": "int4"}, ValueError, "quant_type: got 'int4', want 'nf4' or 'fp4'"),
        ({"blocksize": 48}, ValueError, "blocksize: got 48, want a power of two, 32 to 4096"),
        ({"blocksize": 16}, ValueError, "blocksize: got 16, want"),
        ({"blocksize": 64.0}, ValueError, r"blocksize: got 64\.0, want"),
        ({"r": 0}, ValueError, "r: got 0, want at least 1"),
        ({"dtype": torch.float64}, TypeError, r"weight: got torch\.float64, want float32"),
        ({"dtype": torch.int64}, TypeError, r"dtype: got torch\.int64, want a floating dtype"),
        ({"dropout": 1.5}, ValueError, r"dropout: got 1\.5, want a probability"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(device, kwargs, error, message):
    with pytest.raises(error, match=f"^{message}"):
        QLoRALinear(**{"in_features": 12, "out_features": 10, "device": device, **kwargs})
    if "dtype" not in kwargs and device == "cpu":
        with pytest.raises(error, match=f"^{message}"):
            QLoRALinear.from_linear(nn.Linear(12, 10), **kwargs)


def test_compiled_after_a_first_call() -> None:
    """Whose view of the bytes is known by their addresses, which a compiler cannot compare."""
    torch._dynamo.reset()
    layer, x = QLoRALinear(64, 32, r=3), torch.randn(5, 64)
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


def test_trains_after_inference_mode() -> None:
    """What is kept from call to call can be saved for a backward."""
    layer, x = QLoRALinear(64, 32, r=4), torch.randn(3, 64)
    with torch.inference_mode():
        want = layer(x)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, want)
    assert layer.lora_B.grad is not None
