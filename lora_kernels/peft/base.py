"""The base layer of a PEFT layer: its kind and its weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..quantization import Weight4bit


def is_linear4bit(module: nn.Module) -> bool:
    """Return True for bitsandbytes' 4-bit linear, without importing bitsandbytes."""
    cls = type(module)
    names = ("Linear4bit", "LinearNF4", "LinearFP4")
    return cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in names


def is_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, GPT-2's linear layer, whose weight is [K, N]."""
    cls = type(module)
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"


def library_forward(cls: Any) -> Any:
    """Return the class's forward; None if it is not the one that the class's package defined.

    The modules in which the functions were compiled decide, because `functools.wraps` copies names.

    >>> library_forward(nn.Linear) is nn.Linear.forward
    True
    """
    owner = next(each for each in cls.__mro__ if "forward" in vars(each))
    found: Any = cls.forward
    while True:
        module = getattr(found, "__globals__", {}).get("__name__", "")
        inner = getattr(found, "__wrapped__", None)
        if inner is None:
            name = f"{owner.__qualname__}.forward"
            is_own = module == owner.__module__ and found.__qualname__ == name
            return cls.forward if is_own else None
        if module.partition(".")[0] != owner.__module__.partition(".")[0]:
            return None
        found = inner


def missing_layers(model: nn.Module, remedy: str) -> ValueError:
    """Return the error for a model without LoRA layers, which names the method of a PEFT model."""
    configs = getattr(model, "peft_config", None)
    methods = sorted({each.peft_type.value for each in configs.values()}) if configs else []
    if methods:
        got, want = (
            f"a PEFT model of {' and '.join(methods)} without LoRA layers",
            "LORA or ADALORA",
        )
    else:
        got, want = f"{type(model).__name__} without LoRA layers", f"a PEFT model: {remedy}"
    return ValueError(f"model: got {got}, want {want}")


def base_weight(base: nn.Module) -> Tensor:
    """Return a view of the base's weight as W [N, K]."""
    weight = cast(Tensor, base._parameters["weight"])
    return weight.t() if is_conv1d(base) else weight


def readable_weight(base: nn.Module, x: Tensor) -> tuple[Tensor | Weight4bit, torch.dtype | None]:
    """Return W of a base that can be read, and the dtype to compute in if W is 4-bit."""
    if is_linear4bit(base):
        from .base4bit import readable_weight4bit  # imports bitsandbytes, hence not at the top

        return readable_weight4bit(base, x)
    return base_weight(base), None
