"""QuantizedWeight as a holder: what it refuses, what it says, where it comes from and goes to."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lora_kernels.backends import decoder
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.core.codes import Codes
from lora_kernels.quantization import QuantizedWeight, codebooks, quantize_4bit
from lora_kernels.quantization.weight import standard_code

pytest.importorskip("bitsandbytes")
import bitsandbytes
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit

from lora_kernels.quantization import bitsandbytes as ours
from tests.quantization import default_backend

N, K = 48, 64
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
both_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
flat_and_nested = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])


def dense(shape=(N, K), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def tensors(weight):
    fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    return {name: t for name, t in fields.items() if isinstance(t, torch.Tensor)}


def assert_same(a, b):
    assert repr(a) == repr(b)
    assert tensors(a).keys() == tensors(b).keys()
    for name, t in tensors(a).items():
        assert torch.equal(t, tensors(b)[name]), name


def linear4bit(quant_type="nf4", nested=True, storage=torch.uint8, dtype=torch.float32):
    layer = Linear4bit(
        K, N, bias=False, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.weight = Params4bit(
        dense(dtype=dtype),
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    return layer.to("cpu")  # which quantizes


@both_types
@flat_and_nested
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dict_is_bitsandbytes(quant_type, nested, dtype):
    """The same keys in the same order with the same bytes, through safetensors too."""
    packed, state = default_backend.quantize(dense(dtype=dtype), quant_type, 64, nested)
    want = {"weight": packed}
    want |= {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    ours = QuantizedWeight.from_bitsandbytes((packed, state))
    got = ours.state_dict()
    assert list(got) == ["weight", *(key for key in got if key != "weight")]
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert got[key].dtype is t.dtype and torch.equal(got[key], t), key
    for loaded in (want, got, load(save(got))):
        assert_same(QuantizedWeight.from_state_dict(loaded), ours)


@both_types
@flat_and_nested
@pytest.mark.parametrize("storage", STORAGE)
def test_linear4bit_to_ours_and_back_is_the_same(quant_type, nested, storage):
    layer = linear4bit(quant_type, nested, storage)
    ours = QuantizedWeight.from_bitsandbytes(layer.weight)
    assert ours.packed.data_ptr() == layer.weight.data_ptr()  # no copy
    assert ours.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    assert type(ours.packed) is torch.Tensor and not ours.packed.requires_grad
    assert (ours.nested, ours.shape, ours.quant_type) == (nested, (N, K), quant_type)

    state = layer.state_dict()
    loaded = QuantizedWeight.from_state_dict(state)
    assert_same(loaded, ours)
    assert loaded.packed.data_ptr() == state["weight"].data_ptr()

    stats = {k.removeprefix("weight."): t for k, t in ours.state_dict().items() if k != "weight"}
    back = Params4bit.from_prequantized(ours.state_dict()["weight"], stats, device="cpu")
    twin = Linear4bit(K, N, bias=False, quant_type=quant_type)
    twin.weight, twin.quant_state = back, back.quant_state
    assert back.quant_state == layer.weight.quant_state
    x = dense((3, K)).requires_grad_()  # without gradients bitsandbytes would repack the weight
    assert torch.equal(twin(x), layer(x))
    assert_same(QuantizedWeight.from_bitsandbytes(twin.weight), ours)


def test_state_dict_copies_codebooks_alone():
    """safetensors saves no two tensors of one memory, and weights may share a codebook."""
    weight = quantize_4bit(dense())
    state = weight.state_dict("a")
    names = {"quant_map": "code", "nested_quant_map": "nested_code", "absmax": "absmax"}
    for key, name in names.items():
        is_held = state[f"a.{key}"].data_ptr() == getattr(weight, name).data_ptr()
        assert is_held is (key == "absmax"), key
        assert torch.equal(state[f"a.{key}"], getattr(weight, name))
    assert state["a"].data_ptr() == weight.packed.data_ptr()


def test_from_state_dict_of_a_prefix_takes_its_keys():
    a, b = quantize_4bit(dense()), quantize_4bit(-dense(), "fp4", 32, double_quant=False)
    state = {"bias": torch.ones(N), **a.state_dict("layers.0.q.weight"), **b.state_dict("w")}
    assert_same(QuantizedWeight.from_state_dict(state, "layers.0.q.weight"), a)
    assert_same(QuantizedWeight.from_state_dict(state, "w"), b)
    save(state)  # which refuses tensors that share memory


@both_types
def test_dequantize_is_what_bitsandbytes_decodes(quant_type):
    """Its public function, on its CPU kernel where it has one: whole blocks in a row, float32."""
    layer = linear4bit(quant_type)
    want = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    got = QuantizedWeight.from_bitsandbytes(layer.weight).dequantize()
    torch.testing.assert_close(got, want, rtol=2**-22, atol=0)  # its scales may be fused


def test_repacked_for_cpu_is_refused():
    packed, state = default_backend.quantize(dense((64, 64)), "nf4", 64, True)
    convert = bitsandbytes.functional._convert_weight_packed_for_cpu
    packed, state = convert(packed, state)
    for undone in (False, True):
        if undone:
            undo = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
            packed, state = undo(packed, state)
        with pytest.raises(ValueError, match=r"repacked.*before its first eval forward"):
            QuantizedWeight.from_bitsandbytes((packed, state))


@pytest.mark.parametrize("mark", ["packing_format_for_cpu", "original_qshape"])
def test_either_mark_of_repacking_is_refused(mark):
    """bitsandbytes sets both, and keeps the second one."""
    packed, state = default_backend.quantize(dense((64, 64)), "nf4", 64, True)
    setattr(state, mark, True)
    with pytest.raises(ValueError, match="repacked"):
        QuantizedWeight.from_bitsandbytes((packed, state))


def test_from_bitsandbytes_of_other_blocks_of_scales_raises():
    packed, state = default_backend.quantize(dense((64, 64)), "nf4", 64, True)
    state.state2.blocksize = 128
    with pytest.raises(ValueError, match="nested_blocksize: got 128, want 256"):
        QuantizedWeight.from_bitsandbytes((packed, state))


def test_saved_after_repacking_is_refused():
    packed, state = default_backend.quantize(dense((64, 64), torch.bfloat16), "nf4", 64, True)
    packed, state = bitsandbytes.functional._convert_weight_packed_for_cpu(packed, state)
    undo = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
    packed, state = undo(packed, state)
    saved = {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match="nested_dtype 'bfloat16', want 'float32'"):
        QuantizedWeight.from_state_dict({"weight": packed, **saved})


def test_from_bitsandbytes_of_something_else_raises():
    with pytest.raises(ValueError, match="Params4bit without a quant_state"):
        QuantizedWeight.from_bitsandbytes(Params4bit(dense()))
    for other in (dense(), nn.Linear(K, N), linear4bit(), (dense(), None), (dense(),), None):
        with pytest.raises(TypeError, match=r"weight: got .* want a bitsandbytes Params4bit"):
            QuantizedWeight.from_bitsandbytes(other)
    packed, state = default_backend.quantize(dense((2, 2, 4, 8)), "nf4", 64, False)
    with pytest.raises(ValueError, match=r"shape: got .* want"):
        QuantizedWeight.from_bitsandbytes((packed, state))
    state.shape = None
    with pytest.raises(ValueError, match="shape: got None, want"):
        QuantizedWeight.from_bitsandbytes((packed, state))
    assert isinstance(state, QuantState)


@both_types
@flat_and_nested
def test_quantized_weight_properties_say_what_it_holds(quant_type, nested):
    weight = quantize_4bit(dense(dtype=torch.bfloat16), quant_type, 32, nested)
    blocks = N * K // 32
    nbytes = N * K // 2 + 16 * 4 + (blocks + 4 + 256 * 4 + 4 if nested else blocks * 4)
    assert (weight.device, weight.nested, weight.nbytes) == (torch.device("cpu"), nested, nbytes)
    assert (weight.shape, weight.dtype, weight.blocksize) == ((N, K), torch.bfloat16, 32)
    text = f"{quant_type} of bfloat16, blocksize=32{', nested' * nested}, {nbytes:,} bytes"
    assert repr(weight) == f"QuantizedWeight([48, 64], {text})"
    assert weight.scales().dtype is torch.float32 and weight.scales().shape == (blocks,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.blocksize = 64


def test_dequantize_to_each_dtype_rounds_once():
    weight = quantize_4bit(dense(dtype=torch.float16))
    exact = weight.dequantize(torch.float32)
    assert weight.dequantize().dtype is torch.float16
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(weight.dequantize(dtype), exact.to(dtype))
    for dtype in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match=r"dtype: got .* want float32"):
            weight.dequantize(dtype)


@flat_and_nested
def test_quantized_weight_to_a_device_moves_every_tensor(nested):
    weight = quantize_4bit(dense(), double_quant=nested)
    assert tensors(weight.to("cpu"))["packed"] is weight.packed
    meta = weight.to("meta")
    assert meta.device.type == "meta" and repr(meta) == repr(weight)
    assert {t.device.type for t in tensors(meta).values()} == {"meta"}
    assert meta.dequantize().shape == (N, K)


def test_quantized_weight_copied_or_pickled_is_the_same():
    weight = quantize_4bit(dense())
    assert_same(copy.deepcopy(weight), weight)
    assert_same(pickle.loads(pickle.dumps(weight)), weight)


@flat_and_nested
def test_dequantize_compiled_whole_is_the_same(nested):
    """A graph cannot hold a native call, which takes addresses."""
    weight = quantize_4bit(dense(dtype=torch.bfloat16), double_quant=nested)
    compiled = torch.compile(lambda w: w.dequantize(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), weight.dequantize())


@pytest.mark.parametrize("native_kernels", [True, False])
def test_quantized_weight_of_a_parameter_needs_no_gradient(native_kernels, monkeypatch):
    if not native_kernels:
        monkeypatch.setattr(decoder.native, "module", None)
    weight = quantize_4bit(nn.Parameter(dense()))
    assert not any(t.requires_grad for t in tensors(weight).values())


BAD_WEIGHTS = [
    (dense().tolist(), TypeError, "weight: got list, want a tensor"),
    (dense().double(), TypeError, "weight: got torch.float64, want float32"),
    (dense().to(torch.int32), TypeError, "weight: got torch.int32, want float32"),
    (dense().to(torch.complex64), TypeError, "weight: got torch.complex64, want float32"),
    (dense()[0], ValueError, r"weight: got shape \[64\], want \[N, K\]"),
    (dense((1, 2, 3, 4)), ValueError, r"weight: got shape \[1, 2, 3, 4\], want \[N, K\]"),
    (dense()[:0], ValueError, r"weight: got shape \[0, 64\], want \[N, K\]"),
    (dense() * torch.tensor(float("inf")), ValueError, "weight: got NaN or infinity"),
    (dense().fill_diagonal_(float("nan")), ValueError, "weight: got NaN or infinity"),
    (dense().to("meta"), ValueError, "weight: got a tensor on meta"),
]


@pytest.mark.parametrize("weight, error, message", BAD_WEIGHTS, ids=lambda value: str(value)[:0])
def test_quantize_of_a_bad_weight_raises(weight, error, message):
    with pytest.raises(error, match=message):
        quantize_4bit(weight)


@pytest.mark.parametrize("blocksize", [0, -64, 16, 48, 8192, 64.0, "64", True])
def test_quantize_of_a_bad_blocksize_raises(blocksize):
    with pytest.raises(ValueError, match=r"blocksize: got .* want a power of two, 32 to 4096"):
        quantize_4bit(dense(), blocksize=blocksize)
    with pytest.raises(ValueError, match=r"blocksize: got .* want a power of two, 32 to 4096"):
        dataclasses.replace(quantize_4bit(dense()), blocksize=blocksize)


BAD_FIELDS = [
    ("quant_type", "int4", ValueError, "got 'int4', want 'nf4', 'fp4', 'mxfp4' or 'nvfp4'"),
    ("nested_blocksize", 128, ValueError, "got 128, want 256"),
    ("dtype", torch.float64, TypeError, "got torch.float64, want float32, bfloat16 or float16"),
    ("dtype", "float32", TypeError, "got 'float32', want"),
    ("shape", (N,), ValueError, r"got \(48,\), want \(N, K\)"),
    ("shape", (N, 0), ValueError, r"got \(48, 0\), want \(N, K\)"),
    ("shape", [N, K], ValueError, r"got \[48, 64\], want \(N, K\)"),
    ("shape", (N, 64.0), ValueError, r"got \(48, 64.0\), want \(N, K\)"),
    ("packed", None, TypeError, "got NoneType, want a tensor"),
    ("packed", lambda t: t[:-1], ValueError, r"got shape \[1535\], want \[1536\] for a weight of"),
    ("packed", lambda t: t[:, None], ValueError, r"got shape \[1536, 1\], want \[1536\]"),
    ("packed", lambda t: t.char(), TypeError, "got torch.int8, want torch.uint8"),
    ("packed", lambda t: t.repeat(2)[::2], ValueError, r"got strides \[2\], want a contiguous"),
    ("absmax", None, TypeError, "got NoneType, want a tensor"),
    ("absmax", lambda t: t[:-1], ValueError, r"got shape \[47\], want \[48\] .* in blocks of 64"),
    ("absmax", lambda t: t.bfloat16(), TypeError, "got torch.bfloat16, want torch.float32"),
    ("absmax", lambda t: t.to("meta"), ValueError, "got meta, want cpu, as packed"),
    ("code", lambda t: t[:-1], ValueError, r"got shape \[15\], want \[16\]"),
    ("code", lambda t: t.half(), TypeError, "got torch.float16, want torch.float32"),
]
BAD_NESTED_FIELDS = [
    ("nested_absmax", None, TypeError, "got NoneType, want a tensor"),
    ("nested_absmax", lambda t: t.repeat(2), ValueError, r"got shape \[2\], want \[1\] for 48 sc"),
    ("nested_absmax", lambda t: t.double(), TypeError, "got torch.float64, want torch.float32"),
    ("nested_code", None, TypeError, "got NoneType, want a tensor"),
    ("nested_code", lambda t: t[:16], ValueError, r"got shape \[16\], want \[256\]"),
    ("offset", None, TypeError, "got NoneType, want a tensor"),
    ("offset", 0.5, TypeError, "got float, want a tensor"),
    ("offset", lambda t: t.bfloat16(), TypeError, "got torch.bfloat16, want torch.float32"),
    ("offset", lambda t: t.repeat(2), ValueError, r"got shape \[2\], want \[1\]"),
    ("offset", lambda t: t.to("meta"), ValueError, "got meta, want cpu, as packed"),
]


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_weight_of_a_bad_field_raises(nested):
    good = quantize_4bit(dense(), double_quant=nested)
    cases = BAD_FIELDS + BAD_NESTED_FIELDS * nested
    if nested:  # uint8 scales cast to anything else are taken for scales that are not nested
        cases = [case for case in cases if case[0] != "absmax" or "bfloat16" not in case[3]]
    for name, bad, error, message in cases:
        value = bad(getattr(good, name)) if callable(bad) else bad
        with pytest.raises(error, match=message) as raised:
            dataclasses.replace(good, **{name: value})
        assert str(raised.value).startswith(f"{name}: "), (name, message, raised.value)


def test_quantized_weight_of_nested_fields_alone_raises():
    flat, nested = quantize_4bit(dense(), double_quant=False), quantize_4bit(dense())
    for name in ("nested_absmax", "nested_code", "offset"):
        with pytest.raises(ValueError, match=f"{name}: got a tensor, want None beside nf4"):
            dataclasses.replace(flat, **{name: getattr(nested, name)})


def test_quantized_weight_of_a_one_element_offset_is_the_same():
    good = quantize_4bit(dense())
    assert good.offset is not None and good.offset.shape == ()
    other = dataclasses.replace(good, offset=good.offset.view(1))
    assert torch.equal(other.dequantize(), good.dequantize())
    assert torch.equal(other.scales(), good.scales())
    assert_same(QuantizedWeight.from_state_dict(other.state_dict()), good)


JSON = "weight.quant_state.bitsandbytes__nf4"


def as_json(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("key", list(quantize_4bit(dense()).state_dict()))
def test_from_state_dict_of_a_missing_key_raises(key):
    state = quantize_4bit(dense()).state_dict()
    del state[key]
    with pytest.raises(ValueError, match=r"state: got (no|0 keys) '"):
        QuantizedWeight.from_state_dict(state)


def test_from_state_dict_of_bad_json_raises():
    state = quantize_4bit(dense()).state_dict()
    text = bytes(state[JSON].tolist()).decode()
    for length in range(0, len(text), 7):
        with pytest.raises(ValueError, match=r"bitsandbytes__nf4: got .* want a whole JSON object"):
            QuantizedWeight.from_state_dict({**state, JSON: as_json(text[:length])})
    for bad in ("[]", "3", '"nf4"'):
        with pytest.raises(ValueError, match="want a whole JSON object"):
            QuantizedWeight.from_state_dict({**state, JSON: as_json(bad)})
    with pytest.raises(ValueError, match="want a whole JSON object"):
        QuantizedWeight.from_state_dict(
            {**state, JSON: torch.tensor([255, 254], dtype=torch.uint8)}
        )
    with pytest.raises(TypeError, match=r"got torch.float32 .* want a JSON text"):
        QuantizedWeight.from_state_dict({**state, JSON: state[JSON].float()})


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ('"nf4"', '"fp4"', ValueError, "got quant_type 'fp4' in it, want the key's"),
        ('"quant_type"', '"kind"', ValueError, "got JSON without 'quant_type'"),
        ('"blocksize": 64', '"blocksize": 63', ValueError, "blocksize: got 63"),
        ('"blocksize": 64', '"blocksize": 32', ValueError, "absmax: got shape"),
        ('"blocksize": 64', '"blocksize": "64"', ValueError, "blocksize: got '64'"),
        ("[48, 64]", "[48, 66]", ValueError, "packed: got shape"),
        ("[48, 64]", "null", ValueError, "shape: got None"),
        ("[48, 64]", '"48"', ValueError, "shape: got '48'"),
        ('"dtype": "float32"', '"dtype": "int8"', TypeError, "dtype: got 'int8'"),
        ('"nested_dtype": "float32"', '"nested_dtype": "float16"', ValueError, "nested_dtype"),
        ('"nested_blocksize": 256', '"nested_blocksize": 64', ValueError, "nested_blocksize"),
        ('"nested_offset": ', '"nested_offset": null, "x": ', TypeError, "nested_offset None"),
    ],
)
def test_from_state_dict_of_a_bad_json_field_raises(old, new, error, message):
    state = quantize_4bit(dense()).state_dict()
    text = bytes(state[JSON].tolist()).decode()
    assert text.count(old) == 1
    with pytest.raises(error, match=message):
        QuantizedWeight.from_state_dict({**state, JSON: as_json(text.replace(old, new))})


def test_from_state_dict_of_a_bad_tensor_raises():
    state = quantize_4bit(dense()).state_dict()
    for key, bad, error, message in [
        ("weight", state["weight"][:-1], ValueError, "packed: got shape"),
        ("weight", state["weight"].char(), TypeError, "packed: got torch.int8"),
        ("weight", state["weight"].repeat(1, 2)[:, :1], ValueError, "packed: got strides"),
        (
            "weight",
            state["weight"].flatten().view(torch.bfloat16)[:, None].repeat(1, 2)[:, :1],
            ValueError,
            "packed: got strides",
        ),
        ("weight.absmax", state["weight.absmax"][:-1], ValueError, "absmax: got shape"),
        ("weight.nested_absmax", torch.ones(2), ValueError, "nested_absmax: got shape"),
        ("weight.nested_quant_map", torch.ones(255), ValueError, "nested_code: got shape"),
        ("weight.quant_map", torch.ones(16), ValueError, "quant_map: got values other than nf4's"),
        ("weight.quant_map", torch.ones(15), ValueError, r"quant_map: got torch.float32 \[15\]"),
        ("weight.quant_map", torch.full((16,), float("nan")), ValueError, "quant_map: got values"),
    ]:
        with pytest.raises(error, match=message):
            QuantizedWeight.from_state_dict({**state, key: bad})
    both = {**state, JSON.replace("nf4", "fp4"): state[JSON]}
    with pytest.raises(ValueError, match="state: got 2 keys"):
        QuantizedWeight.from_state_dict(both)


@flat_and_nested
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_quantize_under_other_defaults_is_the_same(nested, dtype):
    """Neither the dtype, which transformers sets while it loads a model, nor the device."""
    weight = dense()
    want = quantize_4bit(weight, double_quant=nested)
    decoded = want.dequantize(torch.float32)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        codebooks._dynamic_map.cache_clear()
        with torch.device("meta"):
            got = quantize_4bit(weight, double_quant=nested)
            assert torch.equal(got.dequantize(torch.float32), decoded)
    finally:
        torch.set_default_dtype(before)
    assert_same(got, want)


@pytest.mark.parametrize("change", [-0.5, 0.5])
def test_standard_code_of_another_codebook_is_refused(change: float) -> None:
    code = quantize_4bit(torch.eye(64)).code.clone()
    code[7] += change
    with pytest.raises(ValueError, match="got values other than nf4's"):
        standard_code("nf4", code)


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_weight_of_a_stack_is_that_of_its_flattened_rows(nested):
    """[E, N, K] and [E·N, K]: the same codes, scales and values, in the stack's shape."""
    stack = dense((3, 20, 40))
    got, want = (quantize_4bit(t, "nf4", 64, nested) for t in (stack, stack.view(60, 40)))
    assert got.shape == (3, 20, 40) and got.matrix_shape == want.shape == (60, 40)
    assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)
    assert torch.equal(got.dequantize(), want.dequantize().view(3, 20, 40))
    state = got.state_dict("experts.")
    again = QuantizedWeight.from_state_dict(state, "experts.")
    assert again.shape == got.shape and torch.equal(again.dequantize(), got.dequantize())


