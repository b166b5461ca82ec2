"""The backends: one module each; no backend imports another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_MULTI = ("multi_lora_linear", "multi_lora_linear_backward")
_EQUATION = ("lora_linear", "lora_linear_backward", *_MULTI, "dora_norm")
_CODEC = ("quantize", "dequantize")


def lazy_launchers(package: str, codec: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__` that imports a launcher's module when it is first used.

    codec: the module of `quantize` and `dequantize`; the others are in `equation`.
    """

    def find(name: str) -> Any:
        if name not in (*_EQUATION, *_CODEC):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = codec if name in _CODEC else "equation"
        return getattr(importlib.import_module(f"{package}.{module}"), name)

    return find
