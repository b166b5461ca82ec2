"""The forced backend, which `choice.choose.backend` sets and the choice of a kernel reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from .problem import Strategy


class Forced(NamedTuple):
    """A requested backend and strategy; None for no request."""

    backend: str | None = None
    strategy: Strategy | None = None


# Read at import. `choice.choose` checks the name.
DEFAULT = Forced(os.environ.get("LORA_KERNELS_BACKEND") or None)
current: ContextVar[Forced] = ContextVar("lora_kernels_backend", default=DEFAULT)
# The backend of the innermost `set_to` of any thread: a global, which Dynamo can trace and guard.
entered: str | None = DEFAULT.backend


@contextmanager
def set_to(requested: Forced) -> Iterator[None]:
    """Request a backend and strategy in this context.

    Autograd runs the backward on a GPU in another thread, which does not inherit the context.
    """
    global entered
    token, before, entered = current.set(requested), entered, requested.backend
    try:
        yield
    finally:
        current.reset(token)
        entered = before
