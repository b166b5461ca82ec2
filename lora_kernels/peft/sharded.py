"""Parameters that FSDP or ZeRO-3 shards until a layer's forward: placeholders, and whole ones."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .modules import is_linear4bit
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


@contextmanager
def whole_parameters(
    modules: Iterable[nn.Module], written: Collection[tuple[nn.Module, str]] = ()
) -> Iterator[None]:
    """Give each rank the whole parameters of the modules that FSDP2, or ZeRO-3, shards.

    All ranks have to enter in the same order, because they communicate.

    Args:
        modules: whose own parameters are gathered, and not those of their children.
        written: (module, name) of the parameters that may be written to or replaced inside. Each
            rank keeps its shard of their values. Other writes are lost, and so are all writes if
            an exception leaves the context.
    """
    slots = [(m, n, p) for m in modules for n, p in m._parameters.items() if p is not None]
    dtensors = [(m, n, p) for m, n, p in slots if is_dtensor(p)]
    partitioned = {id(p): (m, n, p) for m, n, p in slots if is_absent(p)}
    kept = {id(m._parameters[n]) for m, n in written}
    states = {m: m.quant_state for m, n, _ in dtensors if _is_4bit(m, n)}
    with ExitStack() as stack:
        for is_kept in (False, True) if partitioned else ():
            given = [entry for key, entry in partitioned.items() if (key in kept) is is_kept]
            if given:
                from deepspeed.runtime.zero import GatheredParameters

                rank = 0 if is_kept else None
                stack.enter_context(GatheredParameters([p for _, _, p in given], rank))
                if is_kept:
                    stack.callback(_put_back, [(*entry, dict(vars(entry[2]))) for entry in given])
        wholes: dict[int, Any] = {}
        is_complete = False
        try:
            for m, n, p in dtensors:
                if id(p) not in wholes:  # tied parameters stay tied
                    wholes[id(p)] = _whole_parameter(m, n, p)
                m._parameters[n] = wholes[id(p)]
            wholes.clear()
            yield
            is_complete = True
        finally:
            for m, n, p in dtensors:
                current: Any = m._parameters[n]
                m._parameters[n] = p
                is_written = is_complete and id(p) in kept
                if is_written:
                    _write_shard(p, current.detach())
                if n == "weight" and m in states:
                    vars(m)["quant_state"] = current.quant_state if is_written else states[m]


def is_sharded(layer: nn.Module) -> bool:
    """Return True if FSDP2 or ZeRO-3 shards a parameter of the layer at present."""
    return any(map(is_sharded_parameter, layer.parameters()))


def is_sharded_parameter(p: Any) -> bool:
    """Return True if FSDP2 or ZeRO-3 shards p at present."""
    return is_dtensor(p) or is_absent(p)


def is_absent(p: Any) -> bool:
    """Return True if ZeRO-3 partitions p, and it is not gathered at present."""
    return is_partitioned(p) and p.shape != p.ds_shape


def local_part(p: Any) -> Any:
    """Return the part of p that this rank stores: p itself, unless FSDP2 or ZeRO-3 shards it."""
    if is_absent(p):
        return p.ds_tensor
    return p.to_local() if is_dtensor(p) else p


def is_flattened(module: nn.Module, name: str) -> bool:
    """Return True if FSDP1 shards the module's matrix of this name at present."""
    p: Any = module._parameters.get(name)
    if p is None:  # a view of the flat parameter, or of no memory
        return isinstance(vars(module).get(name), Tensor)
    return type(p) is nn.Parameter and p.dim() < 2 and not is_partitioned(p)


def is_sharded_4bit(module: nn.Module, name: str) -> bool:
    """Return True for the codes of bitsandbytes' 4-bit layer, sharded by FSDP2.

    Their scales are those of the layer's `quant_state`, whole in each rank.
    """
    return is_dtensor(module._parameters[name]) and _is_4bit(module, name)


def _is_4bit(module: nn.Module, name: str) -> bool:
    has_state = getattr(module, "quant_state", None) is not None
    return name == "weight" and is_linear4bit(module) and has_state


def _whole_parameter(module: Any, name: str, p: Any) -> Any:
    t: Tensor = p.full_tensor().detach()
    if not _is_4bit(module, name):
        return nn.Parameter(t, requires_grad=p.requires_grad)
    from bitsandbytes.nn.modules import Params4bit

    state = module.quant_state
    return Params4bit(
        t.as_subclass(Tensor),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=t.dtype,
        module=module,
        bnb_quantized=True,
    )


def _write_shard(p: Any, t: Tensor) -> None:
    """Copy this rank's shard of t [whole shape] to the DTensor p."""
    from torch.distributed.tensor import distribute_tensor

    shard = distribute_tensor(
        t.as_subclass(Tensor), p.device_mesh, p.placements, src_data_rank=None
    )
    with torch.no_grad():
        p.to_local().copy_(shard.to_local())


def _put_back(entries: Iterable[tuple[nn.Module, str, Any, dict[str, Any]]]) -> None:
    """Give modules ZeRO-3's parameters again, with the values of those that replaced them."""
    for module, name, p, attributes in entries:
        current: Any = module._parameters[name]
        if current is p:
            continue
        p.data = current.detach().as_subclass(Tensor)
        vars(p).clear()
        vars(p).update(attributes)
        if hasattr(current, "quant_state"):
            p.quant_state = current.quant_state  # bitsandbytes gave it to the module
        module._parameters[name] = p


def find_flattened(model: nn.Module) -> str | None:
    """Return the first parameter that FSDP1 shards at present, and how to gather it."""
    for path, module in model.named_modules():
        # The record of FSDP1's wrapper. A bias has one dimension, whole or sharded.
        handle: Any = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is not None and handle.is_sharded(flat):
            return f"{path}.{flat._fqns[0]}".lstrip(".") + f" {FLATTENED}"
        p: Any
        for p in module._parameters.values():
            if getattr(p, "_is_flat_param", False):
                return f"{path}.{p._fqns[0]}".lstrip(".") + f" {FLATTENED}"
    return None


def is_gathered_by_forward(model: nn.Module, name: str) -> bool:
    """Return True if FSDP2 or ZeRO-3 gathers the parameter of this name for a forward."""
    path, _, key = name.rpartition(".")
    parts = path.split(".") if path else []
    modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    return _is_gathered(modules, modules[-1]._parameters[key])


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps gathered after a forward, such as the outermost's."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def is_dtensor(p: object) -> bool:
    """Return True for a DTensor, without importing `torch.distributed.tensor`."""
    return type(p).__name__ == "DTensor"


def parallel_reason(*tensors: Any) -> str | None:
    """Return the kind of parallelism, in words, that shards one of a layer's tensors in its call.

    FSDP2's are whole in the call, and `gathered_parameters` replaces them.
    """
    for p in tensors:
        if is_dtensor(p):
            is_experts = p.dim() == 3 and p.placements[-1].is_shard(0)
            kind = "expert" if is_experts else "tensor"
            return f"{kind} parallel: its weight is sharded over devices"
    return None


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
