"""`row_adapters`: batches in which each row has its own adapter, in training too."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._C import _get_obj_in_tls, _is_key_in_tls, _stash_obj_in_tls

from .base import missing_layers

BASE = "__base__"  # PEFT's name for no adapter
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' attribute of checkpointed modules
logger = logging.getLogger("lora_kernels")


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the model with one adapter for each row of the batch, in training and in evaluation.

    PEFT's forward takes `adapter_names` in evaluation alone. In this context each LoRA layer gets
    the names. Fused layers then make one call of `multi_lora_linear`, with one base GEMM for all
    rows. An adapter gets gradients from its own rows alone, and None if no row names it. Layers
    that are not fused run PEFT's forward for mixed batches.

    The context applies to the calling thread alone. Other threads may call the model at the same
    time, with other names or without. PEFT's own `adapter_names` argument is not thread-safe.

    `backward` may be called after the context, because layers that transformers checkpoints are
    recomputed with the adapters of their forward. If the model itself calls
    `torch.utils.checkpoint`, call `backward` within the context.

    Args:
        model: a PEFT model, fused or not. Several of its adapters may train at once:
            `model.set_requires_grad(["law", "code"])`.
        names: an adapter for each row of the batch (dimension 0 of the model's inputs), "__base__"
            for none.

    Raises:
        TypeError: `model` is not a module, or `names` not a sequence of strings.
        RuntimeError: `torch.nn.DataParallel` calls the model.
        ValueError: `model` has no LoRA layer, AdaLoRA layers or merged adapters; no layer has an
            adapter of that name; the batch has another number of rows; a layer's variant of LoRA,
            such as DoRA, has no mixed batches in PEFT.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lora_kernels.peft import fuse
    >>> config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="law")
    >>> model.add_adapter("code", config)
    >>> model.set_requires_grad(["law", "code"])
    >>> with row_adapters(fuse(model), ["law", "code", "__base__"]):
    ...     model(torch.ones(3, 8)).sum().backward()
    """
    rows = _Rows(_check_names(model, names))
    with _patch_checkpoints(model), rows.add_hooks(model):
        yield


_KEY = "lora_kernels.row_adapters"


def _current_rows() -> _Rows | None:
    """Return the rows of this thread's innermost context.

    PyTorch passes this kind of thread-local object on to the threads of a backward. On a GPU those
    threads recompute models that call `torch.utils.checkpoint` themselves.
    """
    return _get_obj_in_tls(_KEY) if _is_key_in_tls(_KEY) else None


class _Rows:
    """The adapters of the rows, which hooks add to the arguments of a module's LoRA layers."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    @contextmanager
    def add_hooks(self, module: nn.Module) -> Iterator[None]:
        """Add the names to the arguments of the module's layers, in this thread's calls."""
        outer_rows = _current_rows()
        if outer_rows is self:  # the forward's context has added the hooks
            yield
            return
        layers = (LoraLayer, AuxiliaryTrainingWrapper)
        handles = [
            layer.register_forward_pre_hook(self._add, with_kwargs=True)
            for layer in module.modules()
            if isinstance(layer, layers)
        ]
        _stash_obj_in_tls(_KEY, self)
        try:
            yield
        finally:
            _stash_obj_in_tls(_KEY, outer_rows)
            for handle in handles:
                handle.remove()

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        # A hook that another thread is removing gets no kwargs.
        if torch.compiler.is_compiling():
            return args, (kwargs or {}) | {"adapter_names": self.names}
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "row_adapters: got a replica of DataParallel, whose batch is a part of the rows, "
                "want one device, or DistributedDataParallel with each process's own names"
            )
        if kwargs is None or _current_rows() is not self:
            return None
        return args, kwargs | {"adapter_names": self.names}


class _RowCheckpoint:
    """A wrapper of transformers' checkpoint function that recomputes with the forward's rows.

    users: the number of open contexts of all threads. The last one restores the function.
    """

    def __init__(self, checkpoint: Callable[..., Any], module: nn.Module) -> None:
        self.checkpoint, self.module, self.users = checkpoint, module, 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = _current_rows()
        if rows is None:
            return self.checkpoint(function, *args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with rows.add_hooks(self.module):
                return function(*args, **kwargs)

        return self.checkpoint(call, *args, **kwargs)


_lock = threading.Lock()


@contextmanager
def _patch_checkpoints(model: nn.Module) -> Iterator[None]:
    """Make transformers' checkpointing recompute each layer with the rows of its forward."""
    checkpoints: list[_RowCheckpoint] = []
    with _lock:
        for module in model.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if checkpoint is None:
                continue
            if not isinstance(checkpoint, _RowCheckpoint):
                checkpoint = _RowCheckpoint(checkpoint, module)
                setattr(module, _CHECKPOINT, checkpoint)
            checkpoint.users += 1
            checkpoints.append(checkpoint)
    try:
        yield
    finally:
        with _lock:
            for row_checkpoint in checkpoints:
                row_checkpoint.users -= 1
                if (
                    not row_checkpoint.users
                    and vars(row_checkpoint.module).get(_CHECKPOINT) is row_checkpoint
                ):
                    setattr(row_checkpoint.module, _CHECKPOINT, row_checkpoint.checkpoint)


def _check_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names as a list; raise an error if the model's layers cannot take them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise missing_layers(model, "peft.get_peft_model(model, config) adds them")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: got {names!r}, want a sequence of strings, one for each row")
    if any(isinstance(layer, SVDLinear) for layer in layers):
        raise ValueError("model: got AdaLoRA layers, want LoRA layers: PEFT has no mixed batches")
    if any(layer.merged for layer in layers):
        raise ValueError("model: got merged adapters, want none: model.unmerge_adapter()")
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    unknown = [name for name in names if name != BASE and name not in known]
    if unknown:
        want = ", ".join(map(repr, [*sorted(known), BASE]))
        raise ValueError(f"names: got {unknown[0]!r}, want one of {want}")
    if model.training:
        for name in sorted(set(names) - {BASE}):
            if not any(p.requires_grad for layer in layers for p in _parameters(layer, name)):
                _warn_frozen(name)
    return list(names)


def _parameters(layer: Any, name: str) -> Iterator[nn.Parameter]:
    for kind in ("lora_A", "lora_B"):
        if name in getattr(layer, kind):
            yield from getattr(layer, kind)[name].parameters()
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        if name in getattr(layer, kind):
            yield getattr(layer, kind)[name]


@functools.cache
def _warn_frozen(name: str) -> None:
    logger.warning(
        "row_adapters: adapter %r is frozen and will not train: model.set_requires_grad([%r]) "
        "before the optimizer is made",
        name,
        name,
    )