def test_from_state_dict_of_tensors_on_a_device_puts_the_offset_there():
    """The JSON text alone is on the CPU; meta stands for any other device."""
    state = quantize_4bit(dense()).state_dict()
    state = {key: t if key == JSON else t.to("meta") for key, t in state.items()}
    weight = QuantizedWeight.from_state_dict(state)
    assert {t.device.type for t in tensors(weight).values()} == {"meta"}


def test_from_state_dict_of_an_integer_as_offset_is_a_number():
    state = quantize_4bit(dense()).state_dict()
    text = bytes(state[JSON].tolist()).decode()
    head, tail = text.split('"nested_offset": ')
    changed = as_json(f'{head}"nested_offset": 1{tail[tail.index("}") :]}')
    assert QuantizedWeight.from_state_dict({**state, JSON: changed}).offset == 1.0
    with pytest.raises(TypeError, match=r"got torch.uint8 \[1, \d+\], want a JSON text"):
        QuantizedWeight.from_state_dict({**state, JSON: changed[None]})


CHANGED_STATES = {
    "packed": lambda packed, state: packed.clone(),
    "absmax": lambda packed, state: setattr(state, "absmax", state.absmax.clone()),
    "absmax_dtype": lambda packed, state: setattr(state, "absmax", state.absmax.view(torch.int8)),
}


