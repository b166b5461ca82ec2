"""The CPU backend's choice of strategy: the extension's rule (csrc/cpu/rules.h), and its words."""

from __future__ import annotations

import torch

from ...core.dtypes import DTYPE_NUMBERS
from ...core.problem import Choice, Problem, Strategy
from . import linear as cpu
from . import native


def _ask_rule(
    isa: str | None, dtype: torch.dtype, is_quantized: bool, columns: bool, M: int, N: int, K: int
) -> tuple[Strategy, int]:
    """Return a call's strategy, and the most rows for the GEMV kernel."""
    assert native.module is not None
    processor = native.ISAS.index(isa or str(native.isa)), native.amx_bf16, native.intel
    call = DTYPE_NUMBERS[dtype], is_quantized, columns, M, N, K
    number, few = native.module.strategy(*processor, *call)
    return cpu.STRATEGIES[number], few


def few_rows(
    dtype: torch.dtype, is_quantized: bool, size: int, columns: bool = False, isa: str | None = None
) -> int:
    """Return the most rows of x for the GEMV kernel; 0 without native kernels.

    Args:
        dtype: of the base GEMM.
        is_quantized: whether the weight is packed.
        size: elements of the weight.
        columns: whether the weight is stored as [K, N]. torch.mm then runs the GEMV, for one row.
        isa: None for the instruction set in use.

    Raises ValueError for an instruction set that is not in `native.ISAS`.
    """
    if isa is not None and isa not in native.ISAS:
        raise ValueError(f"isa: got {isa!r}, want {', '.join(native.ISAS)}")
    if native.module is None:
        return 0
    return _ask_rule(isa, dtype, is_quantized, columns, 0, size, 1)[1]


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the CPU backend cannot run the call, or None."""
    if problem.device_type != "cpu":
        return f"no kernels for device type {problem.device_type!r} in this version"
    return native.reason or problem.unsupported_reason("cpu")


def choose(problem: Problem, requested: Strategy | None, reason: str | None = None) -> Choice:
    """Choose the strategy of a supported call; RuntimeError if another is requested.

    reason: why the CPU backend runs; None names its kernels.
    """
    assert native.module is not None
    isa, dtype, is_quantized = native.isa, problem.dtype, problem.is_quantized
    columns = problem.layout is not None and problem.layout.columns
    sizes = problem.rows, problem.columns, problem.inner
    strategy, few = _ask_rule(isa, dtype, is_quantized, columns, *sizes)
    reason = reason or f"native kernels, {isa}"
    if requested:
        gemv = cpu.GEMV_QUANTIZED if is_quantized else cpu.LIBRARY if columns else cpu.GEMV
        _check_strategy(requested, gemv, few, problem.rows)
        return Choice("cpu", requested, reason)
    if problem.rows <= few:
        return Choice("cpu", strategy, reason)
    if isa == "amxbf16" and dtype is torch.float32:
        reason += f"; float32 as three bfloat16 from {native.module.MIN_SPLIT_ROWS} rows on"
    if strategy == cpu.LIBRARY and isa in cpu.FUSED_ISAS:
        if native.amx_bf16 and dtype is torch.bfloat16 and isa != "amxbf16":
            reason += "; the library multiplies with AMX"
        else:
            name = str(dtype).removeprefix("torch.")
            reason += f"; large {name} base GEMMs run in MKL or oneDNN"
    return Choice("cpu", strategy, reason)


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
        is_quantized = strategy == cpu.GEMV_QUANTIZED
        want = "a quantized weight" if is_quantized else "a dense weight whose rows are contiguous"
    elif strategy in cpu.GEMVS and rows > few:
        want = f"at most {few} rows"
    if want is not None:
        raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: want {want}")
