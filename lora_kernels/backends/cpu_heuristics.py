"""Which strategy of the CPU backend a call takes."""

from __future__ import annotations

import functools
import sys

import torch

from ..core.problem import Choice, Problem
from . import cpu, native
from .forced import Forced

# When torch.mm runs a dense base GEMM in place of the fused kernel. In float32 on Intel, MKL is
# faster from M·N·K = MKL_GEMM on; with AMX the fused kernel (a 3×bf16 split) takes over again at
# AMX_FLOAT_ROWS rows. In bfloat16 with AMX, oneDNN is faster from M·N·K = AMX_GEMM on and above
# AMX_ROWS rows. Measured on 2 threads of Intel family 6, AMX on model 167 (benchmarks/NOTES.md). If
# oneDNN has AMX and this build's kernels do not, torch.mm runs every bfloat16 GEMM.
MKL_GEMM = 280_000_000
AMX_GEMM, AMX_ROWS = 10_000_000_000, 512
AMX_FLOAT_ROWS = 128  # FLOAT_ROWS in csrc/cpu/amx_impl.h
_ALL = range(sys.maxsize)
_UNKNOWN = 4096  # N or K if they are not given
# The most rows of x for which the GEMV kernel reads the weight once: dense, and 4-bit codes decoded
# in registers or the L1 cache. Measured on AMD families 25 and 26, and with AMX on Intel family 6
# (benchmarks/NOTES.md). AVX-512 takes more rows of weights of LARGE elements in 4 bits. Beside AMX
# bfloat16 has its tiles; without vector instructions widening 16 bits costs more than multiplying.
FEW_ROWS = {"scalar": 4, "avx2": 16, "avx512": 16, "avx512bf16": 16, "amxbf16": 16}
FEW_ROWS_4BIT = {"scalar": 8, "avx2": 32, "avx512": 16, "avx512bf16": 16, "amxbf16": 11}
FEW_ROWS_BESIDE_AMX = 6
LARGE, FEW_ROWS_OF_LARGE = 1 << 24, 32


def few_rows(
    dtype: torch.dtype, four_bit: bool, size: int, columns: bool = False, isa: str | None = None
) -> int:
    """Return the most rows of x for the GEMV kernel; 0 for an unknown instruction set.

    Args:
        dtype: of the base GEMM.
        four_bit: whether the weight is packed.
        size: elements of the weight.
        columns: whether the weight is stored as [K, N]. torch.mm then runs the GEMV, for one row.
        isa: None for the instruction set in use.
    """
    isa = native.isa or "" if isa is None else isa
    if columns:
        return 1
    if isa == "amxbf16" and dtype is torch.bfloat16:
        return FEW_ROWS_BESIDE_AMX
    if four_bit and isa in ("avx512", "avx512bf16") and size >= LARGE:
        return FEW_ROWS_OF_LARGE
    if four_bit:
        return FEW_ROWS_4BIT.get(isa, 0)
    return 0 if isa == "scalar" and dtype is not torch.float32 else FEW_ROWS.get(isa, 0)


def library_rows(dtype: torch.dtype, size: int) -> range:
    """Return the numbers of rows for which torch.mm runs a dense base GEMM.

    size: elements of the weight.
    """
    amx = native.isa == "amxbf16"
    if native.intel and dtype is torch.float32:
        return range(-(-MKL_GEMM // size), AMX_FLOAT_ROWS if amx else _ALL.stop)
    if amx and dtype is torch.bfloat16:
        return range(max(AMX_ROWS + 1, -(-AMX_GEMM // size)), _ALL.stop)
    return range(0)


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the CPU backend cannot run the call, or None."""
    if problem.device_type != "cpu":
        return f"no kernels for device type {problem.device_type!r} in this version"
    return native.reason or problem.unsupported_reason()


def plan(problem: Problem, requested: Forced) -> Choice:
    """Choose the strategy of a supported call; RuntimeError if another is requested."""
    size = (problem.columns or _UNKNOWN) * (problem.inner or _UNKNOWN)
    columns = problem.layout is not None and problem.layout.columns
    few = few_rows(problem.dtype, problem.four_bit, size, columns)
    many = None if problem.rows is None else problem.rows > few
    large = range(0) if problem.four_bit else library_rows(problem.dtype, size)
    if problem.rows is not None:  # so that the cache holds one entry for all rows
        large = _ALL if many and problem.rows in large else range(0)
    environment = native.isa, native.amx_bf16, large
    return _plan(requested, environment, problem.dtype, many, few, problem.four_bit, columns)


@functools.lru_cache(maxsize=1024)
def _plan(
    requested: Forced,
    environment: tuple[str | None, bool, range],
    dtype: torch.dtype,
    many_rows: bool | None,
    few: int,
    four_bit: bool,
    columns: bool,
) -> Choice:
    isa, amx_bf16, large = environment
    reason = f"native kernels, {isa}"
    if requested.backend:
        reason = "the cpu backend was requested"
    gemv = cpu.FEW_ROWS if four_bit else cpu.LIBRARY if columns else cpu.STREAMED
    if requested.strategy:
        _check_strategy(requested.strategy, isa, gemv, few, bool(many_rows))
        return Choice("cpu", requested.strategy, reason)
    if many_rows is False:
        return Choice("cpu", gemv, reason)
    many = cpu.SINGLE_PASS
    if isa == "amxbf16" and dtype is torch.float32:
        reason += f"; float32 as three bfloat16 from {AMX_FLOAT_ROWS} rows on"
    if isa not in cpu.SINGLE_PASS_ISAS:
        many, large = cpu.LIBRARY, range(0)
    elif amx_bf16 and dtype is torch.bfloat16 and isa != "amxbf16":
        many, reason = cpu.LIBRARY, f"{reason}; the library multiplies with AMX"
    elif large:
        reason += f"; large {str(dtype).removeprefix('torch.')} base GEMMs run in MKL or oneDNN"
    return Choice("cpu", _of_any_rows(many, gemv, 0 if many_rows else few, large), reason)


def _of_any_rows(many: str, gemv: str, few: int, large: range) -> str:
    """Name the strategy for each number of rows; torch.mm runs the base GEMM for those in `large`.

    >>> _of_any_rows("single pass", "streamed", 16, range(300, 400))
    'single pass; under 17 rows streamed; from 300 to 399 library product + rank update'
    """
    if few and gemv == many:
        few = 0
    start, ends = max(large.start, few + 1), large.stop < _ALL.stop
    if large and start == few + 1 and not ends:
        many, large = cpu.LIBRARY, range(0)
    parts = [many]
    if few and gemv != many:
        parts.append(f"under {few + 1} rows {gemv}")
    if large:
        parts.append(f"from {start} {f'to {large.stop - 1}' if ends else 'on'} {cpu.LIBRARY}")
    return "; ".join(parts)


def _check_strategy(strategy: str, isa: str | None, gemv: str, few: int, many_rows: bool) -> None:
    want = None
    if strategy == cpu.SINGLE_PASS and isa not in cpu.SINGLE_PASS_ISAS:
        want = f"one of {', '.join(cpu.SINGLE_PASS_ISAS)} as the instruction set, which is {isa}"
    elif strategy in cpu.OF_FEW_ROWS and strategy != gemv:
        four_bit = strategy == cpu.FEW_ROWS
        want = "a 4-bit weight" if four_bit else "a dense weight whose rows are contiguous"
    elif strategy in cpu.OF_FEW_ROWS and many_rows:
        want = f"at most {few} rows"
    if want is not None:
        raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: want {want}")
