"""The CPU backend's choice of strategy."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from ...core.dtypes import DTYPE_NUMBERS
from ...core.problem import Choice, Problem, Strategy
from . import linear as cpu
from . import native

# When torch.mm runs a dense base GEMM in place of the fused kernel. In float32 on Intel, MKL is
# faster from M·N·K = MKL_GEMM on; with AMX the fused kernel (a 3×bf16 split) takes over again at
# AMX_FLOAT_ROWS rows. In bfloat16 with AMX, oneDNN is faster from M·N·K = AMX_GEMM on and above
# AMX_ROWS rows. Measured on 2 threads of Intel family 6, AMX on model 167 (benchmarks/NOTES.md). If
# oneDNN has AMX and this build's kernels do not, torch.mm runs every bfloat16 GEMM.
MKL_GEMM = 280_000_000
AMX_GEMM, AMX_ROWS = 10_000_000_000, 512
AMX_FLOAT_ROWS = 128  # MIN_SPLIT_ROWS in csrc/cpu/amx_impl.h
# The most rows of x for which the GEMV kernel reads the weight once: dense, and 4-bit codes decoded
# in registers or the L1 cache. Measured on AMD families 25 and 26, and with AMX on Intel family 6
# (benchmarks/NOTES.md). AVX-512 takes more rows of weights of LARGE elements in 4 bits. Beside AMX
# bfloat16 has its tiles; without vector instructions widening 16 bits costs more than multiplying.
FEW_ROWS = {"scalar": 4, "avx2": 32, "avx512": 16, "avx512bf16": 16, "amxbf16": 16}
FEW_ROWS_4BIT = {"scalar": 8, "avx2": 32, "avx512": 16, "avx512bf16": 16, "amxbf16": 11}
FEW_ROWS_BESIDE_AMX = 6
LARGE, FEW_ROWS_OF_LARGE = 1 << 24, 32
ALL_ROWS = sys.maxsize


class Rules(NamedTuple):
    """How the CPU's kernels divide the rows of x among strategies, for one dtype of the base GEMM.

    `choose` reads them, and so does csrc/direct.cpp, field by field.

    Args:
        few_rows, few_rows_4bit, few_rows_of_large: the most rows for the GEMV kernel, with a dense
            weight, with a 4-bit one, and with a 4-bit one of LARGE elements.
        library_rows, library_gemm, library_end: torch.mm runs a dense base GEMM of at least so many
            rows and multiply-adds, and of fewer rows than the last.
        has_fused: whether there is a fused kernel for the other rows.
    """

    few_rows: int
    few_rows_4bit: int
    few_rows_of_large: int
    library_rows: int
    library_gemm: int
    library_end: int
    has_fused: bool


def rules(dtype: torch.dtype, isa: str | None = None) -> Rules:
    """Return the rules for an instruction set; None for the one in use."""
    isa = native.isa if isa is None else isa
    if isa is None:
        return Rules(0, 0, 0, 0, 0, ALL_ROWS, False)
    is_amx, is_bf16 = isa == "amxbf16", dtype is torch.bfloat16
    few, few_4bit = FEW_ROWS[isa], FEW_ROWS_4BIT[isa]
    if isa == "scalar" and dtype is not torch.float32:
        few = 0
    if is_amx and is_bf16:
        few = few_4bit = FEW_ROWS_BESIDE_AMX
    large = FEW_ROWS_OF_LARGE if isa in ("avx512", "avx512bf16") else few_4bit
    library = ALL_ROWS, 0, ALL_ROWS
    if native.intel and dtype is torch.float32:
        library = 0, MKL_GEMM, AMX_FLOAT_ROWS if is_amx else ALL_ROWS
    elif is_amx and is_bf16:
        library = AMX_ROWS + 1, AMX_GEMM, ALL_ROWS
    lacks_amx = native.amx_bf16 and is_bf16 and not is_amx  # which oneDNN has
    return Rules(few, few_4bit, large, *library, isa in cpu.FUSED_ISAS and not lacks_amx)


def few_rows(
    dtype: torch.dtype, four_bit: bool, size: int, columns: bool = False, isa: str | None = None
) -> int:
    """Return the most rows of x for the GEMV kernel; 0 without native kernels.

    Args:
        dtype: of the base GEMM.
        four_bit: whether the weight is packed.
        size: elements of the weight.
        columns: whether the weight is stored as [K, N]. torch.mm then runs the GEMV, for one row.
        isa: None for the instruction set in use.

    Raises KeyError for an instruction set that the tables lack.
    """
    found = rules(dtype, isa)
    if columns:
        return 1
    if not four_bit:
        return found.few_rows
    return found.few_rows_of_large if size >= LARGE else found.few_rows_4bit


def library_rows(dtype: torch.dtype, size: int) -> range:
    """Return the numbers of rows for which torch.mm runs a dense base GEMM.

    size: elements of the weight.
    """
    found = rules(dtype)
    return range(max(found.library_rows, -(-found.library_gemm // size)), found.library_end)


def set_rules() -> None:
    """Give csrc/direct.cpp the rules for the instruction set in use."""
    if native.module is not None:
        native.module.set_rules(*(tuple(rules(dtype)) for dtype in DTYPE_NUMBERS), LARGE)


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the CPU backend cannot run the call, or None."""
    if problem.device_type != "cpu":
        return f"no kernels for device type {problem.device_type!r} in this version"
    return native.reason or problem.unsupported_reason("cpu")


