"""The Triton backend's choice of strategy."""

from __future__ import annotations

import functools

from ...core.device import DeviceInfo
from ...core.problem import Choice, Problem, Strategy, require_supported
from . import FUSED, configs

REQUESTED = "the triton backend was requested"


def plan(problem: Problem, strategy: Strategy | None) -> Choice:
    """Choose the strategy; RuntimeError if the backend or the requested strategy cannot run."""
    target = configs.target(problem.device_type, problem.device_index)
    reason = configs.unsupported_reason(target, problem.device_type)
    require_supported("triton", problem.unsupported_reason("triton") or reason)
    assert target is not None
    if strategy:
        if (why := unsupported_reason(problem, strategy)) is not None:
            raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: {why}")
        return Choice("triton", strategy, REQUESTED)
    return _plan(problem, target)


def unsupported_reason(problem: Problem, strategy: str) -> str | None:
    """Return why the strategy cannot run the call and its backward, or None."""
    if strategy == FUSED and problem.rank > configs.MAX_FUSED_RANK:
        return f"rank {problem.rank} is above {configs.MAX_FUSED_RANK}"
    return None


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, target: DeviceInfo) -> Choice:
    M, N, R = problem.rows, problem.columns, problem.rank
    strategy, why = configs.strategy(target, M, N, R, problem.itemsize, problem.four_bit)
    return Choice("triton", strategy, f"{REQUESTED}; {why}")
