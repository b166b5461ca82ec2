"""Quantized weights on any device: `dense` decodes one, and `encode` quantizes to 4 bits.

On a CPU the native kernels decode, on a GPU Triton's kernel the forms for which it passed its
check, and PyTorch's ops else. `gemm` is bitsandbytes' GEMM of few rows, which decodes inside.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, _TorchDispatchModeKey
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..core import coding
from ..core.codes import BITSANDBYTES_TYPES, Codes, Form
from ..core.dtypes import DTYPE_NUMBERS
from . import checked, workspace
from .cpu import native
from .library import is_on_gpu_path

# The most rows for which `gemm_4bit` may decode inside the GEMM of a weight of 4 Mi elements and
# more, on all GPUs that bitsandbytes has measured. For more it decodes the whole weight, with one
# copy of the scales more than `dense` makes.
FUSED_ROWS = 256
WHOLE = slice(None)
_TRACING_MODES = _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE


def native_view(weight: Codes, shape: tuple[int, int]) -> object:
    """Return the native kernels' view of the weight: addresses, valid while the tensors live."""
    assert native.module is not None
    scale_bytes = 1 if weight.nested_code is not None else weight.absmax.element_size()
    return native.module.Codes(
        weight.packed.data_ptr(), weight.code.data_ptr(), weight.absmax.data_ptr(),
        _ptr(weight.nested_code), _ptr(weight.nested_absmax), _ptr(weight.offset),
        weight.blocksize, weight.nested_blocksize, *shape,
        weight.bits, scale_bytes, weight.has_shift,
    )  # fmt: skip


def dense(
    weight: Codes,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: slice = WHOLE,
    columns: slice = WHOLE,
) -> Tensor:
    """Return the weight [N, K], or a block of it, rounded once to `dtype`."""
    if (
        native.module is None
        or is_on_gpu_path(weight.packed.device.type)
        or dtype not in DTYPE_NUMBERS
        or torch.compiler.is_compiling()
        or is_traced(weight.packed)
    ):
        weight, shape, rows = _cut_rows(weight, shape, rows)
        decoded = _checked_dense(weight, shape, dtype)
        return decoded if rows == columns == WHOLE else decoded[rows, columns].contiguous()
    if weight.nested_code is not None and weight.nested_code.dim() > 1:
        weight, shape, rows = _cut_rows(weight, shape, rows)
        if weight.nested_code is not None and weight.nested_code.dim() > 1:  # of several experts
            weight = with_plain_scales(weight)
    n0, n1, _ = rows.indices(shape[0])
    k0, k1, _ = columns.indices(shape[1])
    assert native.module is not None
    out = weight.packed.new_empty(n1 - n0, k1 - k0, dtype=dtype)
    part, to = (n0, n1 - n0, k0, k1 - k0), (out.data_ptr(), DTYPE_NUMBERS[dtype], k1 - k0)
    native.module.dequantize(native_view(weight, shape), *part, *to, torch.get_num_threads())
    return out


def is_traced(t: Tensor) -> bool:
    """Return True if `make_fx` traces, a transform of torch.func is active, or t is fake.

    They see ops, and nothing that is written by its address.
    """
    if peek_interpreter_stack() is not None or torch._C._dispatch_keys(t).has(DispatchKey.Python):
        return True
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)


