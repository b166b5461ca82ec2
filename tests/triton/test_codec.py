"""Decoding by Triton's kernel: the bits of the reference, every one."""

import pytest
import torch

import lora_kernels
from lora_kernels.quantization import quantize_4bit
from tests.support.codec import check_decode


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(70, 256), (37, 333), (16, 72)], ids=str)
def test_dequantize_rows_is_bitwise(shape: tuple[int, int], nested: bool, device: str) -> None:
    """Whole runs of codes, and rows that begin within a byte."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight = quantize_4bit(values.to(device), "nf4", 64, nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_decode(weight, dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(70, 256), (3, 5, 96)], ids=str)
def test_dequantize_of_e2m1_is_bitwise(
    shape: tuple[int, ...], quant_type: str, nested: bool, device: str
) -> None:
    """A table of scales for all experts, or one for each."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    values *= torch.logspace(-5, 5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight = quantize_4bit(values.to(device), quant_type, None, nested)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_decode(weight, dtype)


def test_quantize_with_triton_forced_has_the_bits_of_eager(device: str) -> None:
    values = torch.randn(37, 333, generator=torch.Generator().manual_seed(3)).to(device)
    got = quantize_4bit(values)
    with lora_kernels.backend("eager"):
        want = quantize_4bit(values)
    assert torch.equal(got.packed, want.packed) and torch.equal(got.absmax, want.absmax)
