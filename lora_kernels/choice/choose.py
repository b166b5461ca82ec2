"""The choice of an op's backend, with its reason.

A choice depends on shapes, dtypes, the device, the forced backend, verdicts, and whether a CUDA
graph captures the call. It never depends on whether gradients are enabled, and no exception revises
it. A forced backend that cannot run the call raises RuntimeError with the reason.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ..backends import cuda, triton, workspace
from ..backends.cpu import heuristics as cpu_heuristics
from ..backends.cpu import linear as cpu
from ..backends.cpu import native
from ..backends.cuda import constraints
from ..backends.library import is_on_gpu_path
from ..core import device, forced
from ..core.codes import Codes
from ..core.device import DeviceInfo
from ..core.forced import Forced
from ..core.problem import (
    ONE_ADAPTER,
    Choice,
    Layout,
    Problem,
    Strategy,
    require_supported,
)
from . import verdicts
from .verdicts import KEEP_EAGER, MAX_RANK, Group, Verdict, group_of

STRATEGIES = {
    "eager": (Strategy.LIBRARY,),
    "cpu": cpu.STRATEGIES,
    "triton": triton.STRATEGIES,
    "cuda": cuda.STRATEGIES,
}
BACKENDS = tuple(STRATEGIES)

_ON_GPU = "PyTorch's GEMMs, in an order that moves no more bytes than PEFT's"


def _parse_names(name: str, strategy: str | None = None) -> Forced:
    """Return the named backend and strategy; ValueError if there is none of the name."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}")
    if strategy is None:
        return Forced(name)
    try:
        parsed = Strategy(strategy)
    except ValueError:
        parsed = None
    if parsed not in STRATEGIES[name]:
        want = ", ".join(map(repr, STRATEGIES[name]))
        raise ValueError(f"strategy: got {strategy!r}, want for backend {name!r} one of {want}")
    return Forced(name, parsed)


def forced_backend() -> str | None:
    """Return the backend named by `backend(...)` or by LORA_KERNELS_BACKEND, read at import."""
    if torch.compiler.is_compiling():  # torch 2.8 cannot trace a ContextVar
        return forced.entered
    return forced.current.get().backend


if (_requested_at_import := forced_backend()) is not None:
    _parse_names(_requested_at_import)


def format_request() -> str:
    """Return the backend and strategy in force as the argument `choice` of an op.

    The strategy is left out under `torch.compile`, where it is not known.
    """
    if torch.compiler.is_compiling():
        return forced_backend() or ""
    return " ".join(filter(None, forced.current.get()))


def parse_request(choice: str) -> Forced | None:
    """Parse an op's `choice`, the inverse of `format_request`; None for the empty string."""
    name, _, strategy = choice.partition(" ")
    return Forced(name, Strategy(strategy) if strategy else None) if name else None


def extra_operands(operands: Any, dropout_p: float) -> tuple[str, ...]:
    """Return the names of a call's operands after `bias`, and of its codes, for `Problem.extra`.

    A dropout mask that the backend draws counts as "mask".
    """
    names = _names_after_bias(operands.__class__)
    present = [
        name for name, t in zip(names, operands[-len(names) :], strict=True) if t is not None
    ]
    if dropout_p and "rng" not in present and "mask" not in present:
        present.append("mask")
    if isinstance(operands.weight, Codes):
        present += operands.weight.operands()
    return tuple(present)


@functools.cache
def _names_after_bias(operands_type: Any) -> tuple[str, ...]:
    fields: tuple[str, ...] = operands_type._fields
    return fields[fields.index("bias") + 1 :]


_COLUMNS = Layout(columns=True)


def layout_of(
    device_type: str, weight: torch.Tensor | Codes | None, dtype: torch.dtype
) -> Layout | None:
    """Return the weight's layout for a GEMM in `dtype`; None if every backend accepts it."""
    if device_type != "cpu" or cuda.emulated.get() is not None:
        return constraints.layout(weight, dtype)
    if not isinstance(weight, torch.Tensor) or weight.stride(1) == 1 or weight.stride(0) != 1:
        return None
    return _COLUMNS


def backend(name: str, strategy: str | None = None) -> AbstractContextManager[None]:
    """Return a context that forces one backend; an op that it cannot run raises RuntimeError.

    Args:
        name: "eager", "cpu", "triton" or "cuda".
        strategy: how the backend computes the call, a `Strategy` or its name; None lets the
            package choose.

    Raises ValueError for another name, or a strategy that the backend does not have.

    >>> import lora_kernels, torch
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> with lora_kernels.backend("eager"):
    ...     lora_kernels.lora_linear(x, W, A, B).shape
    torch.Size([2, 3])
    """
    return forced.set_to(_parse_names(name, strategy))


