"""Load the compiled extension. If it is missing, `reason` is set and nothing is raised.

The environment variable LORA_KERNELS_CPU_ISA, one of ISAS, caps the instruction set.
"""

from __future__ import annotations

import ctypes
import os
from types import ModuleType

import torch

from ...version import __version__
from .. import import_extension

ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "amxbf16")

module: ModuleType | None = None
reason: str | None = None  # why the extension is missing, or None
isa: str | None = None  # the instruction set in use
amx_bf16 = False  # whether oneDNN's bfloat16 GEMMs run on AMX tiles
intel = False  # whether the processor is Intel's, for which MKL is optimized
threaded = False  # whether the kernels run on PyTorch's threads, or on the caller's alone
exchange = False  # whether PyTorch has a DLPack exchange table, which gives a tensor's address


def _load() -> None:
    global module, reason, isa, amx_bf16, intel, threaded, exchange
    try:
        extension = import_extension("_native")
    except ImportError:
        reason = "the native CPU kernels were not built"
        return
    if extension.__version__ != __version__:
        reason = f"the native kernels are of version {extension.__version__}, not {__version__}"
        return
    cap = os.environ.get("LORA_KERNELS_CPU_ISA", "")
    if cap and cap not in ISAS:
        raise ValueError(f"LORA_KERNELS_CPU_ISA: got {cap!r}, want one of {', '.join(ISAS)}")
    module = extension
    isa = extension.use_isa(cap or ISAS[-1])
    amx_bf16, intel = bool(extension.amx_bf16), bool(extension.intel)
    addresses = _openmp()
    if addresses is not None:
        extension.use_openmp(*addresses)
    threaded = addresses is not None
    exchange = extension.use_exchange(torch.Tensor)


def _openmp() -> list[int] | None:
    """Return the addresses that `use_openmp` takes, in the OpenMP runtime that torch has loaded.

    They are looked up in libtorch_cpu and its dependencies, whatever file name these have. None if
    there is no such runtime.
    """
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    try:
        torch_cpu = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        functions = [getattr(torch_cpu, name) for name in names]
    except (OSError, AttributeError):
        return None
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


def use_isa(name: str) -> str:
    """Cap the instruction set, for tests, and return the instruction set in use."""
    global isa
    if module is None:
        raise RuntimeError(f"no native kernels: {reason}")
    if name not in ISAS:
        raise ValueError(f"isa: got {name!r}, want one of {', '.join(ISAS)}")
    isa = module.use_isa(name)
    return isa


_load()