@pytest.mark.parametrize("change", CHANGED_STATES)
def test_cached_weight_is_rebuilt_after_a_change(change):
    packed, state = default_backend.quantize(dense(), "nf4", 64, True)
    with torch.inference_mode():
        weight = ours.cached_weight(packed, state)
    assert ours.cached_weight(packed, state) is weight and not weight.code.is_inference()
    packed = CHANGED_STATES[change](packed, state) if change == "packed" else packed
    if change == "packed":
        assert ours.cached_weight(packed, state).packed.data_ptr() == packed.data_ptr()
        assert copy.deepcopy(state)._lora_kernels is None
        return
    CHANGED_STATES[change](packed, state)
    if change == "absmax_dtype":  # scales in a dtype that is not theirs are refused, not ignored
        with pytest.raises(TypeError, match=r"absmax: got torch.int8, want"):
            ours.cached_weight(packed, state)
    else:
        assert ours.cached_weight(packed, state).absmax is state.absmax


@pytest.fixture
def no_reasons(monkeypatch):
    """bitsandbytes was not checked on any device yet."""
    monkeypatch.setattr(decoder, "bitsandbytes_reasons", reasons := {})
    return reasons


WRONG_KERNELS = {
    "nf4": lambda w, dtype: w.quant_type == "nf4",
    "fp4": lambda w, dtype: w.quant_type == "fp4",
    "nested": lambda w, dtype: w.nested_absmax is not None,
    "flat": lambda w, dtype: w.nested_absmax is None,
    **{str(t): lambda w, dtype, t=t: dtype is t for t in STORAGE[1:]},
}


