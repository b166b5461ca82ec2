"""Where the work is done: one module a backend, none of which imports another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazy_launchers(package: str, codec: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__` that imports a launcher's module when it is first used.

    codec: the module of `quantize` and `dequantize`; the others are in `equation`.
    """
    modules = dict.fromkeys(
        ("lora_linear", "lora_linear_backward", "multi_lora_linear",
         "multi_lora_linear_backward", "dora_norm"), "equation",
    ) | {"quantize": codec, "dequantize": codec}  # fmt: skip

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return find
