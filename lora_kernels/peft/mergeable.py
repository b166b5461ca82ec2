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
from .sharded import FLATTENED, is_absent, is_flattened, is_sharded_4bit

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
            gathers = method.__name__ == "merge_adapter"
            check_merge(self.model, arguments.get("adapter_names"), exact_gathers=gathers)
        return method(self, *args, **kwargs)

    merge.checks_layers = True  # type: ignore[attr-defined]
    return merge


def check_merge(
    model: nn.Module,
    adapter_names: list[str] | None = None,
    gathers: bool = False,
    exact_gathers: bool = False,
) -> None:
    """Raise ValueError if PEFT cannot merge one of the adapters into its base.

    Args:
        adapter_names: None: each layer's active adapters.
        gathers: whether the merge gathers sharded parameters of each layer.
        exact_gathers: whether layers with exact merges do.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        is_gathered = gathers or (exact_gathers and "exact_merge" in vars(layer))
        reason = unmergeable_reason(layer, is_gathered)
        if reason is not None and merged_adapters(layer, adapter_names):
            raise ValueError(f"model: got {name}, {reason}")


def merged_adapters(layer: Any, adapter_names: list[str] | None) -> set[str]:
    """Return those adapters of the layer that a merge of these, or of the active ones, merges."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    present = {key for part in layer.adapter_layer_names for key in getattr(layer, part, {})}
    return present.intersection(names).difference(layer.merged_adapters)


def unmergeable_reason(layer: Any, gathers: bool = False) -> str | None:
    """Return what PEFT's merge of the layer cannot write, and the remedy; None if it can.

    gathers: whether the merge gathers parameters that FSDP2 or ZeRO-3 shards.
    """
    base = layer.get_base_layer()
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    weight = base._parameters.get(name)
    if isinstance(weight, QuantizedTensor):
        return (
            f"whose {name} is frozen in {weight.format}, want a dense one: save the adapter, "
            "load the model decoded, the adapter with PeftModel.from_pretrained, and merge there"
        )
    if weight is not None and not gathers:
        if is_sharded_4bit(base, name):
            return f"whose 4-bit weight FSDP2 shards without its scales, want {_REMEDY}"
        if is_absent(weight):
            return (
                f"whose {name} of shape {list(weight.shape)} ZeRO-3 partitions outside of "
                f"deepspeed.zero.GatheredParameters, want {_REMEDY}"
            )
    if is_flattened(base, name) and not gathers:
        return f"whose {name} is {FLATTENED}, or lora_kernels.peft.merged_weights(model)"
    return None


_REMEDY = (
    "merges that gather it: lora_kernels.peft.merged_weights(model), or merge_adapter after "
    'lora_kernels.peft.fuse(model, exact_merge="host")'
)
