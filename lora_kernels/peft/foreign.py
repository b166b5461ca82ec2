"""PEFT's layers over weights in the formats of other libraries, whose modules do the base product.

A fused class is made when it is first asked for, also by `pickle`: several of PEFT's are there only
beside their library.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .adalora import FusedSVD
from .linear import Fused

_MODULES = {  # of PEFT's class
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
    """What `fuse` makes of a layer of PEFT's class; None where it is not one of these."""
    return _made(cls) if _MODULES.get(cls.__name__) == cls.__module__ else None


@functools.cache
def _made(cls: type) -> type:
    kind = FusedSVD if cls.__name__.startswith("SVD") else Fused
    doc = f"PEFT's {cls.__name__}, with the adapter's part by `lora_linear`."
    return type(f"Fused{cls.__name__}", (kind, cls), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    of = name.removeprefix("Fused")
    cls = None
    if of != name and of in _MODULES:
        cls = getattr(importlib.import_module(_MODULES[of]), of, None)
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _made(cls)
