"""Quantized weights: NF4 and FP4 as bitsandbytes has them, MXFP4, NVFP4, and unnamed forms."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from ..backends import decoder
from ..core.codes import Form
from .codebooks import BITSANDBYTES_TYPES
from .packed_state import pack_parameter
from .weight import QuantizedWeight, quantize_4bit

__all__ = ["QuantizedWeight", "pack_parameter", "quantize_4bit"]


def _compare_bitsandbytes(quant_type: str, device: torch.device) -> str | None:
    """Return why bitsandbytes does not decode on a device; None if its ops agree with ours."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from .bitsandbytes import compare

    return compare(quant_type, device)


def _compare_decoder(form: str | Form, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return where the bits of Triton's decoder differ from those of PyTorch's ops, or None."""
    from ..backends.triton import codec

    samples = _samples(form) if isinstance(form, str) else [("", _draw(form))]
    for what, weight in samples:
        weight = weight.to(device)
        fields = weight.packed, weight.scales(), weight.code, weight.blocksize
        got = codec.dequantize(weight.codes, weight.matrix_shape, dtype)
        want = decoder.decode(*fields, weight.matrix_shape, dtype)
        if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
            return f"Triton's decoder of {what}{form} in {dtype} differs from PyTorch's ops"
    return None


def _draw(form: Form) -> QuantizedWeight:
    """Return a weight of a form that has no name, of random codes, values, scales and shifts."""
    generator, blocks = torch.Generator().manual_seed(0), 40 * 6

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def draw_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device="cpu")

    of_blocks = (blocks, 2) if form.has_shift else (blocks,)
    is_nested = form.scale is torch.uint8
    return QuantizedWeight(
        packed=draw_bytes(blocks * 32 * form.bits // 8),
        absmax=draw_bytes(*of_blocks) if is_nested else draw(*of_blocks).to(form.scale),
        code=draw(1 << form.bits),
        quant_type="",
        blocksize=32,
        shape=(40, 192),
        dtype=torch.float32,
        nested_absmax=draw(blocks // 8, *of_blocks[1:]) if form.is_double else None,
        nested_code=draw(256) if is_nested else None,
        nested_blocksize=8,
    )


def _samples(quant_type: str) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield weights, and a word for nested ones.

    Each is another compilation: scales in float32 and in bytes, NF4's and FP4's rows that begin
    within a byte, and a table of scales for each expert of NVFP4.
    """
    generator = torch.Generator().manual_seed(0)
    samples: list[tuple[tuple[int, ...], bool]] = [((40, 192), False), ((40, 192), True)]
    samples += [((37, 65), True)] if quant_type in BITSANDBYTES_TYPES else []
    samples += [((3, 12, 96), True)] if quant_type == "nvfp4" else []
    for shape, nested in samples:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        yield "nested " * nested, quantize_4bit(values, quant_type, double_quant=nested)


decoder.compare_decoder = _compare_decoder
decoder.compare_bitsandbytes = _compare_bitsandbytes
