"""The kinds of modules, and whether calling one does what its class says."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook  # type: ignore[import-untyped]
from torch import nn


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


def patched_reason(module: nn.Module) -> str | None:
    """Return why an instance's own `forward` may do more than its class's."""
    forward: Any = module.__dict__.get("forward")
    if forward is None:
        return None
    if getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        hook: Any = module._hf_hook
        if type(hook) is not AlignDevicesHook:
            return f"accelerate's {type(hook).__name__} sits on it"
        if hook.offload:
            return "accelerate offloads its weights"
        # The hook has nothing left to do but to move x to the weights' device, where x already is.
        forward = module._old_forward
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    return "its forward was replaced"


HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    forward = module._forward_pre_hooks, module._forward_hooks
    return *forward, module._backward_pre_hooks, module._backward_hooks


LINEAR_FORWARD = library_forward(nn.Linear)
