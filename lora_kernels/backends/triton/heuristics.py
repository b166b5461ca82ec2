"""Which strategy of the Triton backend a call takes."""

from __future__ import annotations

import functools

from ...core.problem import Choice, Problem, require_supported
from .. import triton
from . import SINGLE_PASS, SPLIT, TWO_STEPS, configs, measured

REQUESTED = "the triton backend was requested"


def plan(problem: Problem, strategy: str | None) -> Choice:
    """Choose the strategy; RuntimeError if the backend or the requested strategy cannot run."""
    target = require_target(problem)
    if strategy == SINGLE_PASS and problem.rank > configs.MAX_SINGLE_PASS_RANK:
        raise RuntimeError(
            f"strategy {strategy!r} was requested and cannot run here: rank {problem.rank} is "
            f"above {configs.MAX_SINGLE_PASS_RANK}"
        )
    if strategy:
        return Choice("triton", strategy, REQUESTED)
    return tuned(problem, target) or _plan(problem, target)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, target: configs.Target) -> Choice:
    strategy, why = configs.strategy(
        target, problem.rows, problem.columns, problem.rank, problem.itemsize, problem.four_bit,
        problem.dropout,
    )  # fmt: skip
    return _choice(problem, strategy, f"{REQUESTED}; {why}")


def _choice(problem: Problem, strategy: str, reason: str) -> Choice:
    """Return the choice, split if rows have adapters of their own and need P before the GEMM."""
    if problem.mixed and strategy not in TWO_STEPS:
        strategy = SPLIT
    return Choice("triton", strategy, reason)


def tuned(
    problem: Problem, target: configs.Target, reason: str | None = REQUESTED
) -> Choice | None:
    """Return the choice that `lora-kernels tune` has measured for such a call, or None."""
    rows, N, K = problem.rows, problem.columns, problem.inner
    if rows is None or N is None or K is None or problem.dropout:
        return None
    key = measured.shape(target, rows, N, K, problem.rank, problem.itemsize, problem.four_bit)
    known = measured.find(key)
    if known is None:
        return None
    why = f"{reason}; {known.source}" if reason else known.source
    return _choice(problem, known.strategy, why)


def require_target(problem: Problem) -> configs.Target:
    """Return the device that the kernels run on; RuntimeError if they cannot."""
    target = configs.target(problem.device_index) if problem.device_type == "cuda" else None
    if triton.interpreted():
        target = configs.INTERPRETER
    reason = configs.unfit(triton.absence(), target, problem.device_type)
    require_supported("triton", reason or problem.unsupported_reason())
    assert target is not None
    return target
