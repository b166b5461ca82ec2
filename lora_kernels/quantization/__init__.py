"""4-bit weights: NF4 and FP4 as bitsandbytes has them, MXFP4 and NVFP4."""

from importlib.util import find_spec

import torch

from ..backends import decoder
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


def _compare_decoder(quant_type: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return where the bits of Triton's decoder differ from those of PyTorch's ops, or None.

    Each sample is another compilation: scales in float32 and in bytes, NF4's and FP4's rows that
    begin within a byte, and a table of scales for each expert of NVFP4.
    """
    from ..backends.triton import codec

    generator = torch.Generator().manual_seed(0)
    samples: list[tuple[tuple[int, ...], bool]] = [((40, 192), False), ((40, 192), True)]
    samples += [((37, 65), True)] if quant_type in BITSANDBYTES_TYPES else []
    samples += [((3, 12, 96), True)] if quant_type == "nvfp4" else []
    for shape, nested in samples:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        weight = quantize_4bit(values, quant_type, double_quant=nested).to(device)
        fields = weight.packed, weight.scales(), weight.code, weight.blocksize
        got = codec.dequantize(weight.codes, weight.matrix_shape, dtype)
        want = decoder.decode(*fields, weight.matrix_shape, dtype)
        if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
            what = f"{'nested ' * nested}{quant_type} in {dtype}"
            return f"Triton's decoder of {what} differs from PyTorch's ops"
    return None


decoder.compare_decoder = _compare_decoder
decoder.compare_bitsandbytes = _compare_bitsandbytes
