"""The CUDA backend's choice of strategy."""

from __future__ import annotations

import functools

import torch

from ...core.problem import Choice, Layout, Problem, Strategy, require_supported
from .. import cuda
from . import COOPERATIVE, DECODE_ROWS, TWO_PASS, TWO_PASS_SIMT, constraints

REQUESTED = "the cuda backend was requested"
_DENSE, _CODES = Layout(), Layout(64)  # the defaults of a problem without a layout


def layout_of(problem: Problem) -> Layout:
    """Return the weight's layout, or a default if the problem has none."""
    return problem.layout or (_CODES if problem.four_bit else _DENSE)


def plan(problem: Problem, strategy: Strategy | None) -> Choice:
    """Choose the strategy; RuntimeError if the backend or the requested strategy cannot run."""
    require(problem)
    return _plan(problem, strategy)


def require(problem: Problem) -> None:
    """Raise RuntimeError if the kernels cannot run the call."""
    reason = cuda.unsupported_device_reason(problem.device_type, problem.device_index)
    require_supported("cuda", reason or problem.unsupported_reason())


@functools.lru_cache(maxsize=1024)
def _plan(problem: Problem, strategy: Strategy | None) -> Choice:
    layout, dtype, rows = layout_of(problem), problem.dtype, problem.rows
    N, K = problem.columns, problem.inner
    if strategy and layout.unsupported_reason != constraints.NO_BASE:
        why = (
            None
            if rows == 0
            else constraints.forward_unsupported_reason(strategy, dtype, layout, rows, N, K)
        )
        if why is not None:
            raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: {why}")
        return Choice("cuda", strategy, REQUESTED + dx_note(strategy, dtype, layout, N, K))
    return Choice("cuda", *strategy_for(dtype, rows, N, K, layout, REQUESTED))


def strategy_for(
    dtype: torch.dtype, M: int, N: int, K: int, layout: Layout, reason: str
) -> tuple[Strategy, str]:
    """Return the fastest strategy that supports the GEMM, and why faster ones do not."""
    wanted = [COOPERATIVE] * (M <= DECODE_ROWS) + [TWO_PASS]
    for strategy in wanted:
        why = constraints.forward_unsupported_reason(strategy, dtype, layout, M, N, K)
        if why is None:
            return strategy, reason + dx_note(strategy, dtype, layout, N, K)
        if why not in reason:
            reason = f"{reason}; not {strategy!r}: {why}"
    return TWO_PASS_SIMT, reason


def unsupported_reason(problem: Problem, strategy: str) -> str | None:
    """Return why the strategy cannot run the call and its backward, or None."""
    layout, dtype, N, K = layout_of(problem), problem.dtype, problem.columns, problem.inner
    return constraints.forward_unsupported_reason(
        strategy, dtype, layout, problem.rows, N, K
    ) or constraints.backward_unsupported_reason(dtype, layout, N, K)


def dx_note(strategy: Strategy, dtype: torch.dtype, layout: Layout, N: int, K: int) -> str:
    """Return a clause on dx if it is not computed as y is, or an empty string."""
    why = (
        None
        if strategy == TWO_PASS_SIMT
        else constraints.backward_unsupported_reason(dtype, layout, N, K)
    )
    return "" if why is None else f"; dx on CUDA cores: {why}"