def choose(problem: Problem, requested: Forced | None = None) -> Choice:
    """Choose the backend and strategy of a call, the same for forward and backward.

    Raises RuntimeError if a requested backend or strategy cannot run it.

    requested: None for the backend in force.
    """
    requested = requested or forced.current.get()
    if problem.device_type == "cpu" and requested.backend in (None, "cpu"):
        return _choose_cpu(
            problem, requested, (native.reason, native.isa, native.amx_bf16, native.intel)
        )
    if problem.mixed and requested.backend in ("triton", "cuda"):
        require_supported(requested.backend, ONE_ADAPTER)
    if requested.backend == "triton":
        return _heuristics("triton").choose(problem, requested.strategy)  # type: ignore[no-any-return]
    if requested.backend == "cuda":
        return _heuristics("cuda").choose(problem, requested.strategy)  # type: ignore[no-any-return]
    if requested.backend == "eager":
        return Choice("eager", Strategy.LIBRARY, "the eager backend was requested")
    if requested.backend == "cpu":
        require_supported("cpu", cpu_heuristics.unsupported_reason(problem))  # raises: no CPU
    if problem.device_type == "cuda" and device.has_gpu():
        return _choose_gpu(problem)
    return Choice("eager", Strategy.LIBRARY, _eager_reason(problem))


def _heuristics(backend: str) -> Any:
    """Import the heuristics of a GPU backend lazily, so a CPU's first call does not wait."""
    if backend == "triton":
        from ..backends.triton import heuristics
    else:
        from ..backends.cuda import heuristics  # type: ignore[no-redef]
    return heuristics


def _choose_gpu(problem: Problem) -> Choice:
    """Choose for tensors on a GPU: the fastest kernel that qualified, or eager."""
    verdict = verdicts.current(problem.device_index)
    in_graph = isinstance(verdict, Verdict) and workspace.is_capturing(torch.device("cuda"))
    return _choose_by_verdict(problem, verdict, in_graph, device.gpu(problem.device_index))


@functools.lru_cache(maxsize=4096)
def _choose_by_verdict(
    problem: Problem, verdict: Verdict | str, in_graph: bool, target: DeviceInfo
) -> Choice:
    """Choose by the verdict, or eager if the call is not covered.

    Cached for the process: a later change of libraries is not seen.

    Args:
        verdict: the GPU's, or the reason why it has none.
        in_graph: whether a CUDA graph captures the call, so the host's time does not count.
        target: the GPU.
    """
    from ..backends.triton import configs

    if (reason := configs.capability_unsupported_reason(target)) is not None:
        if torch.bfloat16 in (problem.x_dtype, problem.dtype):
            reason += (
                f"; sm_{target.capability} has no bfloat16 either, and emulates it: want float16"
            )
        return Choice("eager", Strategy.LIBRARY, reason)
    # Triton and CUDA support the same operands.
    reason = problem.unsupported_reason("triton") or _uncovered_reason(problem)
    if reason is None and isinstance(verdict, Verdict):
        choice = _choose_measured(problem, verdict, in_graph)
    else:
        choice = _keep_eager(reason or str(verdict))
    if choice.is_eager and isinstance(verdict, Verdict):
        return _name_order(problem, verdict, choice)
    return choice


def _keep_eager(reason: str) -> Choice:
    return Choice("eager", Strategy.LIBRARY, f"{_ON_GPU}; {reason}")


def _name_order(problem: Problem, verdict: Verdict, choice: Choice) -> Choice:
    """Return the choice with the measured order of its GEMMs in the reason, if there is one."""
    is_plain = problem.x_dtype is problem.a_dtype is problem.b_dtype is problem.dtype
    if not is_plain or problem.mixed or {"rank_gate", "column_scale"} & {*problem.extra}:
        return choice
    sizes = problem.rows, problem.columns, problem.inner
    order = verdict.describe_order(problem.dtype, *sizes)
    return replace(choice, reason=f"{choice.reason}; {order}") if order else choice


def _uncovered_reason(problem: Problem) -> str | None:
    """Return why no qualification covers a call, or None."""
    if problem.mixed:
        return ONE_ADAPTER
    if problem.rank > MAX_RANK:
        return f"rank {problem.rank} is above the qualified {MAX_RANK}"
    if problem.layout is not None and problem.layout.columns:
        return "weights stored as [K, N] are not part of the qualification"
    if problem.layout is not None and problem.layout.unsupported_reason == constraints.NO_BASE:
        return "calls without a base GEMM are not part of the qualification"
    return None


