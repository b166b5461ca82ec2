"""MXFP4 and NVFP4: the bits of the formats' libraries, and their rules of quantization."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import decoder
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.quantization import QuantizedWeight, e2m1, quantize_4bit
from tests.support.codec import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Each code twice, in the low nibble and in the high one.
ALL_CODES = torch.tensor([i | (15 - i) << 4 for i in range(16)], dtype=torch.uint8)
ALL_SCALES = torch.arange(256, dtype=torch.uint8)
IS_NAN_IN_E4M3 = (ALL_SCALES & 127) == 127
GLOBAL_SCALES = [2688 / 3.7, 0.0123, 3e38, 1e-30, 448.0]


@pytest.fixture(params=["native", "PyTorch", "GPU path"])
def decoded_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "GPU path":
        with as_on_gpu():
            yield request.param
        return
    if request.param == "PyTorch":
        monkeypatch.setattr(decoder.native, "module", None)
    yield request.param


def values_of(packed: Tensor) -> Tensor:
    """Decode bytes [..., n] one by one, float64[..., 2 n], the low nibble first."""
    table = [*E2M1, *(-value for value in E2M1)]
    found = [table[half] for byte in packed.flatten().tolist() for half in (byte & 15, byte >> 4)]
    return torch.tensor(found, dtype=torch.float64).view(*packed.shape[:-1], -1)


def e4m3_value(byte: int) -> float:
    """Decode a byte of float8_e4m3fn by its definition."""
    sign, exponent, mantissa = (-1.0 if byte >> 7 else 1.0), byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    whole, power = (1, exponent) if exponent else (0, 1)
    return sign * math.ldexp(whole + mantissa / 8, power - 7)


def assert_bits(got: Tensor, want: Tensor) -> None:
    """NaN has one bit pattern a library; every other value has its bits."""
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got.nan_to_num(0.0), want.nan_to_num(0.0))


def gpt_oss(experts: int = 1) -> tuple[Tensor, Tensor]:
    """Every code times every scale, blocks [E, 256, 1, 16] and scales [E, 256, 1]."""
    blocks = ALL_CODES.expand(experts, 256, 1, 16).clone()
    return blocks, ALL_SCALES[:, None].expand(experts, 256, 1).clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_all_codes_and_scales_are_transformers(dtype: torch.dtype, decoded_by: str) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = gpt_oss(3)
    want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT.contiguous()
    weight = QuantizedWeight.from_mxfp4(blocks, scales, dtype)
    assert weight.shape == (3, 256, 32) and weight.blocksize == 32
    got = weight.dequantize()
    assert same_bits(got[:, :255].contiguous(), want[:, :255].contiguous())
    assert got[:, 255].isnan().all()  # OCP's NaN; transformers has codes · 2^128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_all_codes_and_scales_are_the_definition(dtype: torch.dtype, decoded_by: str) -> None:
    weight = QuantizedWeight.from_mxfp4(*gpt_oss())
    powers = torch.tensor([math.ldexp(1, i - 127) for i in range(255)], dtype=torch.float64)
    want = values_of(ALL_CODES) * powers[:, None]
    assert_bits(weight.dequantize(dtype)[0, :255], want.to(torch.float32).to(dtype))


def test_mxfp4_layouts_are_one_weight() -> None:
    """gpt-oss' and the others' shapes, and the dtypes that PyTorch has for codes and scales."""
    blocks, scales = gpt_oss(2)
    want = QuantizedWeight.from_mxfp4(blocks, scales)
    flat = blocks.flatten(-2)
    typed = flat.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e8m0fnu)
    for got in (QuantizedWeight.from_mxfp4(flat, scales), QuantizedWeight.from_mxfp4(*typed)):
        assert got.shape == want.shape == (2, 256, 32)
        assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)
    one = QuantizedWeight.from_mxfp4(blocks[0], scales[0])
    assert one.shape == (256, 32) and torch.equal(one.packed, want.packed[: 256 * 16])
    strided = blocks.mT.contiguous().mT
    assert torch.equal(QuantizedWeight.from_mxfp4(strided, scales).packed, want.packed)


def nvfp4(experts: int = 0) -> tuple[Tensor, Tensor]:
    """Every code times every scale, packed [256, 16] and scale [256, 2], or of as many experts."""
    packed, scale = ALL_CODES.expand(256, 16), ALL_SCALES[:, None].expand(256, 2)
    if experts:
        packed, scale = packed.expand(experts, 256, 16), scale.expand(experts, 256, 2)
    return packed.clone(), scale.contiguous().view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("op", ["divide", "multiply"])
def test_nvfp4_all_codes_and_scales_are_the_definition(
    op: str, global_scale: float, dtype: torch.dtype, decoded_by: str
) -> None:
    """float32 scales, rounded once; code · scale in float32, rounded once to `dtype`."""
    packed, scale = nvfp4()
    weight = QuantizedWeight.from_nvfp4(packed, scale, torch.tensor(global_scale), global_op=op)
    values = torch.tensor([e4m3_value(i) for i in range(256)])
    factor = torch.tensor(global_scale)
    scales = values / factor if op == "divide" else factor * values
    want = (values_of(packed).float() * scales[:, None]).to(dtype)
    assert_bits(weight.dequantize(dtype), want)
    assert weight.scales().view(256, 2)[128].signbit().all()  # E4M3 has a −0


@pytest.mark.parametrize("op", ["divide", "multiply"])
def test_nvfp4_stack_has_a_table_for_each_expert(op: str, decoded_by: str) -> None:
    packed, scale = nvfp4(len(GLOBAL_SCALES))
    factors = torch.tensor(GLOBAL_SCALES)
    stack = QuantizedWeight.from_nvfp4(packed, scale, factors, global_op=op)
    assert stack.nested_code.shape == (5, 256)
    got = stack.dequantize(torch.float32)
    for e, factor in enumerate(factors):
        one = QuantizedWeight.from_nvfp4(packed[e], scale[e], factor, global_op=op)
        assert_bits(got[e], one.dequantize(torch.float32))
        rows = slice(e * 256 + 3, e * 256 + 99)
        part = decoder.dense(stack.codes, stack.matrix_shape, torch.float32, rows=rows)
        assert_bits(part, got[e, 3:99])
    across = decoder.dense(stack.codes, stack.matrix_shape, torch.float32, rows=slice(200, 700))
    assert_bits(across, got.view(-1, 32)[200:700])
    for shape in ((5, 1), (5, 1, 1)):  # torchao's
        same = QuantizedWeight.from_nvfp4(packed, scale, factors.view(shape), global_op=op)
        assert same_bits(same.nested_code, stack.nested_code)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_nvfp4_stack_with_one_global_scale_has_one_table(
    shape: tuple[int, ...], experts: int
) -> None:
    packed, scale = nvfp4(experts)
    factor = torch.tensor(0.0123)
    one = QuantizedWeight.from_nvfp4(packed[0], scale[0], factor, global_op="divide").dequantize()
    stack = QuantizedWeight.from_nvfp4(packed, scale, factor.view(shape), global_op="divide")
    assert stack.nested_code.shape == (256,)
    for each in stack.dequantize():
        assert_bits(each, one)


def test_weights_of_the_same_files_share_no_tables() -> None:
    """A state that is loaded into one weight leaves the others."""
    for read, files in (
        (QuantizedWeight.from_mxfp4, gpt_oss()),
        (QuantizedWeight.from_nvfp4, nvfp4()),
    ):
        one, other = read(*files), read(*files)
        for name in ("packed", "code", "nested_code"):
            assert getattr(one, name).data_ptr() != getattr(other, name).data_ptr()


def test_codes_are_swapped_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2m1, "_PIECE", 7)
    want = [(byte & 15) << 4 | byte >> 4 for byte in range(256)]
    assert e2m1.swap_nibbles(ALL_SCALES.view(2, 128)).tolist() == want


def test_nvfp4_multiplied_scale_may_be_rounded() -> None:
    packed, scale = nvfp4()
    factor = torch.tensor(0.0123)
    options = {"global_op": "multiply", "scale_dtype": torch.bfloat16}
    weight = QuantizedWeight.from_nvfp4(packed, scale, factor, **options)
    # PyTorch rounds a factor without dimensions to the dtype of the tensor.
    want = factor * scale.to(torch.bfloat16)
    assert want.dtype is torch.bfloat16
    assert_bits(weight.scales().view(256, 2), want.float())


def test_nvfp4_without_a_global_scale_is_of_e4m3_alone() -> None:
    packed, scale = nvfp4()
    assert_bits(QuantizedWeight.from_nvfp4(packed, scale).scales().view(256, 2), scale.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("global_scale", [None, *GLOBAL_SCALES])
def test_nvfp4_is_torchaos(global_scale: float | None, dtype: torch.dtype) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    packed, scale = nvfp4()
    factor = None if global_scale is None else torch.tensor(global_scale)
    theirs = module.NVFP4Tensor(packed, scale, 16, dtype, per_tensor_scale=factor)
    op = None if factor is None else "multiply"
    ours = QuantizedWeight.from_nvfp4(packed, scale, factor, global_op=op, dtype=dtype)
    assert_bits(ours.dequantize(), theirs.dequantize(dtype))


def test_nvfp4_stack_is_torchaos() -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    packed, scale = nvfp4(5)
    factors = torch.tensor(GLOBAL_SCALES).view(5, 1, 1)
    theirs = module.NVFP4Tensor(packed, scale, 16, torch.bfloat16, per_tensor_scale=factors)
    ours = QuantizedWeight.from_nvfp4(packed, scale, factors, global_op="multiply")
    assert_bits(ours.dequantize(), theirs.dequantize(torch.bfloat16))


@pytest.mark.parametrize("global_scale", [None, *GLOBAL_SCALES])
def test_nvfp4_is_compressed_tensors(global_scale: float | None) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.nvfp4.base", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    packed, scale = nvfp4()
    state = {"weight_packed": packed, "weight_scale": scale}
    factor = None if global_scale is None else torch.tensor([global_scale])
    if factor is not None:
        state["weight_global_scale"] = factor
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    theirs = base.NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    op = None if factor is None else "divide"
    ours = QuantizedWeight.from_nvfp4(packed, scale, factor, global_op=op)
    assert_bits(ours.dequantize(), theirs)


def test_mxfp4_is_compressed_tensors() -> None:
    base = pytest.importorskip("compressed_tensors.compressors.mxfp4.base", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True
    )
    blocks, scales = (t[0].flatten(1)[:255] for t in gpt_oss())
    state = {"weight_packed": blocks, "weight_scale": scales}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    theirs = base.MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert_bits(QuantizedWeight.from_mxfp4(blocks, scales).dequantize(), theirs)


def special(columns: int) -> Tensor:
    """Halves between codes and their neighbours, at many magnitudes; zeros, −0, subnormals."""
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 6.5, 7.5])
    near = [middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(9.0))]
    near = torch.cat(near).repeat(columns)[: 8 * columns].view(8, columns)
    near[:, 0] = 7.9
    powers = torch.logspace(-36, 36, 25, base=2).view(-1, 1, 1)
    rows = [(near * powers).view(-1, columns), -near, torch.zeros(2, columns)]
    rows += [torch.full((1, columns), -0.0), torch.randn(8, columns, generator=generator) * 1e-39]
    rows += [torch.randn(64, columns, generator=generator), torch.full((1, columns), 3e38)]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_mxfp4_is_ocps_rule(dtype: torch.dtype) -> None:
    """Each element one by one: the nearest code, of two the one with an even mantissa."""
    values = special(64)
    values = (values.clamp(-6e4, 6e4) if dtype is torch.float16 else values).to(dtype)
    weight = quantize_4bit(values, "mxfp4")
    assert weight.blocksize == 32 and weight.dtype is dtype
    for row, codes, scales in zip(
        values.double().tolist(),
        values_of(e2m1.swap_nibbles(weight.packed).view(-1, 32)).tolist(),
        weight.absmax.view(-1, 2).tolist(),
        strict=True,
    ):
        for b, byte in enumerate(scales):
            block = row[32 * b : 32 * b + 32]
            largest = max(map(abs, block))
            exponent = -127 if not largest else max(-127, math.frexp(largest)[1] - 3)
            assert byte == exponent + 127
            for value, code in zip(block, codes[32 * b : 32 * b + 32], strict=True):
                scaled = abs(value) / math.ldexp(1, exponent)
                best = min(range(8), key=lambda i: (abs(min(scaled, 6.0) - E2M1[i]), i % 2))
                assert abs(code) == E2M1[best]
                assert math.copysign(1, code) == math.copysign(1, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_mxfp4_is_torchaos(dtype: torch.dtype) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", exc_type=ImportError)
    values = special(64).to(dtype)
    # torchao divides by 2^-126 where the scale is 2^-127.
    values = values[values.abs().view(-1, 2, 32).amax(2).double().amin(1) >= 2.0**-124]
    scales, packed = module.to_mx(values, torch.float4_e2m1fn_x2, 32)
    ours = quantize_4bit(values, "mxfp4")
    assert torch.equal(ours.absmax, scales.view(torch.uint8).flatten())
    assert torch.equal(ours.packed, e2m1.swap_nibbles(packed.view(torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_nvfp4_is_torchaos(dtype: torch.dtype) -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    values = special(48)[-75:].to(dtype)
    factor = module.per_tensor_amax_to_scale(values.abs().amax())
    scales, packed = module.nvfp4_quantize(values, 16, factor)
    ours = quantize_4bit(values, "nvfp4")
    assert torch.equal(ours.absmax, scales.view(torch.uint8).flatten())
    assert torch.equal(ours.packed, e2m1.swap_nibbles(packed))
    table = torch.tensor([e4m3_value(i) for i in range(256)]) * factor
    assert_bits(ours.nested_code, table)


def test_quantize_nvfp4_has_the_nearest_scales_that_are_not_subnormal() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 64, 48, generator=generator) * torch.logspace(-6, 0, 64)[:, None]
    weight = quantize_4bit(values, "nvfp4")
    absmax = values.view(3, -1, 16).abs().amax(2).double()
    want = absmax / 6 / (absmax.amax(1, keepdim=True) / (448 * 6))
    want = want.flatten().clamp(2.0**-6, 448)
    table = torch.tensor([e4m3_value(i) for i in range(127)], dtype=torch.float64)
    got = table[weight.absmax.long()]
    assert got.min() == 2.0**-6 and got.max() == 448
    nearest = (want[:, None] - table).abs().amin(1)
    assert ((got - want).abs() <= nearest + 1e-6 * want).all()  # float32 is rounded before


@pytest.mark.parametrize("quant_type, error", [("mxfp4", 0.25), ("nvfp4", 0.2)])
def test_quantize_stack_keeps_each_expert(quant_type: str, error: float) -> None:
    """Each expert is quantized as it is alone; an expert of zeros has no influence."""
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(3, 5, 96, generator=generator) * torch.tensor([1e-6, 0.0, 1e5])[:, None, None]
    )
    stack = quantize_4bit(values, quant_type)
    got = stack.dequantize()
    for e in range(3):
        assert_bits(got[e], quantize_4bit(values[e], quant_type).dequantize())
        assert_bits(got[e : e + 1], quantize_4bit(values[e : e + 1], quant_type).dequantize())
        assert (got[e] - values[e]).norm() <= error * values[e].norm()


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
def test_quantize_without_double_quant_has_float32_scales(quant_type: str, decoded_by: str) -> None:
    values = special(64)[-65:-1].view(2, 32, 64)
    nested = quantize_4bit(values, quant_type)
    plain = quantize_4bit(values, quant_type, double_quant=False)
    assert nested.nested and not plain.nested and plain.absmax.dtype is torch.float32
    assert same_bits(plain.scales(), nested.scales())
    assert same_bits(plain.dequantize(), nested.dequantize())


def test_from_nvfp4_moves_to_another_device_and_back() -> None:
    packed, scale = nvfp4(2)
    weight = QuantizedWeight.from_nvfp4(packed, scale, torch.tensor([1.0, 2.0]), global_op="divide")
    assert weight.to("meta").nested_code.shape == (2, 256)
    assert "nvfp4 of bfloat16, blocksize=16, nested" in repr(weight)


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
def test_state_dict_of_a_format_that_bitsandbytes_lacks_raises(quant_type: str) -> None:
    with pytest.raises(ValueError, match=f"weight: got {quant_type}, want nf4 or fp4"):
        quantize_4bit(torch.ones(2, 32), quant_type).state_dict()


@pytest.mark.parametrize("quant_type, size", [("mxfp4", 32), ("nvfp4", 16)])
def test_quantize_e2m1_of_other_blocks_raises(quant_type: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"blocksize: got 64, want {size} for {quant_type}"):
        quantize_4bit(torch.ones(2, 64), quant_type, 64)
    with pytest.raises(ValueError, match=rf"weight: got \[2, 40\], want .* multiple of {size}"):
        quantize_4bit(torch.ones(2, 40), quant_type)
    weight = quantize_4bit(torch.ones(2, 64), quant_type)
    with pytest.raises(ValueError, match=rf"shape: got \[4, 8\], want .* multiple of {size}"):
        dataclasses.replace(weight, shape=(4, 8))
    for name in ("nested_absmax", "offset"):
        with pytest.raises(
            ValueError, match=f"{name}: got a tensor, want None beside {quant_type}"
        ):
            dataclasses.replace(weight, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match=r"nested_code: got shape \[2, 256\], want \[256\]"):
        dataclasses.replace(weight, nested_code=torch.ones(2, 256))


MXFP4_ERRORS = [
    ({"blocks": 3}, TypeError, "blocks: got int, want a tensor"),
    (
        {"blocks": torch.zeros(4, 1, 16)},
        TypeError,
        "blocks: got torch.float32, want uint8 or f",
    ),
    (
        {"scales": torch.ones(4, 1)},
        TypeError,
        "scales: got torch.float32, want uint8 or f",
    ),
    (
        {"scales": ALL_SCALES[:4].view(torch.float8_e4m3fn)},
        TypeError,
        "scales: got torch.float8",
    ),
    (
        {"scales": ALL_SCALES[:4]},
        ValueError,
        r"scales: got shape \[4\], want \[4, 1, 1\] for",
    ),
    ({"scales": ALL_SCALES[:8].view(4, 2)}, ValueError, r"scales: got .* want \[4, 1\] .*swizzled"),
    ({"blocks": torch.zeros(4, 24).byte()}, ValueError, "blocks: got .* K a multiple of 32"),
    ({"blocks": torch.zeros(16).byte()}, ValueError, r"blocks: got shape \[16\], want \[N, K/2\]"),
    (
        {"scales": ALL_SCALES[:4, None].to("meta")},
        ValueError,
        "scales: got meta, want cpu",
    ),
    ({"dtype": torch.float64}, TypeError, "dtype: got torch.float64, want float32"),
]


@pytest.mark.parametrize("change, error, message", MXFP4_ERRORS, ids=lambda value: str(value)[:0])
def test_from_mxfp4_of_bad_arguments_raises(change: dict, error: type, message: str) -> None:
    given = {"blocks": ALL_CODES.expand(4, 1, 16), "scales": ALL_SCALES[:4, None]}
    with pytest.raises(error, match=message):
        QuantizedWeight.from_mxfp4(**given | change)


ONE = torch.tensor(1.0)
NVFP4_ERRORS = [
    ({"packed": None}, TypeError, "packed: got NoneType, want a tensor"),
    ({"packed": torch.zeros(128, 12).byte()}, ValueError, "packed: got .* K a multiple of 16"),
    ({"scale": None}, TypeError, "scale: got NoneType, want a tensor"),
    (
        {"scale": torch.zeros(128, 4).byte()},
        TypeError,
        "scale: got torch.uint8, want float8_e4m",
    ),
    # torchao's swizzled scales of [128, 64], and flat ones
    (
        {"scale": torch.ones(32, 16)},
        ValueError,
        r"scale: got shape \[32, 16\], want \[128, 4\] .*led",
    ),
    (
        {"scale": torch.ones(512)},
        ValueError,
        r"scale: got shape \[512\], want \[128, 4\] .*led",
    ),
    ({"global_scale": ONE}, ValueError, "global_op: got None beside a global_scale, want 'div"),
    ({"global_op": "divide"}, ValueError, "global_op: got 'divide' without a global_scale"),
    (
        {"global_scale": ONE, "global_op": "mul"},
        ValueError,
        "global_op: got 'mul', want 'divid",
    ),
    (
        {"global_scale": 1.0, "global_op": "divide"},
        TypeError,
        "global_scale: got float, want",
    ),
    (
        {"global_scale": ONE.half(), "global_op": "divide"},
        TypeError,
        "global_scale: got torch.flo",
    ),
    (
        {"global_scale": ONE * 0, "global_op": "divide"},
        ValueError,
        r"global_scale: got \[0.0\]",
    ),
    (
        {"global_scale": ONE / 0, "global_op": "multiply"},
        ValueError,
        r"global_scale: got \[inf\]",
    ),
    (
        {"global_scale": ONE.expand(3), "global_op": "divide"},
        ValueError,
        r"global_scale: got shape",
    ),
    ({"scale_dtype": torch.float64}, TypeError, "scale_dtype: got torch.float64, want float32"),
]


@pytest.mark.parametrize("change, error, message", NVFP4_ERRORS, ids=lambda value: str(value)[:0])
def test_from_nvfp4_of_bad_arguments_raises(change: dict, error: type, message: str) -> None:
    e4m3 = torch.float8_e4m3fn
    given = {"packed": torch.zeros(128, 32).byte(), "scale": torch.ones(128, 4).to(e4m3)} | change
    if isinstance(given["scale"], Tensor) and given["scale"].dtype is torch.float32:
        given["scale"] = given["scale"].to(e4m3)
    with pytest.raises(error, match=message):
        QuantizedWeight.from_nvfp4(**given)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_from_nvfp4_of_one_bad_global_scale_among_others_raises(bad: float) -> None:
    packed, scale = nvfp4(3)
    with pytest.raises(ValueError, match=r"global_scale: got \[1.0, .* positive and finite"):
        QuantizedWeight.from_nvfp4(packed, scale, torch.tensor([1.0, bad, 2.0]), global_op="divide")