def _cut_rows(
    weight: Codes, shape: tuple[int, int], rows: slice
) -> tuple[Codes, tuple[int, int], slice]:
    """Return the weight of the rows alone, its shape, and all rows; the whole one if a block of
    codes straddles their first or last row. The codes are a view."""
    (N, K), size = shape, weight.blocksize
    n0, n1, _ = rows.indices(N)
    if (n0, n1) == (0, N):
        return weight, shape, WHOLE
    if n0 * K % size or n1 * K % size:
        return weight, shape, rows
    table, expert_rows = weight.nested_code, N
    if table is not None and table.dim() > 1:
        expert_rows = N // table.shape[0]
    expert, is_of_one = n0 // expert_rows, n0 // expert_rows == (n1 - 1) // expert_rows
    if weight.nested_absmax is not None or not is_of_one:
        weight = with_plain_scales(weight)
    elif table is not None:
        weight = weight._replace(nested_code=table.view(-1, 256)[expert])
    bits, absmax = weight.bits, weight.absmax
    packed = weight.packed[n0 * K * bits // 8 : n1 * K * bits // 8]
    absmax = absmax[n0 * K // size : n1 * K // size]
    return weight._replace(packed=packed, absmax=absmax), (n1 - n0, K), WHOLE


def with_plain_scales(weight: Codes) -> Codes:
    """Return the weight with scales and shifts in float32; no copy if they are."""
    if weight.nested_code is None and weight.absmax.dtype is torch.float32:
        return weight
    return weight._replace(
        absmax=weight.scales(), nested_absmax=None, nested_code=None, offset=None
    )


def _checked_dense(weight: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Decode by Triton's kernel if it passed its check on the device, else by PyTorch's ops."""
    if kernel_reason(weight.packed.device, Decoding.of(weight, shape[1]), dtype) is None:
        if checked.is_dispatched(weight.packed):
            return torch.ops.lora_kernels.decode(*weight, *shape, dtype)  # type: ignore[no-any-return]
        return _launch_decoder(*weight, *shape, dtype)
    return decode(weight.packed, weight.scales(), weight.code, weight.blocksize, shape, dtype)


def gemm(weight: Codes, x: Tensor, columns: int, bias: Tensor | None) -> Tensor | None:
    """Return x·W̃ᵀ + bias [M, columns] in x's dtype by bitsandbytes' `gemm_4bit`.

    None if bitsandbytes has no such format or is not used on the device, if x
    has no rows or more than `FUSED_ROWS`, or if K is no multiple of the block size, for which
    `gemm_4bit` warns and decodes the whole weight.
    """
    if bitsandbytes_reason(weight.packed.device, weight.form) is not None:
        return None
    M, K = x.shape
    if not 0 < M <= FUSED_ROWS or K % weight.blocksize:
        return None
    return bitsandbytes_gemm(weight, x, columns, bias)


def bitsandbytes_gemm(weight: Codes, x: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """Return x·W̃ᵀ + bias by bitsandbytes, which decodes inside the GEMM if x has few rows."""
    packed, shape = weight.packed.view(-1, 1), (columns, x.shape[1])
    absmax, nested = weight.absmax, {}
    if weight.nested_absmax is not None:
        offset = None if weight.offset is None else weight.offset.reshape(())
        nested = {"absmax_8bit": absmax, "absmax_code": weight.nested_code, "absmax_offset": offset}
        absmax = weight.nested_absmax
    bias = None if bias is None else bias.to(x.dtype)
    form = weight.blocksize, weight.quant_type
    return torch.ops.bitsandbytes.gemm_4bit(  # type: ignore[no-any-return]
        x.contiguous(), packed, shape, absmax, *form, bias=bias, **nested
    )


def decode(
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the bits of `coding.dequantize`, in three kernels, or four with a shift.

    They widen the bytes to int32 indices, look up the float32 values of each byte in a table,
    multiply the values by the scales, and add the shifts. The last one rounds to `dtype`.

    >>> packed, scales = torch.tensor([0x21, 0x30], dtype=torch.uint8), torch.tensor([0.5])
    >>> decode(packed, scales, torch.arange(16.0), 32, (1, 3), torch.float32)
    tensor([[1.0000, 0.5000, 1.5000]])
    """
    if is_traced(packed):  # a graph may drop what is written into views of its result
        return coding.dequantize(packed, scales, code, blocksize, shape, dtype)
    n, table = math.prod(shape), code
    if code.numel() == 16:
        table = torch.cartesian_prod(code, code)
    values = table.index_select(0, packed.int()).view(-1)
    if scales.dim() == 2:  # whole blocks
        blocks, out = values.view(-1, blocksize), values.new_empty(shape, dtype=dtype)
        torch.add(blocks.mul_(scales[:, :1]), scales[:, 1:], out=out.view(-1, blocksize))
        return out
    whole = n // blocksize * blocksize
    out = values.new_empty(n, dtype=dtype)
    blocks, block_scales = values[:whole].view(-1, blocksize), scales[: whole // blocksize, None]
    torch.mul(blocks, block_scales, out=out[:whole].view(-1, blocksize))
    if whole < n:
        torch.mul(values[whole:n], scales[-1], out=out[whole:])
    return out.view(shape)


def _launch_decoder(*args: Any) -> Tensor:
    from .triton import codec

    *fields, N, K, dtype = args
    return codec.dequantize(Codes(*fields), (N, K), dtype)  # type: ignore[no-any-return]


# The decoder as one op, for modes.
_LIB = torch.library.Library("lora_kernels", "FRAGMENT")
_LIB.define(
    "decode(Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, "
    "Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize, str quant_type, "
    "int N, int K, ScalarType dtype) -> Tensor"
)
torch.library.register_kernel("lora_kernels::decode", None, _launch_decoder, lib=_LIB)
torch.library.register_fake(
    "lora_kernels::decode",
    lambda packed, *args: packed.new_empty(args[-3:-1], dtype=args[-1]),
    lib=_LIB,
)


class Decoding(NamedTuple):
    """What the decoder of a weight is compiled for, beside the dtype.

    Args:
        form: of the codes and scales.
        blocksize, nested_blocksize: those of the weight.
        is_nested: whether scales are in bytes.
        has_tables: whether each expert has a table of scales.
        alignment: of a row in its blocks; the block size if rows are whole blocks.
    """

    form: str | Form
    blocksize: int
    nested_blocksize: int
    is_nested: bool
    has_tables: bool
    alignment: int

    @classmethod
    def of(cls, weight: Codes, columns: int) -> Decoding:
        """Return that of a weight [N, columns]."""
        table, sizes = weight.nested_code, weight[6:8]
        has_tables = table is not None and table.dim() > 1
        alignment = math.gcd(columns, weight.blocksize)
        return cls(weight.form, *sizes, table is not None, has_tables, alignment)


# Decoding and dtype -> device -> why Triton's kernel does not decode there; None after it passed
# `compare_decoder`. Each is compiled by itself, so the first weight of a kind checks that kind.
decoder_reasons: dict[tuple[Decoding, torch.dtype], checked.Reasons] = {}


def kernel_reason(device: torch.device, decoding: Decoding, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernel does not decode such weights to `dtype` on this device."""
    if not is_on_gpu_path(device.type):
        return "the CPU backend decodes"
    if torch.compiler.is_compiling():
        return checked.UNCHECKED
    reasons = decoder_reasons.setdefault((decoding, dtype), {})
    compare = functools.partial(compare_decoder, decoding, dtype)
    return checked.kernel_reason(reasons, compare, device, dtype)


# Device type and index, and type -> the reason why bitsandbytes' ops are not used, or None after
# they passed `compare_bitsandbytes`.
bitsandbytes_reasons: dict[tuple[str, int | None, str], str | None] = {}
UNCHECKED = "bitsandbytes is unchecked: the first 4-bit call outside of a graph or trace checks it"


def _never_compare(*args: Any) -> str | None:
    return UNCHECKED


# Compare Triton's decoder of a kind, or bitsandbytes' ops of a type, with PyTorch's decoding on a
# device, and return that reason. They quantize samples, hence `quantization`, which is above this
# package, sets them.
compare_decoder: Callable[[Decoding, torch.dtype, torch.device], str | None] = _never_compare
compare_bitsandbytes: Callable[[str, torch.device], str | None] = _never_compare


def bitsandbytes_reason(device: torch.device, quant_type: str | Form = "nf4") -> str | None:
    """Return why bitsandbytes does not decode weights of the type on this device, or None.

    The first question about a GPU and a type imports bitsandbytes and compares its ops with this
    package's, unless a graph is captured or traced at that time.
    """
    if not isinstance(quant_type, str):
        return "bitsandbytes has no such format"
    if quant_type not in BITSANDBYTES_TYPES:
        return f"bitsandbytes has no {quant_type.upper()}"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not is_on_gpu_path(device.type):
        return "the CPU backend decodes"
    key = (device.type, device.index, quant_type)
    if key in bitsandbytes_reasons:
        return bitsandbytes_reasons[key]
    if _is_recorded(device):
        return UNCHECKED
    bitsandbytes_reasons[key] = UNCHECKED  # for what the comparison itself decodes
    try:
        # Another thread has none of the caller's autocast, modes, transforms and forced backend.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(compare_bitsandbytes, quant_type, device).result()
    except BaseException:
        del bitsandbytes_reasons[key]
        raise
    bitsandbytes_reasons[key] = found
    return found


def _is_recorded(device: torch.device) -> bool:
    """Return True if the comparison, which synchronizes, would be recorded or cannot run."""
    if torch.compiler.is_compiling():
        return True
    if device.type == "meta":  # nothing is compared; an import would slow down the first module
        return "bitsandbytes" not in sys.modules
    return workspace.is_capturing(device) or _get_current_dispatch_mode() is not None


def decoded_by(device: torch.device, weight: Codes, columns: int, dtype: torch.dtype) -> str:
    """Return a clause for `explain` that names the decoder of a weight [N, columns] on a GPU."""
    form, no_kernel = weight.form, kernel_reason(device, Decoding.of(weight, columns), dtype)
    text = f"PyTorch decodes in three kernels: {no_kernel}" if no_kernel else "our kernel decodes"
    if form in BITSANDBYTES_TYPES and (reason := bitsandbytes_reason(device, form)):
        text += f"; no GEMM of few rows decodes inside: {reason}"
    return text


def encode(
    weight: Tensor, thresholds: Tensor, order: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """`coding.quantize_4bit`, by a native kernel where there is one."""
    if weight.device.type != "cpu" or native.module is None or torch.compiler.is_compiling():
        return coding.quantize_4bit(weight, thresholds, order, blocksize)
    weight, n = weight.resolve_neg().contiguous(), weight.numel()  # read by address
    packed = weight.new_empty(-(-n // 2), dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    native.module.quantize(
        weight.data_ptr(), DTYPE_NUMBERS[weight.dtype], n, blocksize, thresholds.data_ptr(),
        order.data_ptr(), coding.SMALLEST_SCALE, packed.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
