"""Which backend the user asks for: set by `selection.backend`, read wherever a kernel is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Forced(NamedTuple):
    backend: str | None = None
    strategy: str | None = None


# The environment's name, read at import, is checked by `selection`.
_DEFAULT = Forced(os.environ.get("LORA_KERNELS_BACKEND") or None)
current: ContextVar[Forced] = ContextVar("lora_kernels_backend", default=_DEFAULT)


@contextmanager
def again(asked: Forced) -> Iterator[None]:
    """As it was when a forward ran: a GPU's backward runs in a thread that knows nothing of it."""
    token = current.set(asked)
    try:
        yield
    finally:
        current.reset(token)
