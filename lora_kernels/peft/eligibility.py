"""Reasons for which a module or a layer's state cannot be read, each in words; None if it can.

`read.py` asks for those of linear layers, `embedding.py` for those of embeddings. They depend on
the layer's state, on x's device, and on what observes the thread. `swap.py` has the reasons of
`fuse`. The functions read `_modules` and `_parameters`, because `nn.Module.__getattr__` takes ten
times as long.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import context
from ..quantization.tensor import QuantizedTensor
from .modules import (
    LINEAR_FORWARD,
    hooks_of,
    is_conv1d,
    is_linear4bit,
    original_forward,
    patched_reason,
)
from .packed import quantizes_input
from .sharded import parallel_reason
from .zero3 import is_gathered, is_partitioned

_CONV1D_FORWARD = original_forward(Conv1D)
_DROPOUT_FORWARD = original_forward(nn.Dropout)
_IDENTITY_FORWARD = original_forward(nn.Identity)


def state_reason(layer: Any) -> str | None:
    """Return why any kind of fused layer runs PEFT's forward in the layer's state."""
    if (reason := context.unfused_context() or replaced_reason(type(layer))) is not None:
        return reason
    if layer.disable_adapters:
        return "adapters are disabled: the base layer's own forward"
    if layer.merged:
        loss = getattr(layer, "merge_loss", None)
        return "adapters are merged: the base layer's own forward" + (f"; {loss}" if loss else "")
    if is_base_trainable(layer):
        return "the base weight is trainable"
    return parallel_reason(cast(nn.Module, layer._modules["base_layer"])._parameters.get("weight"))


def replaced_reason(fused_class: Any) -> str | None:
    """Return why PEFT's class, which the fused class overrides, may do more than PEFT's forward."""
    cls = fused_class.peft_class
    if cls.forward is fused_class.peft_forward:
        return None
    return f"{cls.__name__}.forward was replaced"


def dropout_reason(dropout: nn.Module) -> str | None:
    """Return why calling the module may do more than dropout."""
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    original_forward = _DROPOUT_FORWARD if type(dropout) is nn.Dropout else _IDENTITY_FORWARD
    if type(dropout).forward is not original_forward:
        return f"{type(dropout).__name__}.forward was replaced"
    if has_hooks(dropout):
        return "a hook sits on its dropout"
    return f"{reason} (its dropout's)" if (reason := patched_reason(dropout)) else None


def unreadable_reason(module: nn.Module, device: torch.device) -> str | None:
    """Return why calling the module may do more than `F.linear` on parameters on this device."""
    four_bit, conv1d = is_linear4bit(module), is_conv1d(module)
    if type(module).__name__ == "FullyShardedDataParallel":
        return "FSDP1 gathers its weight when it is called"
    if type(module) is not nn.Linear and not four_bit and not conv1d:
        return f"{type(module).__name__} is not exactly nn.Linear"
    if has_hooks(module):
        return hook_reason(module, f"its {'Conv1D' if conv1d else 'nn.Linear'}")
    if nn.Linear.forward is not LINEAR_FORWARD:
        return "nn.Linear.forward was replaced"
    if conv1d and type(module).forward is not _CONV1D_FORWARD:
        return "Conv1D.forward was replaced"
    if quantizes_input(module):
        return "compressed-tensors rounds its x or y too"
    if "forward" in module.__dict__ and (reason := patched_reason(module)):
        return reason
    weight = module._parameters.get("weight")
    if four_bit:
        from .base4bit import unreadable_4bit

        return unreadable_4bit(module, device)
    return tensor_reason(device, weight=weight)


def tensor_reason(device: torch.device, dim: int = 2, **tensors: Any) -> str | None:
    """Return why one of the tensors is not a plain matrix, or vector, on this device."""
    for name, tensor in tensors.items():
        if tensor is None:
            return f"its {name} is no parameter, as under FSDP1 or in a replica of DataParallel"
        if type(tensor) not in (nn.Parameter, Tensor, QuantizedTensor):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device != device:
            return f"its {name} is on {tensor.device}, x on {device}"
        if tensor.dim() != dim:
            return f"its {name} is flattened, as by FSDP1 or ZeRO-3"
    return None


def is_base_trainable(layer: Any) -> bool:
    weight = cast(nn.Module, layer._modules["base_layer"])._parameters.get("weight")
    return weight is not None and weight.requires_grad


def has_hooks(module: nn.Module) -> bool:
    """Return True if the module's call runs hooks.

    The hooks by which ZeRO-3 gathers parameters do not count while the parameters are gathered.
    """
    return any(hooks_of(module)) and not is_gathered(module)


def hook_reason(module: nn.Module, description: str) -> str:
    """Return the reason to call a module that has hooks. description: of the module."""
    if is_partitioned(module._parameters.get("weight")):
        return f"DeepSpeed's ZeRO-3 gathers {description} by hooks: call fuse again"
    return f"a hook sits on {description}"
