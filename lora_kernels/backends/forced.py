"""The forced backend: set by `selection.backend`, read wherever a kernel is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ..core.problem import Strategy


class Forced(NamedTuple):
    backend: str | None = None
    strategy: Strategy | None = None


# The environment's name, read at import, is checked by `selection`.
_DEFAULT = Forced(os.environ.get("LORA_KERNELS_BACKEND") or None)
current: ContextVar[Forced] = ContextVar("lora_kernels_backend", default=_DEFAULT)
# The backend of the innermost `set_to` of any thread, which a compiler can trace and guard.
entered: str | None = _DEFAULT.backend


@contextmanager
def set_to(requested: Forced) -> Iterator[None]:
    """Request a backend and strategy in this context.

    A GPU's backward runs in a thread of its own and does not inherit the forward's.
    """
    global entered
    token, before, entered = current.set(requested), entered, requested.backend
    try:
        yield
    finally:
        current.reset(token)
        entered = before
