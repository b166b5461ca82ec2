"""A watch over processes that train one adapter together: whether all have the same values."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from ..peft.adapter_state import adapter_keys
from ..peft.merge import peft_model_in
from ..peft.sharded import is_dtensor, is_flattened
from ..peft.zero3 import is_partitioned

ACTIONS = ("warn", "raise")
MAX_NAMES = 3  # number of tensors that a message names
GRADIENT_STEPS = 2  # a warm-up's first rate is 0, and dA is 0 while B is

# The dimensions of a device mesh along which each rank has the same parameters, or a shard of them.
_DATA_PARALLEL = {"dp", "dp_replicate", "dp_shard", "dp_shard_cp", "dp_cp", "fsdp", "cp", "sp"}

logger = logging.getLogger("lora_kernels")


def check_action(action: Any) -> None:
    """Raise ValueError unless `differing_ranks` is a valid argument of `FuseCallback`."""
    if action is not None and action not in ACTIONS:
        want = " or ".join(map(repr, ACTIONS))
        raise ValueError(f"differing_ranks: got {action!r}, want {want}, or None for no comparison")


class RankWatch:
    """Compare what the ranks of a data-parallel group hold, at few moments of a training.

    A tensor is compared if it trains and each rank has a copy: not what FSDP, ZeRO-3, tensor or
    expert parallelism shards, and not the tensors that one rank alone has. The ranks gather a hash
    of each tensor's bytes.

    Args:
        action: "warn" once for each kind of fault, "raise" RuntimeError in all ranks, or None.
    """

    def __init__(self, action: str | None = "warn") -> None:
        check_action(action)
        self.action = action
        self._warned: set[str] = set()
        self._initial: dict[str, bytes] = {}  # name -> digest when the training began
        self._steps = 0

    def compare_initial(self, model: nn.Module, args: Any) -> None:
        """Compare the adapters before DDP's broadcast or FSDP2's sharding hides a difference."""
        if self._is_on() and (found := self._differing(model, args, _digests(_copies(model)))):
            self._say(
                "initial",
                f"the ranks begin with different values of {found}. DDP takes rank 0's, and FSDP2 "
                "a part of each: call transformers.set_seed(seed) before get_peft_model",
            )

    def begin(self, model: nn.Module) -> None:
        """Note the values with which the training begins. The ranks do not communicate."""
        self._steps = 0
        self._initial = _digests(_own(model)) if self._is_on() else {}

    def compare_gradients(self, model: nn.Module, args: Any) -> None:
        """Compare the gradients before each of the first optimizer steps."""
        self._steps += 1
        if not self._is_on() or self._steps > GRADIENT_STEPS:
            return
        gradients = {name: p.grad for name, p in _copies(model).items()}
        if found := self._differing(model, args, _digests(gradients)):
            self._say(
                "gradients",
                f"the ranks have different gradients of {found}, before optimizer step "
                f"{self._steps}: nothing averages them, so each rank trains an adapter of its own",
            )

    def compare_saved(self, model: nn.Module, args: Any, folder: Path) -> None:
        """Compare the parameters with each other's and with the saved file's keys."""
        if not self._is_on():
            return
        current = _digests(_own(model))
        copies = {name: current[name] for name in _copies(model)}
        if found := self._differing(model, args, copies):
            self._say("saved", f"the ranks hold different values of {found}: rank 0's are saved")
        is_trained: dict[str, bool] = {}
        for name in current.keys() & self._initial.keys():
            layer = _layer_of(name)
            is_changed = current[name] != self._initial[name]
            is_trained[layer] = is_trained.get(layer, False) or is_changed
        everyone = _gather((is_trained, _missing_keys(model, folder) if _rank() == 0 else []))
        if missing := [key for _, keys in everyone for key in keys]:
            self._say("file", f"{folder} lacks {_names(missing)}")
        layers = {layer for of_rank, _ in everyone for layer in of_rank}
        trained = {layer for of_rank, _ in everyone for layer, is_ in of_rank.items() if is_}
        if trained and trained != layers:
            untrained = _names(sorted(layers - trained))
            self._say("untrained", f"no rank has changed {untrained} since the training began")

    def _is_on(self) -> bool:
        is_distributed = dist.is_available() and dist.is_initialized()
        return self.action is not None and is_distributed and dist.get_world_size() > 1

    def _differing(self, model: nn.Module, args: Any, digests: Mapping[str, bytes]) -> str:
        """Return the names and ranks of the tensors whose digests differ; "" if none do."""
        everyone = _gather((_group_of(model, args), digests))
        differences = []
        for group in dict.fromkeys(key for key, _ in everyone):
            by_name: dict[str, dict[bytes, list[int]]] = {}
            for rank, (key, of_rank) in enumerate(everyone):
                for name, digest in of_rank.items() if key == group else ():
                    by_name.setdefault(name, {}).setdefault(digest, []).append(rank)
            differences += [(name, ranks) for name, ranks in by_name.items() if len(ranks) > 1]
        if not differences:
            return ""
        ranks = " and ".join(f"{_ranks(ranks)}" for ranks in differences[0][1].values())
        return f"{_names([name for name, _ in differences])} (ranks {ranks})"

    def _say(self, kind: str, text: str) -> None:
        if self.action == "raise":
            raise RuntimeError(text)
        if kind not in self._warned and _rank() == 0:
            logger.warning(text)
        self._warned.add(kind)


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, of which this rank holds the whole, by name."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    sharded: set[int] = set()
    for layer in layers:
        if any(is_flattened(m, "weight") for m in layer.modules() if type(m) is nn.Linear):
            return {}  # FSDP1 shards all
        base = layer.get_base_layer()
        if any(map(is_dtensor, layer.parameters())) or getattr(base, "_hf_tp_plan", None):
            sharded.update(map(id, layer.parameters()))  # tensor or expert parallel
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in sharded and _is_whole(p)
    }


def _is_whole(p: Any) -> bool:
    is_flat = getattr(p, "_is_flat_param", False)
    return not (is_dtensor(p) or is_partitioned(p) or is_flat or p.is_meta)


def _copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return those parameters of `_own` that are the same in all ranks of a group."""
    # DeepSpeed's mark of an expert that one rank holds.
    return {name: p for name, p in _own(model).items() if getattr(p, "allreduce", True)}