has_gemm_4bit = pytest.mark.skipif(
    not hasattr(torch.ops.bitsandbytes, "gemm_4bit"),
    reason="bitsandbytes is older than 0.50, without gemm_4bit",
)


@has_gemm_4bit
@pytest.mark.parametrize("wrong", WRONG_KERNELS)
def test_check_of_bitsandbytes_notices_one_wrong_kernel(wrong, no_reasons, monkeypatch):
    """A kernel that is wrong for one dtype alone is used for none of its type."""
    is_wrong, device, gemm = WRONG_KERNELS[wrong], torch.device("cpu"), ours.bitsandbytes_gemm

    def spoiled(weight: Codes, x, columns, bias):
        found = gemm(weight, x, columns, bias)
        return -found if is_wrong(weight, x.dtype) else found

    monkeypatch.setattr(ours, "bitsandbytes_gemm", spoiled)
    with as_on_gpu():
        reason = decoder.bitsandbytes_reason(device)
        if reason is None:
            reason = decoder.bitsandbytes_reason(device, "fp4")
    assert reason is not None and reason in no_reasons.values()
    assert ": gemm_4bit of " in reason and "differs from the reference" in reason


@has_gemm_4bit
def test_compare_of_bitsandbytes_under_tf32_is_with_the_exact_product(monkeypatch):
    """Where TF32 rounds each float32 product of the device, a right kernel still passes."""
    matmul = torch.Tensor.__matmul__

    def in_tf32(a, b):
        if a.dtype is not torch.float32:
            return matmul(a, b)
        return matmul(*((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)))

    def gemm(weight: Codes, x, columns, bias):
        w = decoder.dense(weight, (columns, x.shape[1]), torch.float32)
        return torch.mm(x.double(), w.double().t()).to(x.dtype)

    monkeypatch.setattr(ours, "bitsandbytes_gemm", gemm)
    monkeypatch.setattr(torch.Tensor, "__matmul__", in_tf32)
    assert ours.compare("nf4", torch.device("cpu")) is None


@has_gemm_4bit
def test_compare_of_bitsandbytes_says_what_it_lacks_or_raised(monkeypatch):
    version = f"bitsandbytes {bitsandbytes.__version__}"
    assert ours.compare("nf4", torch.device("meta")) is None  # no values to compare
    for error in (RuntimeError, NotImplementedError, ValueError, TypeError):

        def broken(*args, error=error):
            raise error("no kernel image")

        monkeypatch.setattr(ours, "bitsandbytes_gemm", broken)
        want = f"{version} raised {error.__name__}: no kernel image"
        assert ours.compare("nf4", torch.device("cpu")) == want
    monkeypatch.setattr(torch.ops, "bitsandbytes", SimpleNamespace())
    assert ours.compare("nf4", torch.device("cpu")) == f"{version} has no op gemm_4bit"
