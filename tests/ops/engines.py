"""Run a test once for each of `case.ENGINES`.

Placed above a test's other parametrizations the engine varies fastest, so that a case's reference
is computed once for all of them.
"""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import case

_here = case.engines()


def _engines(*names: str) -> pytest.MarkDecorator:
    absent = pytest.mark.skip(reason="this machine or build lacks the instruction set")
    params = [pytest.param(name, marks=() if name in _here else absent) for name in names]
    return pytest.mark.parametrize("engine", params, indirect=True)


every_engine = _engines(*case.ENGINES)
every_native_engine = _engines(*case.ENGINES[len(case.EAGERS) :])
every_tiled_engine = _engines("amxbf16", "amxbf16 fused")
every_thread_count = pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)


def ways(
    engine: str, rows: int, dtype: torch.dtype, four_bit: bool
) -> list[AbstractContextManager[None]]:
    """Return the contexts of an engine, and the GEMV kernel's for few rows: an instruction set by
    itself forces the library GEMM."""
    if engine in native.ISAS and rows <= cpu_heuristics.few_rows(dtype, four_bit, 0, isa=engine):
        strategy = cpu.GEMV_4BIT if four_bit else cpu.GEMV
        return [nullcontext(), lora_kernels.backend("cpu", strategy)]
    return [nullcontext()]