def _digests(tensors: Mapping[str, Tensor | None]) -> dict[str, bytes]:
    return {name: b"" if t is None else _digest(t) for name, t in tensors.items()}


def _digest(t: Tensor) -> bytes:
    """Return a hash of the shape, dtype and bytes."""
    values = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.blake2b(f"{tuple(t.shape)} {t.dtype}".encode(), digest_size=16)
    found.update(values.numpy().data)
    return found.digest()


def _group_of(model: Any, args: Any) -> Any:
    """Return this rank's place in the dimensions of the mesh that are not data parallel."""
    of_accelerate = getattr(getattr(args, "parallelism_config", None), "device_mesh", None)
    for mesh in (of_accelerate, getattr(model, "_device_mesh", None)):
        if mesh is not None and mesh.mesh_dim_names:
            places = zip(mesh.mesh_dim_names, mesh.get_coordinate() or (), strict=False)
            return tuple(place for place in places if place[0] not in _DATA_PARALLEL)
    return ()


def _gather(entry: Any) -> list[Any]:
    """Return each rank's entry."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, entry)
    return everyone


def _rank() -> int:
    return dist.get_rank()


def _layer_of(name: str) -> str:
    """Return the adapted layer's name, of a parameter's; a module's without an adapter."""
    for mark in (".lora_", ".modules_to_save."):
        if mark in name:
            return name[: name.rindex(mark)]
    return name.rpartition(".")[0]


def _missing_keys(model: nn.Module, folder: Path) -> list[str]:
    """Return the keys of adapters that PEFT's files in the folder lack, or have without a value."""
    peft_model = peft_model_in(model)
    if peft_model is None:
        return []
    missing: list[str] = []
    for adapter in peft_model.peft_config:
        file = (folder if adapter == "default" else folder / adapter) / "adapter_model.safetensors"
        if not file.exists():
            continue
        with safe_open(file, "pt") as opened:
            saved = set(opened.keys())
            empty = {key for key in saved if not math.prod(opened.get_slice(key).get_shape())}
        missing += [key for key in adapter_keys(peft_model, adapter) if key not in saved - empty]
    return missing


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
