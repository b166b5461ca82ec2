"""4-bit stacks of experts, decoded on a GPU for one GEMM of all experts.

A stack whose decoded form exceeds `PIECE_BYTES` is cut along the features that the GEMM computes,
not between experts. Each piece then has some columns of the result for every expert, so a GEMM of a
piece takes the rows and offsets of the whole call: `grouped_mm` cannot start at a row that only the
GPU knows, since its first group begins at row 0.

A call with fewer rows than experts decodes the matrix of each row's expert in place of the stack.

A piece that is not the whole stack has its codes and scales copied first, one kernel each, and is
decoded by one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import ExpertsOperands, ExpertsSpec
from ...core.codes import Codes
from .. import decoder

# Decoded weights that are held at a time. An H100 writes so much in 0.1 ms, beside which a piece's
# five launches of 2 µs are few (estimate), and a large linear layer's weight takes more: 470 MB for
# 8192×28672. Without bitsandbytes PyTorch's decoding takes three times as much beside it.
PIECE_BYTES = 256 << 20
ALIGNED = 16  # the rows of `grouped_mm`'s operands must be multiples of so many bytes


class QuantizedStack(NamedTuple):
    """The matrices [G, in, out] of a base GEMM in 4 bits.

    Args:
        weight: the packed stack of all experts.
        shape: (E, rows, columns) of the packed stack.
        axis: which of the shape's dimensions is the GEMM's `out`, 1 or 2.
        dtype: of the decoded matrices.
        chosen: int64 [G], the experts that are decoded; None for all, G = E.
        pieces: slices of `out` that are decoded one at a time.
    """

    weight: Codes
    shape: tuple[int, int, int]
    axis: int
    dtype: torch.dtype
    chosen: Tensor | None
    pieces: list[slice]

    def decode(self, piece: slice) -> Tensor:
        """Decode a piece, [G, in, piece of out].

        >>> from lora_kernels.quantization import quantize_4bit
        >>> eyes = quantize_4bit(torch.eye(64).expand(3, 64, 64), double_quant=False)
        >>> cut = [slice(0, 64)]
        >>> stack = QuantizedStack(eyes.codes, eyes.shape, 2, torch.float32, None, cut)
        >>> stack._replace(chosen=torch.tensor([2])).decode(slice(0, 64)).sum().item()
        64.0
        """
        weight, sizes = self.weight, [*self.shape]
        if self.chosen is not None or len(self.pieces) > 1:
            own = self._part(weight.packed, 2, piece), self._part(weight.absmax, self._size, piece)
            weight = weight._replace(packed=own[0], absmax=own[1])
            if weight.nested_absmax is not None:
                nested = self._part(weight.nested_absmax, self._nested_size, piece)
                weight = weight._replace(nested_absmax=nested)
            tables = weight.nested_code
            if self.chosen is not None and tables is not None and tables.dim() > 1:
                weight = weight._replace(nested_code=tables.index_select(0, self.chosen))
        sizes[self.axis] = piece.stop - piece.start
        sizes[0] = self.shape[0] if self.chosen is None else self.chosen.shape[0]
        G, rows, columns = sizes
        dense = decoder.dense(weight, (G * rows, columns), self.dtype).view(G, rows, columns)
        return dense.mT if self.axis == 1 else dense

    @property
    def _size(self) -> int:
        return self.weight.blocksize

    @property
    def _nested_size(self) -> int:
        return self._size * self.weight.nested_blocksize

    def _part(self, t: Tensor, size: int, piece: slice) -> Tensor:
        """Copy what the piece has of a tensor with one element for `size` elements of the stack."""
        E, rows, columns = self.shape
        if len(self.pieces) == 1:
            part = t.view(E, rows * columns // size)
        else:
            part = t.view(E, rows, columns // size)
            units = piece if self.axis == 1 else slice(piece.start // size, piece.stop // size)
            part = part.narrow(self.axis, units.start, units.stop - units.start)
        part = part.contiguous() if self.chosen is None else part.index_select(0, self.chosen)
        return part.view(-1)


def build_stack(
    operands: ExpertsOperands, spec: ExpertsSpec, chosen: Tensor | None, backward: bool = False
) -> QuantizedStack:
    """Return the stack of the forward's base GEMM, x·Wᵀ, or of the backward's, dy·W.

    chosen: int64 [M], the expert of each row, or None.
    """
    weight, shape = operands.weight, stored_shape(operands, spec)
    assert isinstance(weight, Codes)
    axis = 1 if backward == spec.transposed else 2
    count = shape[0] if chosen is None else chosen.shape[0]
    one = count * shape[3 - axis] * spec.dtype.itemsize  # bytes of a column of `out`
    step = ALIGNED if axis == 1 else weight.blocksize
    stack = QuantizedStack(weight, shape, axis, spec.dtype, chosen, _cut(shape[axis], one, step))
    is_double = weight.nested_absmax is not None
    starts_inside = chosen is not None and shape[1] * shape[2] % stack._nested_size != 0
    if is_double and (len(stack.pieces) > 1 or starts_inside):
        stack = stack._replace(weight=decoder.with_plain_scales(weight))
    return stack


def stored_shape(operands: ExpertsOperands, spec: ExpertsSpec) -> tuple[int, int, int]:
    """Return the shape of a packed stack, [E, N, K] or [E, K, N]."""
    (E, N, _), K = operands.lora_B[0].shape, operands.x.shape[1]
    return (E, K, N) if spec.transposed else (E, N, K)


def _cut(size: int, bytes_of_one: int, step: int) -> list[slice]:
    """Cut `size` into the fewest slices of at most `PIECE_BYTES`, about equal multiples of `step`.

    A slice has at least one step.

    >>> _cut(2048, 1 << 18, 64)
    [slice(0, 1024, None), slice(1024, 2048, None)]
    """
    if size * bytes_of_one <= PIECE_BYTES:
        return [slice(0, size)]
    most = max(1, PIECE_BYTES // (bytes_of_one * step)) * step
    count = -(-size // most)
    width = -(-size // (count * step)) * step
    return [slice(start, min(size, start + width)) for start in range(0, size, width)]


def uncut_reason(operands: ExpertsOperands, spec: ExpertsSpec) -> str | None:
    """Return why a 4-bit stack cannot be cut into pieces though it exceeds one, or None."""
    weight, (E, rows, columns) = operands.weight, stored_shape(operands, spec)
    assert isinstance(weight, Codes)
    fits = E * rows * columns * spec.dtype.itemsize <= PIECE_BYTES
    if fits or not columns % weight.blocksize:
        return None
    return f"blocks of {weight.blocksize} codes straddle rows of {columns}"


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return the expert of each row, int64 [rows]; of rows of no expert, the last one.

    >>> expert_of_rows(torch.tensor([2, 2, 3]), 4)
    tensor([0, 0, 2, 2])
    """
    places = torch.arange(rows, device=offsets.device)
    expert = torch.bucketize(places, offsets.contiguous(), right=True)
    return expert.clamp_(max=offsets.shape[0] - 1)


def chosen_experts(operands: ExpertsOperands, spec: ExpertsSpec) -> Tensor | None:
    """Return the expert of each row of x, int64 [M], if their matrices are decoded one by one.

    None for a dense weight, as many rows as experts or more, or an expert that begins inside of a
    block.
    """
    weight, M = operands.weight, operands.x.shape[0]
    E, rows, columns = stored_shape(operands, spec)
    if not isinstance(weight, Codes) or not 0 < M < E:
        return None
    if rows * columns % weight.blocksize or uncut_reason(operands, spec) is not None:
        return None
    return expert_of_rows(operands.offsets, M)
