"""Merges that PEFT cannot do, refused before they change the first layer.

PEFT merges layer after layer, so an error of one layer would leave those before it merged.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..quantization.tensor import QuantizedTensor
from .modules import is_linear4bit

_MERGES = "merge_adapter", "_unload_and_optionally_merge"


def refuse_merges() -> None:
    """Let `merge_adapter` and `merge_and_unload` of PEFT's models call `check_merge` first.

    This holds for the whole process.
    """
    for cls in (BaseTuner, *BaseTuner.__subclasses__()):
        for name in _MERGES:
            method: Any = vars(cls).get(name)
            if method is None or hasattr(method, "checks_layers"):
                continue
            signature = inspect.signature(method)
            if "adapter_names" in signature.parameters:  # else it calls the base class's
                setattr(cls, name, _with_check(method, signature))


def _with_check(method: Any, signature: inspect.Signature) -> Any:
    @functools.wraps(method)
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        if arguments.get("merge", True):
            check_merge(self.model, arguments.get("adapter_names"))
        return method(self, *args, **kwargs)

    merge.checks_layers = True  # type: ignore[attr-defined]
    return merge


def check_merge(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Raise ValueError if PEFT cannot merge one of the adapters into its base.

    adapter_names: None: each layer's active adapters.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        reason = unmergeable_reason(layer)
        if reason is not None and merged_adapters(layer, adapter_names):
            raise ValueError(f"model: got {name}, {reason}")


def merged_adapters(layer: Any, adapter_names: list[str] | None) -> set[str]:
    """Return those adapters of the layer that a merge of these, or of the active ones, merges."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    present = {key for part in layer.adapter_layer_names for key in getattr(layer, part, {})}
    return present.intersection(names).difference(layer.merged_adapters)


def unmergeable_reason(layer: Any) -> str | None:
    """Return what PEFT's merge of the layer cannot write, and the remedy; None if it can."""
    parameters = layer.get_base_layer()._parameters
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    weight = parameters.get(name)
    if isinstance(weight, QuantizedTensor):
        return (
            f"whose {name} is frozen in {weight.format}, want a dense one: save the adapter, "
            "load the model decoded, the adapter with PeftModel.from_pretrained, and merge there"
        )
    if is_linear4bit(layer.get_base_layer()) and type(weight).__name__ == "DTensor":
        return (
            "whose 4-bit weight FSDP2 shards without its scales, want a weight that is not "
            "sharded: save the adapter, load it over the base without FSDP2, and merge there"
        )
    return None
