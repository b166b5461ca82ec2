"""Stand-ins for parameters that FSDP2 or ZeRO-3 shards until a layer's forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .zero3 import as_gathered, is_gathered_in_call, is_partitioned


@contextmanager
def gathered_parameters(model: nn.Module, name: str) -> Iterator[str | None]:
    """Replace the layer's sharded parameters by stand-ins with the shapes that its forward sees.

    The stand-ins have no meaningful values, and as much memory as the layer's forward takes.
    Yields the name of what shards any parameter, or None.
    """
    path = name.split(".")
    modules = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
    stored: list[tuple[nn.Module, str, Any]] = [
        (module, key, p)
        for module in modules[-1].modules()
        for key, p in module._parameters.items()
        if _is_gathered(modules, p)
    ]
    zero3 = any(is_partitioned(p) for _, _, p in stored)
    called = [module for module in modules if is_gathered_in_call(module)]
    try:
        for module, key, p in stored:
            shape = p.ds_shape if is_partitioned(p) else p.shape
            stand_in = torch.empty(shape, dtype=p.dtype, device=p.device)
            module._parameters[key] = nn.Parameter(stand_in, requires_grad=p.requires_grad)
        with as_gathered(called[0]) if called else nullcontext():
            yield "DeepSpeed's ZeRO-3" if zero3 else "FSDP2" if stored else None
    finally:
        for module, key, p in stored:
            module._parameters[key] = p
            vars(getattr(module, "quant_state", None) or module).pop("_lora_kernels", None)


def _is_gathered(modules: Sequence[nn.Module], p: Any) -> bool:
    """Return True if p is sharded, and gathered for the forward of one of the modules."""
    if is_partitioned(p):
        return any(map(is_gathered_in_call, modules))
    if type(p).__name__ != "DTensor":
        return False
    from torch.distributed.fsdp import FSDPModule

    *copies, last = p.placements
    is_fsdp = last.is_shard() and all(each.is_replicate() for each in copies)
    return is_fsdp and any(isinstance(module, FSDPModule) for module in modules)
