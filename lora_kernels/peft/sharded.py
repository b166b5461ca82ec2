"""A layer's parameters as its forward will see them, where FSDP2 shards them until then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def as_in_forward(model: nn.Module, name: str) -> Iterator[bool]:
    """Has the layer's parameters that FSDP2 shards as its forward will see them, plain and whole,
    but for their values. Yields whether there are any."""
    path = name.split(".")
    modules = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    stored: list[tuple[nn.Module, str, Any]] = [
        (module, key, p)
        for module in modules[-1].modules()
        for key, p in module._parameters.items()
        if type(p).__name__ == "DTensor" and _gathered(modules, p)
    ]
    try:
        for module, key, p in stored:
            module._parameters[key] = nn.Parameter(_whole(p), requires_grad=p.requires_grad)
        yield bool(stored)
    finally:
        for module, key, p in stored:
            module._parameters[key] = p
            vars(getattr(module, "quant_state", None) or module).pop("_lora_kernels", None)


def _whole(p: Any) -> Tensor:
    """As p in all but values. No memory but for codes, whose bytes are looked at as they lie."""
    if p.is_floating_point():
        return torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _gathered(modules: Sequence[nn.Module], p: Any) -> bool:
    """Whether one of the modules is FSDP2's, and sharding there is all that was done to p."""
    from torch.distributed.fsdp import FSDPModule

    *copies, last = p.placements
    alone = last.is_shard() and all(each.is_replicate() for each in copies)
    return alone and any(isinstance(module, FSDPModule) for module in modules)
