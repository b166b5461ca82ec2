"""The Triton backend's choice of strategy."""

from __future__ import annotations

import functools

from ...core.problem import Choice, Problem, Strategy, require_supported
from ...device import DeviceInfo
from . import FUSED, TWO_PASS, configs, measured

REQUESTED = "the triton backend was requested"


def plan(problem: Problem, strategy: Strategy | None) -> Choice:
    """Choose the strategy; RuntimeError if the backend or the requested strategy cannot run."""
    target = require_target(problem)
    if strategy:
        if (why := unsupported_reason(problem, strategy)) is not None:
            raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: {why}")
        return Choice("triton", strategy, REQUESTED)
    return choose_tuned(problem, target) or _plan(problem, target)


def unsupported_reason(problem: Problem, strategy: str) -> str | None:
    """Return why the strategy cannot run the call and its backward, or None."""
    if strategy == FUSED and problem.rank > configs.MAX_FUSED_RANK:
        return f"rank {problem.rank} is above {configs.MAX_FUSED_RANK}"
    return None


def plan_experts(problem: Problem, requested: Strategy | None) -> Choice:
    """Choose for rows sorted by expert; RuntimeError if the kernels or the strategy cannot run."""
    require_target(problem)
    if requested not in (None, TWO_PASS):
        raise RuntimeError(
            f"strategy {requested!r} was requested and cannot run here: for rows sorted by expert "
            f"(lora_experts_linear) want {TWO_PASS!r}"
        )
    return Choice("triton", TWO_PASS, REQUESTED)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, target: DeviceInfo) -> Choice:
    M, N, R = problem.rows, problem.columns, problem.rank
    strategy, why = configs.strategy(
        target, M, N, R, problem.itemsize, problem.four_bit, problem.dropout
    )
    return Choice("triton", strategy, f"{REQUESTED}; {why}")


def choose_tuned(
    problem: Problem, target: DeviceInfo, reason: str | None = REQUESTED
) -> Choice | None:
    """Return the choice that `lora-kernels tune` has measured for such a call, or None.

    reason: why the backend was chosen; None if it was not, and must have been faster than eager.
    """
    if problem.dropout:
        return None
    rows, N, K = problem.rows, problem.columns, problem.inner
    dtypes = problem.dtype, problem.a_dtype
    key = measured.shape(target, rows, N, K, problem.rank, *dtypes, problem.four_bit)
    known = measured.find(key)
    if known is None or (reason is None and not known.beats_eager):
        return None
    why = f"{reason}; {known.source}" if reason else known.source
    return Choice("triton", known.strategy, why)


def require_target(problem: Problem) -> DeviceInfo:
    """Return the device that the kernels run on; RuntimeError if they cannot."""
    target = configs.target(problem.device_type, problem.device_index)
    reason = configs.unsupported_reason(target, problem.device_type)
    require_supported("triton", reason or problem.unsupported_reason())
    assert target is not None
    return target
