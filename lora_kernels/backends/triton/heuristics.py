"""What the Triton backend runs, and with which strategy."""

from __future__ import annotations

from ...core.problem import Choice, Problem, Strategy, require_supported
from . import FUSED, configs

REQUESTED = "the triton backend was requested"


def choose(problem: Problem, strategy: Strategy | None) -> Choice:
    """Return the only strategy; RuntimeError if the backend cannot run the call."""
    target = configs.target(problem.device_type, problem.device_index)
    reason = configs.unsupported_reason(target, problem.device_type)
    reason = problem.unsupported_reason("triton") or reason
    require_supported("triton", reason or unsupported_reason(problem, FUSED))
    return Choice("triton", FUSED, REQUESTED)


def unsupported_reason(problem: Problem, strategy: str) -> str | None:
    """Return why the strategy cannot run the call and its backward, or None."""
    if problem.rank > configs.MAX_RANK:
        return f"rank {problem.rank} is above {configs.MAX_RANK}"
    return None
