"""Codes: a quantized weight as an argument of ops and kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, dtype, float16

from . import coding

BITSANDBYTES_TYPES = "nf4", "fp4"  # of `Codes.quant_type`, that bitsandbytes' ops decode
CODES_TENSORS = 6  # the first fields of `Codes` are tensors, the others are not


class Form(NamedTuple):
    """What a decoder is compiled for.

    Args:
        bits: of a code.
        scale: the dtype in which scales are stored.
        is_double: whether scales in uint8 have nested scales.
        has_shift: whether each block has a shift beside its scale.

    >>> f"{Form(8, float16, False, True)}"
    '8 bits, scales in float16, a shift'
    """

    bits: int
    scale: dtype
    is_double: bool
    has_shift: bool

    def __str__(self) -> str:
        scale = str(self.scale).removeprefix("torch.")
        nested = "nested " * self.is_double
        return f"{self.bits} bits, {nested}scales in {scale}" + ", a shift" * self.has_shift


class Codes(NamedTuple):
    """The tensors and block sizes of a `QuantizedWeight`, unchecked.

        W[n, k] = code[q[n, k]] · scale + shift

    The shape [N, K] of the weight follows from the adapter's. No field but `quant_type` is a name,
    and only bitsandbytes' ops read that.

    Args:
        packed: q, of 4 bits, two per byte with the even element in the high nibble, or of 8 bits.
        absmax: the scale of each block: float32, float16, or uint8 if scales are nested, [blocks].
            With a shift [blocks, 2], each block's scale and shift.
        code: the values of q, float32 [16] for 4 bits, [256] for 8.
        nested_absmax, offset: of double quantization, or None. With a shift nested_absmax is
            [⌈blocks/nested_blocksize⌉, 2], and there is no offset.
        nested_code: the values of scales in uint8, float32 [256], or None; [E, 256] if each of E
            experts has its own.
        blocksize, nested_blocksize: elements per block, and scales per block of scales.
        quant_type: "nf4", "fp4", "mxfp4", "nvfp4", or "" for another form.
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

    @property
    def bits(self) -> int:
        """The bits of a code: 4 or 8. A named format has 4 and no shift."""
        return 4 if self.quant_type or self.code.numel() == 16 else 8

    @property
    def has_shift(self) -> bool:
        return not self.quant_type and self.absmax.dim() == 2

    @property
    def form(self) -> str | Form:
        """The format's name, or else the form."""
        if self.quant_type:
            return self.quant_type
        is_double = self.nested_absmax is not None
        return Form(self.bits, self.absmax.dtype, is_double, self.has_shift)

    def operands(self) -> list[str]:
        """Return what a kernel must take beyond 4-bit codes with scales in float32 or nested."""
        if self.quant_type:
            return []
        found = ["shift"] if self.has_shift else []
        found += ["codes of 8 bits"] if self.bits == 8 else []
        return [*found, "scales in float16"] if self.absmax.dtype is float16 else found

    def scales(self) -> Tensor:
        """Return the scale of each block in float32 [blocks]; with a shift the pairs [blocks, 2].

        No copy if they are stored so.
        """
        if self.nested_code is None:
            return self.absmax.float()
        return coding.dequantize_scales(
            self.absmax, self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize
        )
