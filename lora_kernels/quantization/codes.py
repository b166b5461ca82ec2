"""What ops and kernels see of a 4-bit weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import native

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Codes(NamedTuple):
    """A `Weight4bit`'s tensors and block sizes, as the arguments of an op; nothing is checked.

    The weight's shape is that of the adapter beside it.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    blocksize: int
    nested_blocksize: int

    def scales(self) -> Tensor:
        """float32, one a block; a copy only where they are nested."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax
        return reference.dequantize_scales(
            self.absmax, self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize
        )

    def native(self, shape: tuple[int, int]) -> object:
        """The kernels' view: pointers, which hold good as long as the tensors do."""
        assert native.module is not None
        nested = self.nested_absmax is not None
        return native.module.Codes4bit(
            self.packed.data_ptr(), self.code.data_ptr(), self.absmax.data_ptr(),
            _ptr(self.nested_code), _ptr(self.nested_absmax), _ptr(self.offset),
            self.blocksize, self.nested_blocksize if nested else 1, *shape,
        )  # fmt: skip

    def dense(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """The weight, or a block of it, rounded once to `dtype`."""
        kernel = self.packed.device.type == "cpu" and native.module is not None
        if not kernel or dtype not in _DTYPE or torch.compiler.is_compiling():
            whole = reference.dequantize_4bit(
                self.packed, self.scales(), self.code, self.blocksize, shape, dtype
            )
            return whole[rows, columns].contiguous()
        n0, n1, _ = rows.indices(shape[0])
        k0, k1, _ = columns.indices(shape[1])
        assert native.module is not None
        out = self.packed.new_empty(n1 - n0, k1 - k0, dtype=dtype)
        native.module.dequantize(
            self.native(shape), n0, n1 - n0, k0, k1 - k0, out.data_ptr(), _DTYPE[dtype],
            k1 - k0, torch.get_num_threads(),
        )  # fmt: skip
        return out


def encode(
    weight: Tensor, thresholds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_4bit`, by a native kernel where there is one."""
    if weight.device.type != "cpu" or native.module is None or torch.compiler.is_compiling():
        return reference.quantize_4bit(weight, thresholds, order, blocksize)
    weight, n = weight.contiguous(), weight.numel()
    packed = weight.new_empty(-(-n // 2), dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    native.module.quantize(
        weight.data_ptr(), _DTYPE[weight.dtype], n, blocksize, thresholds.data_ptr(),
        order.data_ptr(), reference.SMALLEST_SCALE, packed.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
