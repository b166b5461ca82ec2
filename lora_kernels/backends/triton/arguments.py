"""Tuples that kernels take as arguments. None stands for a missing operand.

Tuples for upper-case parameters are compile-time constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ...core.packed4bit import Packed4bit
    from ..dropout import Dropout


class Matrix(NamedTuple):
    """A matrix: the pointer to its first element, and its strides in elements."""

    ptr: Tensor
    row: int
    col: int

    @classmethod
    def from_tensor(cls, t: Tensor) -> Matrix:
        return cls(t, *t.stride())


class Stack(NamedTuple):
    """A stack of matrices [E, rows, columns], as `Matrix`; step: from one matrix to the next."""

    ptr: Tensor
    step: int
    row: int
    col: int

    @classmethod
    def from_tensor(cls, t: Tensor) -> Stack:
        return cls(t, *t.stride())


class Codes(NamedTuple):
    """The tensors of a 4-bit weight; see `Packed4bit`.

    first_row: of one expert in a stack, set inside a kernel; None for a weight by itself.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    first_row: int | None = None

    @classmethod
    def from_weight(cls, weight: Packed4bit) -> Codes:
        tables = weight.absmax, weight.code, weight.nested_absmax, weight.nested_code
        return cls(weight.packed, *tables, weight.offset)


class Mask(NamedTuple):
    """A dropout mask: the generator's state, and the threshold for its words."""

    rng: Tensor
    threshold: int

    @classmethod
    def from_dropout(cls, dropout: Dropout) -> Mask | None:
        return None if dropout.rng is None else cls(dropout.rng, dropout.threshold)


class Format(NamedTuple):
    """The layout of 4-bit codes.

    Args:
        LOG2_BLOCK: log2 of the block size.
        WHOLE: whether rows consist of whole blocks.
        WORDS: whether rows consist of whole, aligned words of 8 codes.
        ASM: whether the codebook is read by inline PTX.
    """

    LOG2_BLOCK: int
    WHOLE: bool
    WORDS: bool
    ASM: bool


class Types(NamedTuple):
    """The rounding and addressing of operands.

    Dtypes are strings, because Triton serializes compile-time constants as JSON for its hooks.

    Args:
        COMPUTE: dtype of the base GEMM's operands.
        WIDER: dtype of the operands of the adapter's GEMMs.
        PRECISION: of GEMMs in float32, as `tl.dot` names it.
        WIDE: whether offsets exceed 2³¹.
    """

    COMPUTE: str
    WIDER: str
    PRECISION: str
    WIDE: bool
