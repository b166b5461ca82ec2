"""Quantized weights: NF4 and FP4 as bitsandbytes has them, MXFP4, NVFP4, and unnamed forms."""

from importlib.util import find_spec

import torch

from ..backends import decoder
from .packed_state import pack_parameter
from .rounding import round_weight
from .weight import QuantizedWeight, quantize_4bit

__all__ = ["QuantizedWeight", "pack_parameter", "quantize_4bit", "round_weight"]


def _compare_bitsandbytes(quant_type: str, device: torch.device) -> str | None:
    """Return why bitsandbytes does not decode on a device; None if its ops agree with ours."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from .bitsandbytes import compare

    return compare(quant_type, device)


def _compare_decoder(
    decoding: decoder.Decoding, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return where the bits of Triton's decoder differ from those of PyTorch's ops, or None."""
    from ..backends.triton import codec

    weight = _draw_sample(decoding).to(device)
    fields = weight.packed, weight.scales(), weight.code, weight.blocksize
    got = codec.dequantize(weight.codes, weight.matrix_shape, dtype)
    want = decoder.decode(*fields, weight.matrix_shape, dtype)
    if torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
        return None
    nested = "nested " * (decoding.is_nested and isinstance(decoding.form, str))
    return f"Triton's decoder of {nested}{decoding.form} in {dtype} differs from PyTorch's ops"


def _draw_sample(decoding: decoder.Decoding) -> QuantizedWeight:
    """Return a weight of the kind on a CPU, of about 1.5 tiles of the kernel in each direction.

    The kernel is compiled as for the weights of a model: N is a multiple of 16, and K if theirs is.
    """
    K = (192 // decoding.alignment | 1) * decoding.alignment
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def draw_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device="cpu")

    form, blocksize = decoding.form, decoding.blocksize
    if isinstance(form, str):
        values = draw(3, 48, K) if decoding.has_tables else draw(48, K)
        return quantize_4bit(values, form, blocksize, decoding.is_nested)
    blocks, nested_blocksize = 48 * K // blocksize, decoding.nested_blocksize
    of_blocks = (blocks, 2) if form.has_shift else (blocks,)
    is_nested = form.scale is torch.uint8
    return QuantizedWeight(
        packed=draw_bytes(48 * K * form.bits // 8),
        absmax=draw_bytes(*of_blocks) if is_nested else draw(*of_blocks).to(form.scale),
        code=draw(1 << form.bits),
        quant_type="",
        blocksize=blocksize,
        shape=(48, K),
        dtype=torch.float32,
        nested_absmax=draw(-(-blocks // nested_blocksize), *of_blocks[1:])
        if form.is_double
        else None,
        nested_code=draw(256) if is_nested else None,
        nested_blocksize=nested_blocksize,
    )


decoder.compare_decoder = _compare_decoder
decoder.compare_bitsandbytes = _compare_bitsandbytes
