"""Drivers that launch nothing: CPU tensors run a GPU's host code down to the launch.

`bench --host` times that code. Triton's kernels are compiled for an H100, which takes no GPU, and
launched by plans as on one. bitsandbytes' ops allocate their results and call a C function with the
arguments that its CUDA backend gives to a kernel. Neither writes a result.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import checked, decoder, launches, triton, workspace

STREAM = 7  # of all launches
GEMV_ROWS = 4  # up to which bitsandbytes decodes inside its GEMM on all GPUs
_TARGET = "cuda", 90, 32  # an H100
# Takes a launch's name and arguments. Kernels outlive the driver that they were compiled for.
_take: list[Callable[[str, tuple[Any, ...]], None]] = []


class _Launcher:
    """What Triton's driver makes of a compiled kernel, to launch it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *args: Any) -> None:
        _take[0](self.name, args)


@contextlib.contextmanager
def stub_triton(take: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Plan calls on CPU tensors as an H100's, and give each launch of a Triton kernel to `take`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from ..backends.triton import configs

    _take[:] = [take]
    stub = SimpleNamespace(
        launcher_cls=_Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *args: (1, 2, 64, 0, 1024),  # module, function, registers, spills
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": configs.H100.shared_memory},
        ),
        get_current_device=lambda: -1,
        get_current_stream=lambda device: STREAM,
        get_current_target=lambda: GPUTarget(*_TARGET),
    )
    active = "_active" if hasattr(driver, "_active") else "active"
    with (
        stub_launches(),
        mock.patch.object(driver, active, stub),
        mock.patch.object(configs, "target", lambda *device: configs.H100),
    ):
        yield


@contextlib.contextmanager
def stub_launches() -> Iterator[None]:
    """Plan calls on CPU tensors, whose device has the index -1, as a GPU's."""
    flags = torch.zeros(2, dtype=torch.int32)
    launches.forget()
    with (
        mock.patch.object(launches, "is_on_gpu", lambda t: True),
        mock.patch.object(launches, "is_current_device", lambda index: index == -1),
        mock.patch.object(launches, "current_stream", lambda index: {-1: STREAM}[index]),
        mock.patch.object(workspace, "flags", lambda device: flags),
    ):
        yield
    launches.forget()


def _c_function(count: int) -> Callable[..., Any]:
    """Return a function of C that takes `count` addresses and ignores them."""
    function = ctypes.CDLL(None)["getppid"]
    function.argtypes = [ctypes.c_void_p] * count
    return function


@contextlib.contextmanager
def stub_bitsandbytes(take: Callable[[str], None]) -> Iterator[None]:
    """Let bitsandbytes' ops on CPU tensors do what they do on a host with a GPU; `take` each
    launch."""
    of_scales, of_codes, of_gemm = _c_function(7), _c_function(7), _c_function(14)

    def decode_scales(
        A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty_like(A, dtype=dtype)
        pointers = code.data_ptr(), A.data_ptr(), absmax.data_ptr(), out.data_ptr()
        of_scales(*pointers, blocksize, A.numel(), STREAM)
        take("dequantize_blockwise")
        return out

    def decode(
        A: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        out, A = torch.empty(shape, dtype=dtype), A.contiguous()
        pointers = A.data_ptr(), absmax.data_ptr(), out.data_ptr()
        of_codes(None, *pointers, blocksize, out.numel(), STREAM)
        take("dequantize_4bit")
        return out

    def gemm(
        A: Tensor,
        B: Tensor,
        shape: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        K = A.shape[-1]
        M = A.numel() // K
        if M > GEMV_ROWS or K % blocksize:
            if absmax_8bit is not None and absmax_code is not None and absmax_offset is not None:
                absmax = decode_scales(absmax_8bit, absmax, absmax_code, 256, torch.float32)
                absmax = absmax + absmax_offset
            return F.linear(A, decode(B, absmax, blocksize, quant_type, shape, A.dtype), bias)
        A, out = A.contiguous(), A.new_empty(*A.shape[:-1], shape[0])
        scales = (absmax, absmax_8bit, absmax_code, absmax_offset)
        pointers = [None if t is None else t.data_ptr() for t in (A, B, *scales, out, bias)]
        of_gemm(*pointers, M, shape[0], K, blocksize, 2, STREAM)
        take("gemm_4bit")
        return out

    ops = torch.library.Library("bitsandbytes", "IMPL")
    for name, kernel in (
        ("dequantize_blockwise", decode_scales),
        ("dequantize_4bit", decode),
        ("gemm_4bit", gemm),
    ):
        ops.impl(name, kernel, "CPU", allow_override=True)
    passed = {("cpu", None, quant_type): None for quant_type in ("nf4", "fp4")}
    try:
        with mock.patch.dict(decoder.bitsandbytes_reasons, passed):
            yield
    finally:
        ops._destroy()


@contextlib.contextmanager
def stub_drivers() -> Iterator[Counter[str]]:
    """Stub both drivers on the emulated GPU path, and yield the launches by their kernels' names.

    Triton's kernels count as checked. Some rows of x stand for the thousands of a training step,
    for which our layers decode whole weights and do not ask for bitsandbytes' GEMM.
    """
    launched: Counter[str] = Counter()

    def take(name: str, args: object = None) -> None:
        launched[name] += 1

    with contextlib.ExitStack() as stack:
        stack.enter_context(stub_triton(take))
        stack.enter_context(mock.patch.object(checked, "kernel_reason", lambda *args: None))
        stack.enter_context(mock.patch.object(decoder, "FUSED_ROWS", GEMV_ROWS))
        if find_spec("bitsandbytes") is not None:
            stack.enter_context(stub_bitsandbytes(take))
        # A result that nothing wrote may hold subnormal numbers, with which a CPU is slow.
        stack.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)
        yield launched


def unavailable_reason() -> str | None:
    """Return why `stub_drivers` cannot be used; None if it can."""
    if triton.is_interpreted():
        return "Triton interprets its kernels"
    return triton.unavailable_reason()
