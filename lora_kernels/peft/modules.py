"""Kinds of modules, their hooks, and whether a module's forward was replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook  # type: ignore[import-untyped]
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# Classes of layers, and of torchao's weights of nn.Linear, whose result is held by neither the
# module nor the backward. Each class's forward and backward were read, in autoawq 0.2.9,
# bitsandbytes 0.50, compressed-tensors 0.12, gptqmodel 4 and 7.7, hqq 0.2.8, torchao 0.18 and
# transformers 5.24.
_GPTQMODEL = "gptqmodel.nn_modules.qlinear"
FRESH = {
    "awq.modules.linear.gemm": ("WQLinear_GEMM",),
    "bitsandbytes.nn.modules": ("Linear8bitLt",),
    "compressed_tensors.linear.compressed_linear": ("CompressedLinear",),
    f"{_GPTQMODEL}.exllamav2": ("ExllamaV2Linear",),
    f"{_GPTQMODEL}.exllamav2_awq": ("AwqExllamaV2Linear",),
    f"{_GPTQMODEL}.gemm_awq": ("AwqGEMMLinear",),
    f"{_GPTQMODEL}.gemm_awq_triton": ("AwqGEMMTritonLinear",),
    f"{_GPTQMODEL}.machete": ("MacheteLinear",),
    f"{_GPTQMODEL}.marlin": ("MarlinLinear",),
    f"{_GPTQMODEL}.marlin_awq": ("AwqMarlinLinear",),
    f"{_GPTQMODEL}.torch": ("TorchLinear", "TorchQuantLinear"),
    f"{_GPTQMODEL}.torch_awq": ("AwqTorchLinear",),
    f"{_GPTQMODEL}.tritonv2": ("TritonV2Linear",),
    "hqq.core.quantize": ("HQQLinear",),
    "torchao.quantization": (
        *("Float8Tensor", "Int4PreshuffledTensor", "Int4Tensor", "Int4TilePackedTo4dTensor"),
        *("Int8Tensor", "IntxUnpackedToInt8Tensor"),
    ),
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor": ("NF4Tensor",),
    "transformers.integrations.compressed_tensors": ("CompressedTensorsFP8Linear",),
    "transformers.integrations.eetq": ("EetqLinear",),
    "transformers.integrations.fbgemm_fp8": ("FbgemmFp8Linear",),
    "transformers.integrations.finegrained_fp8": ("FP8Linear",),
}
# compressed-tensors gives an nn.Linear, or its CompressedLinear, a forward that is defined here.
_COMPRESSED_FORWARD = "compressed_tensors.quantization.lifecycle.forward"


def is_linear4bit(module: nn.Module) -> bool:
    """Return True for bitsandbytes' 4-bit linear, without importing bitsandbytes."""
    cls = type(module)
    names = ("Linear4bit", "LinearNF4", "LinearFP4")
    return cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in names


def is_conv1d(module: nn.Module) -> bool:
    """Return True for transformers' Conv1D, GPT-2's linear layer, whose weight is [K, N]."""
    cls = type(module)
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"


def original_forward(cls: Any) -> Any:
    """Return the class's forward; None if it is not the one that the class's package defined.

    The modules in which the functions were compiled decide, because `functools.wraps` copies names.

    >>> original_forward(nn.Linear) is nn.Linear.forward
    True
    """
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    function: Any = cls.forward
    while True:
        module = _defined_in(function) or ""
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            name = f"{owner.__qualname__}.forward"
            is_original = module == owner.__module__ and function.__qualname__ == name
            return cls.forward if is_original else None
        if module.partition(".")[0] != owner.__module__.partition(".")[0]:
            return None
        function = wrapped


def patched_reason(module: nn.Module) -> str | None:
    """Return why an instance's own `forward` may do more than the class's."""
    forward: Any = module.__dict__.get("forward")
    if forward is None:
        return None
    if getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        outer_hook: Any = module._hf_hook
        if outer_hook.no_grad:
            return "a hook of accelerate's switches gradients off"
        for hook in _accelerate_hooks(module):
            if type(hook) is not AlignDevicesHook:
                return f"accelerate's {type(hook).__name__} sits on it"
            if hook.offload:
                return "accelerate offloads its weights"
        # The hooks only move x to the weights' device, where x already is.
        forward = module._old_forward
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    return "its forward was replaced"


def _accelerate_hooks(module: Any) -> Sequence[Any]:
    """Return the hooks that accelerate runs around the module's forward."""
    hook = module._hf_hook
    return hook.hooks if type(hook) is SequentialHook else (hook,)


def keeps_forward(module: nn.Module, device: torch.device) -> bool:
    """Return True if the module computes its class's forward for tensors on this device.

    A hook of accelerate's that moves the tensors nowhere keeps it. `device_map` puts one on each
    module. Hooks of PyTorch's are not read.
    """
    attributes = module.__dict__
    if "forward" not in attributes:
        return True
    if patched_reason(module) is not None:
        return False
    hooks = _accelerate_hooks(module) if "_hf_hook" in attributes else ()
    return all(_is_device(hook.execution_device, device) for hook in hooks)


def _is_device(given: int | str | torch.device | None, device: torch.device) -> bool:
    """Return True if accelerate's execution_device is this device of a tensor, or None."""
    if isinstance(given, int):
        return device.type != "cpu" and given == device.index
    return given is None or torch.device(given) == device


def has_fresh_result(module: nn.Module) -> bool:
    """Return True if only the caller holds the tensor that a call of the module returns.

    Hooks and replaced forwards may hold the result, so they give False.
    """
    cls = type(module)
    if any(hooks_of(module)) or _has_any_global_hook():
        return False
    if _defined_in(cls.forward) != cls.__module__:
        return False
    if is_compressed_forward(module.__dict__.get("forward")):
        return cls is nn.Linear or _is_listed(cls)
    if patched_reason(module) is not None:
        return False
    return _is_listed(type(module._parameters.get("weight")) if cls is nn.Linear else cls)


def is_compressed_forward(function: Any) -> bool:
    """Return True if compressed-tensors has given a layer this forward."""
    return _defined_in(function) == _COMPRESSED_FORWARD


def _is_listed(cls: type) -> bool:
    return cls.__name__ in FRESH.get(cls.__module__, ())


def _defined_in(function: Any) -> str | None:
    """Return the module in which a function was compiled, whatever `functools.wraps` copied."""
    name: str | None = getattr(function, "__globals__", {}).get("__name__")
    return name


HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    forward = module._forward_pre_hooks, module._forward_hooks
    return *forward, module._backward_pre_hooks, module._backward_hooks


LINEAR_FORWARD = original_forward(nn.Linear)
