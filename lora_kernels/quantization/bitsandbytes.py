"""Weights of bitsandbytes, and a check of its kernels."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import bitsandbytes
import torch
from torch import Tensor

from ..backends.decoder import bitsandbytes_gemm
from .weight import QuantizedWeight, quantize_4bit


class _CachedWeight(NamedTuple):
    """A `QuantizedWeight`, and a key of the tensors that it views. It is not copied or pickled."""

    key: tuple[object, ...]
    weight: QuantizedWeight

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def cached_weight(packed: Tensor, state: Any) -> QuantizedWeight:
    """Return a tensor of bitsandbytes as a `QuantizedWeight`, cached until it or its state changes.

    state: `QuantState`, which keeps the result, unless DeepSpeed's ZeRO-3 frees the tensor after
    the call.
    """
    # Addresses cannot be traced; the graph holds the weight.
    if torch.compiler.is_compiling() or hasattr(packed, "ds_id"):
        return QuantizedWeight.from_bitsandbytes((packed, state))
    nested = getattr(state, "state2", None)
    tensors = [packed, state.absmax, state.code]
    tensors += [] if nested is None else [state.offset, nested.absmax, nested.code]
    key = (
        *(t.data_ptr() for t in tensors),
        state.absmax.dtype,
        state.blocksize,
        state.quant_type,
        None if nested is None else nested.blocksize,
    )
    known: _CachedWeight | None = getattr(state, "_lora_kernels", None)
    # FSDP2 frees the memory of codes, where those of another gathering may come to lie.
    if known is None or known.key != key or known.weight.codes.packed.data_ptr() != key[0]:
        with torch.inference_mode(False):  # inference tensors cannot be saved for a backward
            known = _CachedWeight(key, QuantizedWeight.from_bitsandbytes((packed, state)))
        state._lora_kernels = known
    return known.weight


def compare(quant_type: str, device: torch.device) -> str | None:
    """Compare bitsandbytes' `gemm_4bit` of a type on `device` with the product, and synchronize.

    Returns None if the results agree, or the reason why bitsandbytes is not used.

    >>> compare("nf4", torch.device("meta"))  # which has no values
    """
    version = f"bitsandbytes {bitsandbytes.__version__}"
    if not hasattr(getattr(torch.ops, "bitsandbytes", None), "gemm_4bit"):
        return f"{version} has no op gemm_4bit"
    if device.type == "meta":  # meta tensors have no values to compare
        return None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(64, 256, generator=generator, dtype=torch.float32)
    x = torch.randn(3, 256, generator=generator, dtype=torch.float32)
    is_cuda = device.type == "cuda"  # the current GPU of a thread is the first one
    try:
        with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
            for nested in (False, True):
                weight = quantize_4bit(sample, quant_type, 64, nested)
                if not _is_right(weight, x, device):
                    return f"{version}: gemm_4bit of {quant_type} differs from the reference"
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        return f"{version} raised {type(error).__name__}: {error}"
    return None


def _is_right(weight: QuantizedWeight, x: Tensor, device: torch.device) -> bool:
    codes = weight.to(device).codes
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = x.to(dtype)
        y = bitsandbytes_gemm(codes, rows.to(device), weight.shape[0], None).cpu().double()
        # On the CPU, since a GPU's float32 GEMM rounds its operands where TF32 is allowed.
        exact = rows.double() @ weight.dequantize(dtype).double().t()
        # The bound covers 16-bit operands, one rounding of y, and codes or scales in 16 bits.
        if not (y - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm():
            return False
    return True
