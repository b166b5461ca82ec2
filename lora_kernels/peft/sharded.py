"""Parameters that FSDP or ZeRO-3 shards until a layer's forward, and placeholders for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .zero3 import as_gathered, is_gathered_in_call, is_partitioned

FLATTENED = (
    "flattened by FSDP1, want it whole, as inside of "
    "FullyShardedDataParallel.summon_full_params(model)"
)


@contextmanager
def gathered_parameters(model: nn.Module, name: str) -> Iterator[str | None]:
    """Replace the layer's sharded parameters by placeholders with the shapes that its forward sees.

    The placeholders are uninitialized, and take as much memory as the gathered parameters. Yields
    the name of the library or API that shards the parameters, or None.
    """
    path = name.split(".")
    modules = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    sharded: list[tuple[nn.Module, str, Any]] = [
        (module, key, p)
        for module in modules[-1].modules()
        for key, p in module._parameters.items()
        if _is_gathered(modules, p)
    ]
    zero3 = any(is_partitioned(p) for _, _, p in sharded)
    gathered_modules = [module for module in modules if is_gathered_in_call(module)]
    try:
        for module, key, p in sharded:
            shape = p.ds_shape if is_partitioned(p) else p.shape
            placeholder = torch.empty(shape, dtype=p.dtype, device=p.device)
            module._parameters[key] = nn.Parameter(placeholder, requires_grad=p.requires_grad)
        with as_gathered(gathered_modules[0]) if gathered_modules else nullcontext():
            yield "DeepSpeed's ZeRO-3" if zero3 else "FSDP2" if sharded else None
    finally:
        for module, key, p in sharded:
            module._parameters[key] = p
            vars(getattr(module, "quant_state", None) or module).pop("_lora_kernels", None)


def find_ungathered(model: nn.Module) -> str | None:
    """Return the first parameter that ZeRO-3 or FSDP1 shards at present, and how to gather it."""
    for path, module in model.named_modules():
        # The record of FSDP1's wrapper. A bias has one dimension, whole or sharded.
        handle: Any = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is not None and handle.is_sharded(flat):
            return f"{path}.{flat._fqns[0]}".lstrip(".") + f" {FLATTENED}"
        p: Any
        for name, p in module._parameters.items():
            if getattr(p, "_is_flat_param", False):
                return f"{path}.{p._fqns[0]}".lstrip(".") + f" {FLATTENED}"
            if is_partitioned(p) and p.shape != p.ds_shape:
                return (
                    f"{path}.{name} of shape {list(p.shape)}, want {list(p.ds_shape)}: ZeRO-3 "
                    "partitions it outside of deepspeed.zero.GatheredParameters(model.parameters())"
                )
    return None


def is_dtensor(p: object) -> bool:
    """Return True for a DTensor, without importing `torch.distributed.tensor`."""
    return type(p).__name__ == "DTensor"


def _is_gathered(modules: Sequence[nn.Module], p: Any) -> bool:
    """Return True if p is sharded, and the forward of one of the modules gathers it."""
    if is_partitioned(p):
        return any(map(is_gathered_in_call, modules))
    if not is_dtensor(p):
        return False
    from torch.distributed.fsdp import FSDPModule

    *others, last = p.placements
    is_fsdp = last.is_shard() and all(placement.is_replicate() for placement in others)
    return is_fsdp and any(isinstance(module, FSDPModule) for module in modules)