def choose(problem: Problem, requested: Strategy | None, reason: str | None = None) -> Choice:
    """Choose the strategy of a supported call; RuntimeError if another is requested.

    reason: why the CPU backend runs; None names its kernels.
    """
    isa, dtype, four_bit = native.isa, problem.dtype, problem.four_bit
    size = problem.columns * problem.inner
    columns = problem.layout is not None and problem.layout.columns
    few = few_rows(dtype, four_bit, size, columns)
    reason = reason or f"native kernels, {isa}"
    gemv = cpu.GEMV_4BIT if four_bit else cpu.LIBRARY if columns else cpu.GEMV
    if requested:
        _check_strategy(requested, gemv, few, problem.rows)
        return Choice("cpu", requested, reason)
    if problem.rows <= few:
        return Choice("cpu", gemv, reason)
    if isa == "amxbf16" and dtype is torch.float32:
        reason += f"; float32 as three bfloat16 from {AMX_FLOAT_ROWS} rows on"
    if not rules(dtype).has_fused:
        has_amx = "; the library multiplies with AMX" * (isa in cpu.FUSED_ISAS)
        return Choice("cpu", cpu.LIBRARY, reason + has_amx)
    if not four_bit and problem.rows in library_rows(dtype, size):
        name = str(dtype).removeprefix("torch.")
        reason += f"; large {name} base GEMMs run in MKL or oneDNN"
        return Choice("cpu", cpu.LIBRARY, reason)
    return Choice("cpu", cpu.FUSED, reason)


def choose_experts(requested: Strategy | None) -> Strategy:
    """Return the strategy of rows sorted by expert; RuntimeError if it cannot be as requested."""
    if requested in cpu.GEMVS:
        raise RuntimeError(
            f"strategy {requested!r} was requested and cannot run here: for rows sorted by expert "
            f"(lora_experts_linear) want {cpu.FUSED!r} or {cpu.LIBRARY!r}"
        )
    if requested:
        _check_strategy(requested, cpu.LIBRARY, 0, 0)
        return requested
    return cpu.FUSED if native.isa in cpu.FUSED_ISAS else cpu.LIBRARY


def _check_strategy(strategy: Strategy, gemv: Strategy, few: int, rows: int) -> None:
    want = None
    if strategy == cpu.FUSED and native.isa not in cpu.FUSED_ISAS:
        isas = ", ".join(cpu.FUSED_ISAS)
        want = f"one of {isas} as the instruction set, which is {native.isa}"
    elif strategy in cpu.GEMVS and strategy != gemv:
        four_bit = strategy == cpu.GEMV_4BIT
        want = "a 4-bit weight" if four_bit else "a dense weight whose rows are contiguous"
    elif strategy in cpu.GEMVS and rows > few:
        want = f"at most {few} rows"
    if want is not None:
        raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: want {want}")


native.on_use_isa = set_rules
set_rules()
