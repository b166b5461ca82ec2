"""bitsandbytes' `default` backend, the judge of our bits, called past its others.

Its functions are all named `_` and given straight to torch's dispatcher, where on a CPU its `cpu`
backend comes first. So its module is run once more, into a table of its own. The functions that
it would compile are left eager: they mean the same, and compiling takes a second a shape.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
from torch import Tensor


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    kernels: dict[str, Callable[..., Any]] = {}

    def record(name: str, backend: str) -> Callable[[Any], Any]:
        assert backend == "default"
        return lambda function: kernels.setdefault(name.partition("::")[2], function)

    spec = importlib.util.find_spec("bitsandbytes.backends.default.ops")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(bitsandbytes._ops, "register_kernel", record):
        spec.loader.exec_module(module)
    for name in ("_dequantize_4bit_compute", "_dequantize_blockwise_compute"):
        setattr(module, name, getattr(module, name).__wrapped__)
    return kernels


def quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _kernels()["quantize_blockwise"](values, code, blocksize)


def quantize(
    weight: Tensor,
    quant_type: str,
    blocksize: int,
    nested: bool,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`bitsandbytes.functional.quantize_4bit` with the default backend."""
    packed, absmax = _kernels()["quantize_4bit"](weight, blocksize, quant_type, quant_storage)
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=blocksize,
        code=get_4bit_type(quant_type, device=weight.device),
        quant_type=quant_type,
    )
    if nested:
        code = create_dynamic_map().to(weight.device)
        state.offset = absmax.mean()
        state.absmax, nested_absmax = quantize_blockwise(absmax - state.offset, code, 256)
        state.state2 = QuantState(nested_absmax, code=code, blocksize=256, dtype=torch.float32)
        state.nested = True
    return packed, state


def scales(state: QuantState) -> Tensor:
    if not state.nested:
        return state.absmax
    decode, nested = _kernels()["dequantize_blockwise"], state.state2
    return decode(state.absmax, nested.absmax, nested.code, 256, torch.float32) + state.offset


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    decode = _kernels()["dequantize_4bit"]
    return decode(packed, scales(state), state.blocksize, state.quant_type, state.shape, dtype)
