"""Codes: a 4-bit weight as an argument of ops and kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import coding

CODES_TENSORS = 6  # the first fields of `Codes` are tensors, the others are not


class Codes(NamedTuple):
    """The tensors and block sizes of a `QuantizedWeight`, unchecked.

    The shape [N, K] of the weight follows from the adapter's.

    Args:
        packed: codes, two per byte.
        absmax: scale of each block, float32, or uint8 if scales are nested.
        code: the codebook, float32 [16].
        nested_absmax, offset: of double quantization, or None.
        nested_code: the values of scales in uint8, float32 [256], or None; [E, 256] if each of E
            experts has its own.
        blocksize, nested_blocksize: elements per block, and scales per block of scales.
        quant_type: "nf4", "fp4", "mxfp4" or "nvfp4".
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int
    quant_type: str

    def scales(self) -> Tensor:
        """Return the scale of each block in float32; no copy unless the scales are nested."""
        if self.nested_code is None:
            return self.absmax
        return coding.dequantize_scales(
            self.absmax, self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize
        )
