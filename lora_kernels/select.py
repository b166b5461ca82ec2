"""Which backend runs an op, and why: pure functions of shapes, dtypes and device facts.

A choice never depends on whether gradients are on, and is never revised by an exception: a
backend that is forced where it cannot run raises, naming what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .backends import native

MAX_KERNEL_RANK = 256
BACKENDS = ("eager", "cpu")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """What `explain` shows: the backend, the strategy it follows, and the reason in words."""

    backend: str
    strategy: str
    reason: str


_EAGER_STRATEGY = "library products, in-place addmm"
_CPU_STRATEGY = "library product + rank update"


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(BACKENDS)}")
    return name


_forced: ContextVar[str | None] = ContextVar(
    "lora_kernels_backend",
    default=_check_name(os.environ["LORA_KERNELS_BACKEND"])
    if os.environ.get("LORA_KERNELS_BACKEND")
    else None,
)


def forced_backend() -> str | None:
    """The backend that `backend(...)` or LORA_KERNELS_BACKEND, read at import, names, if any."""
    return _forced.get()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with`; where it cannot run, the op raises RuntimeError.

    >>> import lora_kernels, torch
    >>> x, W, A, B = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> with lora_kernels.backend("eager"):
    ...     lora_kernels.lora_linear(x, W, A, B).shape
    torch.Size([2, 3])
    """
    token = _forced.set(_check_name(name))
    try:
        yield
    finally:
        _forced.reset(token)


def lora_linear(
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> Choice:
    """The choice for `lora_linear` and its backward (one choice for both, always)."""
    return _choose(
        _forced.get(), native.isa, native.reason,
        device_type, x_dtype, a_dtype, b_dtype, dtype, rank,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _choose(
    forced: str | None,
    isa: str | None,
    native_absence: str | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> Choice:
    if forced == "eager":
        return Choice("eager", _EAGER_STRATEGY, "the eager backend was asked for")
    obstacle = _cpu_obstacle(native_absence, device_type, x_dtype, a_dtype, b_dtype, dtype, rank)
    if obstacle is None:
        why = "the cpu backend was asked for" if forced else f"native kernels, {isa}"
        return Choice("cpu", _CPU_STRATEGY, why)
    if forced == "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for and cannot run here: {obstacle}")
    return Choice("eager", _EAGER_STRATEGY, obstacle)


def _cpu_obstacle(
    native_absence: str | None,
    device_type: str,
    x_dtype: torch.dtype,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    dtype: torch.dtype,
    rank: int,
) -> str | None:
    if device_type != "cpu":
        return f"no kernels for device type {device_type!r} in this version"
    if native_absence is not None:
        return native_absence
    for name, d in (("x", x_dtype), ("lora_A", a_dtype), ("lora_B", b_dtype), ("y", dtype)):
        if d not in _KERNEL_DTYPES:
            got = str(d).removeprefix("torch.")
            return f"{name} is {got}; the kernels take float32, bfloat16, float16"
    if rank > MAX_KERNEL_RANK:
        return f"rank {rank} is above the kernels' {MAX_KERNEL_RANK}"
    return None
