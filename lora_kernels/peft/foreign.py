"""PEFT's layers over weights in other libraries' formats. Those libraries run the base GEMM.

A fused class is created at its first use, also when `pickle` looks it up, because several of PEFT's
classes exist only if their library is installed.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .adalora import FusedSVD
from .linear import Fused

_MODULES = {  # PEFT's class -> its module
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "GPTQLoraLinear": "peft.tuners.lora.gptq",
    "AwqLoraLinear": "peft.tuners.lora.awq",
    "AqlmLoraLinear": "peft.tuners.lora.aqlm",
    "EetqLoraLinear": "peft.tuners.lora.eetq",
    "HqqLoraLinear": "peft.tuners.lora.hqq",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
    "IncLoraLinear": "peft.tuners.lora.inc",
    "SVDLinear8bitLt": "peft.tuners.adalora.bnb",
    "SVDQuantLinear": "peft.tuners.adalora.gptq",
}


def fused_class(cls: type) -> Any:
    """Return the class that `fuse` gives a layer of PEFT's class; None if it has none."""
    return _build_class(cls) if _MODULES.get(cls.__name__) == cls.__module__ else None


@functools.cache
def _build_class(cls: type) -> type:
    kind = FusedSVD if cls.__name__.startswith("SVD") else Fused
    doc = f"PEFT's {cls.__name__}, with the adapter's part by `lora_linear`."
    return type(f"Fused{cls.__name__}", (kind, cls), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    peft_name = name.removeprefix("Fused")
    cls = None
    if peft_name != name and peft_name in _MODULES:
        cls = getattr(importlib.import_module(_MODULES[peft_name]), peft_name, None)
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _build_class(cls)
