"""The backends, a package each. `eager` may launch `triton`'s elementwise kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

_EQUATION = ("lora_linear", "lora_linear_backward")


def lazy_launchers(package: str, codec: str | None = None) -> Callable[[str], Any]:
    """Return a package's `__getattr__` that imports a launcher's module when it is first used.

    codec: the module of `dequantize`; None without it. The others are in `linear`.
    """
    modules = dict.fromkeys(_EQUATION, "linear")
    if codec is not None:
        modules["dequantize"] = codec

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, found)  # the next call finds it there
        return found

    return find
