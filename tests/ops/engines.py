"""Run a test once for each of `case.ENGINES`.

Placed above a test's other parametrizations the engine varies fastest, so that a case's reference
is computed once for all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import heuristics as cpu_heuristics
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import case
from lora_kernels.oracle.case import AnyCase
from tests.support.engines import take_turns

_here = case.engines()
ABSENT = pytest.mark.skip(reason="this machine or build lacks the instruction set")


def _engines(*names: str) -> pytest.MarkDecorator:
    params = [pytest.param(name, marks=() if name in _here else ABSENT) for name in names]
    return pytest.mark.parametrize("engine", params, indirect=True)


def engines_in_turn(these: Sequence[AnyCase], apart: str = "") -> pytest.MarkDecorator:
    """Parametrize a test with `case` and `engine`; the arguments are those of `take_turns`."""
    here = [
        pytest.param(each, name, marks=[pytest.mark.proof] if left else [], id=f"{each}-{name}")
        for each, name, left in take_turns(these, _here, apart)
    ]
    absent = [
        pytest.param(each, name, marks=ABSENT, id=f"{each}-{name}")
        for each in these
        for name in case.ENGINES
        if name not in _here
    ]
    return pytest.mark.parametrize(("case", "engine"), here + absent, indirect=["engine"])


every_engine = _engines(*case.ENGINES)
every_native_engine = _engines(*case.ENGINES[len(case.EAGERS) :])
every_tiled_engine = _engines("amxbf16", "amxbf16 fused")
every_thread_count = pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)


def ways(
    engine: str, rows: int, dtype: torch.dtype, is_quantized: bool
) -> list[AbstractContextManager[None]]:
    """Return the contexts of an engine, and the GEMV kernel's for few rows: an instruction set by
    itself forces the library GEMM."""
    if engine in native.ISAS and rows <= cpu_heuristics.few_rows(
        dtype, is_quantized, 0, isa=engine
    ):
        strategy = cpu.GEMV_QUANTIZED if is_quantized else cpu.GEMV
        return [nullcontext(), lora_kernels.backend("cpu", strategy)]
    return [nullcontext()]
