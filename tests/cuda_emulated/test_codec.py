"""Quantizing and decoding by the CUDA kernels: the bits of the reference, every one."""

import pytest
import torch

from lora_kernels import reference
from lora_kernels.quantization import codebooks, quantize_4bit
from lora_kernels.quantization.weight4bit import BLOCKSIZES
from tests.quantization.values import same_bits, special

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("blocksize", "dtype"), [*((b, f32) for b in BLOCKSIZES), (64, bf16), (64, f16)], ids=str
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    values = special(quant_type)
    if dtype is f16:
        values = values.clamp(-6e4, 6e4)
    values = values.to(dtype)[: 5 * 4096 + 333]  # a short last block, an odd last element
    thresholds, order = codebooks.thresholds(quant_type), codebooks.order(quant_type)
    want = reference.quantize_4bit(values, thresholds, order, blocksize)
    got = quantize_4bit(values[None], quant_type, blocksize, double_quant=False)
    assert same_bits(got.packed, want[0])
    assert same_bits(got.absmax, want[1])


def test_a_short_block_is_divided() -> None:
    """Where the quotient and the product with a reciprocal fall on two sides of a threshold."""
    thresholds, order = codebooks.thresholds("nf4"), codebooks.order("nf4")
    for row in special("nf4")[: 128 * 32].view(128, 32)[:, :31]:
        want = reference.quantize_4bit(row, thresholds, order, 32)
        assert same_bits(quantize_4bit(row[None], "nf4", 32, double_quant=False).packed, want[0])


@pytest.mark.parametrize("n", [31, 100])
def test_a_short_block_of_zeros(n: int) -> None:
    """Whose scale is the smallest there is, where a whole block's is 0."""
    got = quantize_4bit(torch.zeros(1, n), double_quant=False)
    assert got.absmax.tolist() == [0.0] * (n // 64) + [torch.tensor(1e-38).item()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(3, 50)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_4bit(weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(70, 256), (37, 333), (16, 72)], ids=str)
def test_decode(shape: tuple[int, int], nested: bool) -> None:
    """Whole runs of codes, and rows that begin within a byte."""
    weight = quantize_4bit(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    if not nested:
        weight = quantize_4bit(weight.dequantize(), "nf4", 64, False)
    for dtype in (f32, bf16, f16):
        want = reference.dequantize_4bit(
            weight.packed, weight.scales(), weight.code, weight.blocksize, weight.shape, dtype
        )
        assert same_bits(weight.dequantize(dtype), want)
