"""The seam between the eager backend's CPU and GPU paths.

The paths ask these functions, not the device's name. `as_on_gpu` makes CPU tensors take the GPU
path, so that tests and `bench --host` run it without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

emulates_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Make CPU tensors take the GPU path, in all threads. For tests and `bench --host`.

    >>> with as_on_gpu():
    ...     is_on_gpu_path("cpu")
    True
    """
    global emulates_gpu
    before, emulates_gpu = emulates_gpu, True
    try:
        yield
    finally:
        emulates_gpu = before


def is_on_gpu_path(device_type: str) -> bool:
    """Return True if tensors on such a device take the eager backend's GPU path.

    Meta tensors stand for a GPU's.

    >>> is_on_gpu_path("cpu"), is_on_gpu_path("cuda"), is_on_gpu_path("meta")
    (False, True, True)
    """
    return device_type != "cpu" or emulates_gpu


def has_out_dtype(t: Tensor) -> bool:
    """True if `torch.mm(..., out_dtype=torch.float32)` multiplies 16-bit matrices on t's device."""
    if t.is_cuda:
        return torch.version.hip is None
    return t.is_meta or (emulates_gpu and t.is_cpu)


@functools.cache
def has_meta_out_dtype() -> bool:
    """False for torch 2.8, whose GEMM takes an out_dtype on CUDA and not on meta."""
    a = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    try:
        torch.mm(a, a, out_dtype=torch.float32)
    except (TypeError, NotImplementedError):
        return False
    return True


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32 for 16-bit a [M, K] and b [K, N], summed in float32.

    Where the device has no such GEMM, both operands are copied to float32.

    >>> mm_fp32(torch.ones(2, 3).bfloat16(), torch.ones(3, 2).bfloat16()).dtype
    torch.float32
    """
    if a.is_meta and not has_meta_out_dtype():
        return torch.mm(a, b).float()  # one kernel more than CUDA launches; only `bench` sees it
    if has_out_dtype(a) and not a.is_cpu:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
