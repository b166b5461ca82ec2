"""What ops and kernels see of a 4-bit weight."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import native
from ..backends.library import follows_gpu

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


CODES_TENSORS = 6  # of the fields of `Codes`, the first


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
    quant_type: str

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
        if (
            native.module is None
            or follows_gpu(self.packed.device.type)
            or dtype not in _DTYPE
            or torch.compiler.is_compiling()
        ):
            return self._library_dense(shape, dtype)[rows, columns].contiguous()
        n0, n1, _ = rows.indices(shape[0])
        k0, k1, _ = columns.indices(shape[1])
        assert native.module is not None
        out = self.packed.new_empty(n1 - n0, k1 - k0, dtype=dtype)
        native.module.dequantize(
            self.native(shape), n0, n1 - n0, k0, k1 - k0, out.data_ptr(), _DTYPE[dtype],
            k1 - k0, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _library_dense(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """By bitsandbytes where its ops have passed their check on the device, else `decode`."""
        if dtype in _DTYPE and bitsandbytes_reason(self.packed.device) is None:
            return self.bitsandbytes_dense(shape, dtype)
        return decode(self.packed, self.scales(), self.code, self.blocksize, shape, dtype)

    def bitsandbytes_dense(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in float32, bfloat16 or float16 by bitsandbytes' op."""
        scales = self.absmax
        if self.nested_absmax is not None and self.offset is not None:
            scales = torch.ops.bitsandbytes.dequantize_blockwise(
                self.absmax, self.nested_absmax, self.nested_code, self.nested_blocksize,
                torch.float32,
            ).add_(self.offset)  # fmt: skip
        return torch.ops.bitsandbytes.dequantize_4bit(  # type: ignore[no-any-return]
            self.packed.view(-1, 1), scales, self.blocksize, self.quant_type, shape, dtype
        )

    def gemm(self, x: Tensor, columns: int, bias: Tensor | None) -> Tensor | None:
        """x·W̃ᵀ + bias [M, columns] in x's dtype by bitsandbytes' `gemm_4bit`; None where that is
        not used or not there (before 0.50), or would copy a weight whose rows end in a block."""
        if bitsandbytes_reason(x.device) is not None or x.dtype not in _DTYPE:
            return None
        if not x.shape[0] or x.shape[1] % self.blocksize or not has_gemm_4bit():
            return None
        return self.bitsandbytes_gemm(x, columns, bias)

    def bitsandbytes_gemm(self, x: Tensor, columns: int, bias: Tensor | None) -> Tensor:
        """x·W̃ᵀ + bias by bitsandbytes, which decodes in the GEMM for few rows of x."""
        nested = self.nested_absmax is not None
        return torch.ops.bitsandbytes.gemm_4bit(  # type: ignore[no-any-return]
            x.contiguous(), self.packed.view(-1, 1), (columns, x.shape[1]),
            self.nested_absmax if nested else self.absmax, self.blocksize, self.quant_type,
            bias=None if bias is None else bias.to(x.dtype),
            absmax_8bit=self.absmax if nested else None,
            absmax_code=self.nested_code,
            absmax_offset=None if self.offset is None else self.offset.reshape(()),
        )  # fmt: skip


def decode(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """`reference.dequantize_4bit` to the same bits in three kernels: the bytes as int32 indices,
    the two float32 values of each from a table, their product with the scales in `dtype`.

    >>> packed, scales = torch.tensor([0x21, 0x30], dtype=torch.uint8), torch.tensor([0.5])
    >>> decode(packed, scales, torch.arange(16.0), 32, (1, 3), torch.float32)
    tensor([[1.0000, 0.5000, 1.5000]])
    """
    n, pairs = math.prod(shape), torch.cartesian_prod(code, code)
    values = pairs.index_select(0, packed.int()).view(-1)
    whole = n // blocksize * blocksize
    out = values.new_empty(n, dtype=dtype)
    blocks, block_scales = values[:whole].view(-1, blocksize), scales[: whole // blocksize, None]
    torch.mul(blocks, block_scales, out=out[:whole].view(-1, blocksize))
    if whole < n:
        torch.mul(values[whole:n], scales[-1], out=out[whole:])
    return out.view(shape)


@contextmanager
def decoded_by_pytorch() -> Iterator[None]:
    """Leave bitsandbytes out on the CPU, whose kernel misreads scales where a block straddles rows,
    whatever it was checked for before. For tests of a GPU's path there."""
    key, before = ("cpu", None), dict(_bitsandbytes)
    _bitsandbytes[key] = "it is left out on the CPU"
    try:
        yield
    finally:
        _bitsandbytes.pop(key)
        _bitsandbytes.update({k: v for k, v in before.items() if k == key})


@functools.cache
def has_gemm_4bit() -> bool:
    """True if the bitsandbytes that is imported has the op."""
    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")


# Device -> why bitsandbytes' ops are not used on it, None if they passed `bitsandbytes.check`.
_bitsandbytes: dict[tuple[str, int | None], str | None] = {}
_UNCHECKED = "bitsandbytes is not installed, or was not yet checked by fuse() or a layer's move"


def bitsandbytes_reason(device: torch.device) -> str | None:
    """Why 4-bit weights on this device are not decoded by bitsandbytes; None where they are."""
    return _bitsandbytes.get((device.type, device.index), _UNCHECKED)


def check_decoder(device: torch.device) -> None:
    """Have bitsandbytes, if it is installed, checked on a GPU that will hold a 4-bit weight.

    Waits for the device, so that no forward calls it.
    """
    wanted = device.type != "meta" or "bitsandbytes" in sys.modules  # which takes a second
    if follows_gpu(device.type) and wanted and find_spec("bitsandbytes") is not None:
        from .bitsandbytes import check

        check(device)


def decoded_by(device: torch.device) -> str:
    """What decodes 4-bit weights on a GPU, as a clause for `explain`."""
    reason = bitsandbytes_reason(device)
    return (
        "bitsandbytes decodes" if reason is None else f"PyTorch decodes in three kernels: {reason}"
    )


def check_bitsandbytes(
    device: torch.device, disagreement: Callable[[torch.device], str | None]
) -> str | None:
    """Return why bitsandbytes' ops are not used on the device, asking once a process."""
    key = (device.type, device.index)
    if key not in _bitsandbytes:
        _bitsandbytes[key] = disagreement(device)
    return _bitsandbytes[key]


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
