"""Quantizing and decoding: the bits of the reference, every one.

The tests here run where a directory imports them; its fixture `device` forces the backend.
"""

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.core import coding
from lora_kernels.quantization import QuantizedWeight, codebooks, quantize_4bit
from lora_kernels.quantization.codebooks import BLOCKSIZES

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

# How a weight's last block of 64 ends. A short one is divided by its scale, which is never 0, and a
# whole one multiplied by the reciprocal: of "apart" the codes differ, of "zeros" the scale.
LAST_BLOCKS = ("zeros", "apart", "short")


def special(quant_type: str) -> Tensor:
    """Zeros, subnormals, an outlier in each block, values on the thresholds and beside them."""
    generator = torch.Generator().manual_seed(0)
    thresholds = codebooks.thresholds(quant_type)
    near = [thresholds, torch.nextafter(thresholds, torch.tensor(1.0)), -thresholds]
    # Thresholds times any scale, whose quotients and products with a reciprocal round apart.
    scales = 0.5 + torch.rand(128, 1, generator=generator)
    scaled = torch.cat([scales, scales * thresholds, scales * thresholds * (1 + 2**-23)], dim=1)
    rows = [
        torch.nn.functional.pad(scaled, (0, 32 - scaled.shape[1])).flatten(),
        torch.zeros(4096),
        torch.randn(4096, generator=generator) * 1e-40,
        torch.randn(4096, generator=generator).where(torch.arange(4096) % 32 != 5, 1e30),
        torch.cat(near).repeat(100)[:4096].where(torch.arange(4096) % 32 != 7, 1.0),
        torch.randn(4096, generator=generator) * 1e-3,
    ]
    return torch.cat(rows)


def weight_of_blocks(blocks: int, last: str) -> Tensor:
    """Return 64 · blocks values in float32, or 5 less, that end as LAST_BLOCKS says."""
    values = special("nf4")
    values, apart = values.repeat(-(-blocks * 64 // values.numel()))[: blocks * 64], values[:64]
    if last == "short":
        return values[:-5]
    values[-64:] = apart if last == "apart" else 0
    return values


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Return whether dtype, shape and bits agree, also of NaN and of zeros of either sign."""
    if got.dtype is not want.dtype or got.shape != want.shape:
        return False
    return torch.equal(*(t.cpu().flatten().view(torch.uint8) for t in (got, want)))


def check_quantize(
    values: Tensor, quant_type: str = "nf4", blocksize: int = 64, device: str = "cpu"
) -> None:
    """Codes and scales of a vector, quantized on the device, are the reference's."""
    tables = codebooks.thresholds(quant_type), codebooks.order(quant_type)
    packed, absmax = coding.quantize_4bit(values, *tables, blocksize)
    got = quantize_4bit(values[None].to(device), quant_type, blocksize, double_quant=False)
    assert same_bits(got.packed, packed) and same_bits(got.absmax, absmax)


def check_decode(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """The weight, decoded where it lies, is the reference's."""
    w = weight.to("cpu")
    want = coding.dequantize(w.packed, w.scales(), w.code, w.blocksize, w.shape, dtype)
    assert same_bits(weight.dequantize(dtype), want)


@pytest.mark.parametrize(
    ("blocksize", "dtype"), [*((b, f32) for b in BLOCKSIZES["nf4"]), (64, bf16), (64, f16)], ids=str
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_special_values_is_bitwise(
    quant_type: str, blocksize: int, dtype: torch.dtype, device: str
) -> None:
    values = special(quant_type)
    if dtype is f16:
        values = values.clamp(-6e4, 6e4)
    values = values.to(dtype)[: 5 * 4096 + 333]  # a short last block, an odd last element
    check_quantize(values, quant_type, blocksize, device)


def test_quantize_short_block_is_divided_by_its_scale(device: str) -> None:
    """The quotient and the product with a reciprocal fall on two sides of a threshold."""
    for row in special("nf4")[: 128 * 32].view(128, 32)[:, :31]:
        check_quantize(row, "nf4", 32, device)


@pytest.mark.parametrize("n", [31, 100])
def test_quantize_short_block_of_zeros_has_the_smallest_scale(n: int, device: str) -> None:
    """A whole block's is 0."""
    got = quantize_4bit(torch.zeros(1, n, device=device), double_quant=False)
    assert got.absmax.tolist() == [0.0] * (n // 64) + [torch.tensor(1e-38).item()]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_not_finite_raises(bad: float, device: str) -> None:
    weight = torch.ones(3, 50, device=device)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_4bit(weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(70, 256), (37, 333), (16, 72)], ids=str)
def test_quantize_and_dequantize_rows_is_bitwise(
    shape: tuple[int, int], nested: bool, device: str
) -> None:
    """Whole runs of codes, and rows that begin within a byte."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with lora_kernels.backend("eager"):
        want = quantize_4bit(values, "nf4", 64, nested)
    got = quantize_4bit(values.to(device), "nf4", 64, nested)
    assert same_bits(got.packed, want.packed) and same_bits(got.absmax, want.absmax)
    for dtype in (f32, bf16, f16):
        check_decode(got, dtype)
