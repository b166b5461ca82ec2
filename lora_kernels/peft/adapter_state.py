"""`adapter_weights`: the tensors of one adapter, whole in each rank, by the keys of PEFT's file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .merge import FSDP1, WRAPPED, is_below_fsdp1, peft_model_in
from .sharded import FLATTENED, find_flattened, is_flattened, whole_parameters


def adapter_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of one adapter, without the base's.

    Use it for engines that take an adapter from memory. The keys and values are those of the file
    that PEFT's `save_pretrained` writes with `save_embedding_layers=False`. The model may be fused
    or not.

    FSDP2, ZeRO-3 or FSDP1 may shard the model. Then all ranks call this function, and each gets the
    whole tensors. It gathers the adapter's modules alone, one at a time. Under FSDP1 it gathers the
    units with a part of an adapter, one at a time.

    Args:
        model: a `PeftModel`, or a module that wraps it, as DDP and FSDP do. Under FSDP1 the
            outermost wrapper.
        adapter_name: the adapter. It may be inactive.

    Returns:
        Tensors that need no gradient, by PEFT's keys. They may be the model's own, so do not write
        to them.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it contains no `PeftModel`, has no adapter of this name, or is below FSDP1's
            outermost wrapper.

    >>> from peft import LoraConfig, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 4))
    >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    >>> {key: tuple(t.shape) for key, t in adapter_weights(model).items()}
    {'base_model.model.0.lora_A.weight': (2, 8), 'base_model.model.0.lora_B.weight': (4, 2)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    peft_model = peft_model_in(model)
    if peft_model is None:
        raise ValueError(
            f"model: got {type(model).__name__}, want a peft.PeftModel, or a module that wraps it"
        )
    configs: Mapping[str, Any] = peft_model.peft_config
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, want one of {list(configs)}")
    flattened = find_flattened(model)
    if flattened is not None and is_below_fsdp1(model):
        raise ValueError(f"model: got {flattened}")
    for part, path in _adapter_parts(peft_model).items() if flattened is None else ():
        is_matrix = ".lora_A" in path or ".lora_embedding_A" in path
        if is_matrix and any(is_flattened(part, name) for name in part._parameters):
            # A model below FSDP1's outermost wrapper has no record of its state.
            raise ValueError(f"model: got {path} {FLATTENED}")
    return _entries(model, peft_model, adapter_name, flattened is not None)


def adapter_keys(peft_model: PeftModel, adapter_name: str) -> list[str]:
    """Return the keys of `adapter_weights`. The ranks do not communicate."""
    return list(_entries(peft_model, peft_model, adapter_name, False, gathers=False))


def _entries(
    model: nn.Module,
    peft_model: PeftModel,
    adapter_name: str,
    is_flattened: bool,
    gathers: bool = True,
) -> dict[str, Tensor]:
    parts = _adapter_parts(peft_model)
    biased: dict[nn.Module, str] = {}  # modules of the base, with biases that the adapter trains
    config: Any = peft_model.peft_config[adapter_name]
    if getattr(config, "bias", "none") != "none":
        named = peft_model.named_modules()
        has_bias = {m: path for path, m in named if isinstance(getattr(m, "bias", None), Tensor)}
        biased = {m: path for m, path in has_bias.items() if m not in parts}
    found: dict[str, Tensor] = {}
    module: Any
    for unit, modules in _by_unit(model, biased | parts, is_flattened):
        with nullcontext() if unit is None else _summoned(unit):
            for module in modules:
                entries: dict[str, Any] = {}
                with whole_parameters([module]) if gathers else nullcontext():
                    if module in biased:
                        entries[f"{biased[module]}.bias"] = module.bias.detach()
                    else:
                        module._save_to_state_dict(entries, f"{parts[module]}.", keep_vars=False)
                if not gathers:
                    entries = {k: torch.empty(0) for k in entries}
                # A unit's memory is freed when it is sharded again.
                found |= entries if unit is None else {k: t.clone() for k, t in entries.items()}
    entries = get_peft_model_state_dict(
        peft_model, found, adapter_name, save_embedding_layers=False
    )
    for path, wrapper in peft_model.named_modules():
        # PEFT reads their keys off the modules, where FSDP1's views are none.
        if isinstance(wrapper, ModulesToSaveWrapper):
            inner = f"{path}.modules_to_save.{adapter_name}."
            of_wrapper = {k.removeprefix(inner): k for k in found if k.startswith(inner)}
            entries |= {f"{path}.{k}": found[key] for k, key in of_wrapper.items()}
    return {_unwrapped(key): t for key, t in entries.items()}


def _adapter_parts(peft_model: PeftModel) -> dict[nn.Module, str]:
    """Return each module of an adapter -> its path.

    The path is that of PEFT's layer, wrappers included, by which PEFT finds the keys, and then that
    in the state dict, which has no wrappers.
    """
    parts: dict[nn.Module, str] = {}
    for path, layer in peft_model.named_modules():
        is_wrapper = isinstance(layer, AuxiliaryTrainingWrapper)
        if not (is_wrapper or isinstance(layer, BaseTunerLayer)):
            continue
        frozen = "original_module" if is_wrapper else "base_layer"
        for name, module in layer.named_modules():
            if name.split(".")[0] != frozen:
                parts.setdefault(module, f"{path}.{_unwrapped(name)}".rstrip("."))
    return parts


def _by_unit(
    model: nn.Module, modules: Iterable[nn.Module], is_flattened: bool
) -> list[tuple[nn.Module | None, list[nn.Module]]]:
    """Return FSDP1's units, the outermost first, and the ones of `modules` in each."""
    if not is_flattened:
        return [(None, list(modules))]
    units = [module for module in model.modules() if type(module).__name__ == FSDP1]
    nearest = {module: unit for unit in units for module in unit.modules()}
    members: dict[nn.Module, list[nn.Module]] = {unit: [] for unit in units}
    for module in modules:
        members[nearest[module]].append(module)
    # Summoning the outermost unit first lets FSDP1 know that it is the outermost.
    return [(unit, members[unit]) for unit in units if members[unit] or unit is model]


def _summoned(unit: nn.Module) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False)


def _unwrapped(path: str) -> str:
    """Return a module's path or key without FSDP1's and checkpointing's wrappers."""
    return ".".join(part for part in path.split(".") if part not in WRAPPED)
