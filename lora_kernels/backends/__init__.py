"""The backends, a package each. `eager` may launch `triton`'s elementwise kernels and decoder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_EQUATION = ("lora_linear", "lora_linear_backward")


def import_extension(name: str) -> ModuleType:
    """Import a compiled module of this package, from the package's folder alone.

    If it is missing there, the finder of another checkout's editable install offers its own, which
    was built from other sources.

    >>> import_extension("_absent")
    Traceback (most recent call last):
    ModuleNotFoundError: lora_kernels/_absent was not built
    """
    package = __name__.partition(".")[0]
    spec = importlib.util.find_spec(f"{package}.{name}")
    here = os.path.dirname(os.path.dirname(__file__))
    if spec is None or not os.path.samefile(os.path.dirname(spec.origin or ""), here):
        raise ModuleNotFoundError(f"{package}/{name} was not built")
    return importlib.import_module(spec.name)


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
