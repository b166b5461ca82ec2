"""The CUDA backend's choice of strategy."""

from __future__ import annotations

import functools

from ...core.problem import Choice, Layout, Problem, Strategy, require_supported
from .. import cuda
from . import COOPERATIVE, TWO_PASS, constraints

REQUESTED = "the cuda backend was requested"
_DENSE, _CODES = Layout(), Layout(64)  # the defaults of a problem without a layout


def choose(problem: Problem, strategy: Strategy | None) -> Choice:
    """Choose the strategy; RuntimeError if the backend or the requested strategy cannot run."""
    reason = cuda.unsupported_device_reason(problem.device_type, problem.device_index)
    require_supported("cuda", problem.unsupported_reason("cuda") or reason)
    return _choose(problem, strategy)


@functools.lru_cache(maxsize=1024)
def _choose(problem: Problem, strategy: Strategy | None) -> Choice:
    if strategy:
        why = unsupported_reason(problem, strategy)
        if why is not None:
            raise RuntimeError(f"strategy {strategy!r} was requested and cannot run here: {why}")
        return Choice("cuda", strategy, REQUESTED)
    require_supported("cuda", unsupported_reason(problem, TWO_PASS))
    why = unsupported_reason(problem, COOPERATIVE)
    if why is None:
        return Choice("cuda", COOPERATIVE, REQUESTED)
    if problem.rows > cuda.DECODE_ROWS:
        return Choice("cuda", TWO_PASS, REQUESTED)
    return Choice("cuda", TWO_PASS, f"{REQUESTED}; not {COOPERATIVE!r}: {why}")


def unsupported_reason(problem: Problem, strategy: str) -> str | None:
    """Return why the strategy cannot run the call and its backward, or None."""
    layout = problem.layout or (_CODES if problem.is_quantized else _DENSE)
    sizes = problem.rows, problem.columns, problem.inner
    return constraints.unsupported_reason(strategy, problem.dtype, layout, *sizes)