def _choose_measured(problem: Problem, verdict: Verdict, in_graph: bool) -> Choice:
    """Choose the strategy with the smallest measured ratio to eager's time, or eager."""
    kind = group_of("", "", problem)
    checked = {*verdict.passed, *verdict.failed}
    groups = [group for group in checked if group._replace(backend="", strategy="") == kind]
    if not groups:
        words = f"{kind.weight} weights in {kind.dtype} with {kind.adapter} adapters"
        return _keep_eager(f"{words} were not checked")
    max_rows = max((point.rows for point in verdict.points if point.group in groups), default=None)
    if max_rows is not None and problem.rows > max_rows:
        return _keep_eager(f"{problem.rows} rows are above the {max_rows} that were measured")
    candidates, reasons = [], []
    for group in sorted(groups):
        ratio, reason = _judge(group, problem, verdict, in_graph)
        if ratio is None:
            reasons.append(f"{group.backend} {group.strategy!r} {reason}")
        else:
            candidates.append((ratio, group, reason))
    if not candidates:
        return _keep_eager("; ".join(reasons))
    _, (backend, strategy, *_), reason = min(candidates)
    return Choice(backend, Strategy(strategy), reason)


def _judge(
    group: Group, problem: Problem, verdict: Verdict, in_graph: bool
) -> tuple[float | None, str]:
    """Return the ratio of the group's forward time to eager's, and a description of it.

    The ratio is None if the group may not run the call. The description is then the reason.
    """
    if group not in verdict.passed:
        return None, f"did not qualify: {verdict.failed[group]}"
    unsupported = (
        cuda.unsupported_device_reason(problem.device_type, problem.device_index)
        if group.backend == "cuda"
        else triton.unavailable_reason()
    )
    unsupported = unsupported or _heuristics(group.backend).unsupported_reason(
        problem, group.strategy
    )
    if unsupported is not None:
        return None, f"cannot run it: {unsupported}"
    point = verdict.nearest_point(group, problem.rows, problem.columns, problem.inner)
    if point is None:
        return None, f"was not measured with {problem.rows} rows"
    forward, step = point.ratios(in_graph)
    description = f"measured {forward:.2f} of eager's time at {point.sizes}"
    description += "" if step is None else f", step {step:.2f}"
    is_faster = forward <= KEEP_EAGER and (step is None or step <= 1.0)
    return forward if is_faster else None, description


@functools.lru_cache(maxsize=4096)
def _choose_cpu(problem: Problem, requested: Forced, environment: tuple[object, ...]) -> Choice:
    """Choose for tensors on a CPU; `environment` completes the cache's key."""
    reason = cpu_heuristics.unsupported_reason(problem)
    if requested.backend:
        require_supported("cpu", reason)
        return cpu_heuristics.choose(problem, requested.strategy, "the cpu backend was requested")
    if reason is not None:
        return Choice("eager", Strategy.LIBRARY, reason)
    return cpu_heuristics.choose(problem, None)


def choose_experts(problem: Problem, requested: Forced | None = None) -> Choice:
    """Choose the backend of `lora_experts_linear`, the same for forward and backward.

    requested: None for the backend in force.
    """
    requested = requested or forced.current.get()
    if requested.backend in ("triton", "cuda"):
        require_supported(requested.backend, "it has no kernels for experts")
    strategy = cpu_heuristics.choose_experts(requested.strategy)
    return _choose_cpu_or_eager(problem, requested.backend, strategy, Strategy.LIBRARY)


def choose_norm(problem: Problem) -> Choice:
    """Choose the backend of `dora_norm`. problem: x_dtype is the weight's dtype, dtype float32."""
    requested = forced.current.get().backend
    if requested in ("triton", "cuda"):
        require_supported(requested, "it has no kernel for row norms")
    return _choose_cpu_or_eager(problem, requested, Strategy.FUSED, Strategy.PANELS)


def _choose_cpu_or_eager(
    problem: Problem, requested: str | None, cpu_strategy: Strategy, eager_strategy: Strategy
) -> Choice:
    """Choose the CPU backend with `cpu_strategy` if it can run the call, else eager."""
    if requested == "eager":
        return Choice("eager", eager_strategy, "the eager backend was requested")
    reason = cpu_heuristics.unsupported_reason(problem)
    if reason is None:
        return Choice("cpu", cpu_strategy, f"native kernels, {native.isa}")
    if requested == "cpu":
        require_supported("cpu", reason)
    return Choice("eager", eager_strategy, _eager_reason(problem))


def dropout_operand(device_type: str, dropout_p: float) -> tuple[str, ...]:
    """Return `Problem.extra` of a call that passes neither a dropout state nor a mask."""
    if not dropout_p:
        return ()
    return ("mask",) if is_eager_on_gpu(device_type) else ("rng",)


def is_eager_on_gpu(device_type: str) -> bool:
    """Return True if a device of this type runs the eager backend's GPU path.

    PyTorch's kernel draws the dropout masks there. All other paths derive them from a state.
    """
    return is_on_gpu_path(device_type) and forced_backend() in (None, "eager")


def _eager_reason(problem: Problem) -> str:
    """Return why eager runs a call that no qualification covers."""
    if problem.device_type != "cuda":
        return cpu_heuristics.unsupported_reason(problem) or ""
    return "PyTorch's GEMMs; only lora_linear may take kernels that qualified"
