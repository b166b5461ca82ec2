"""`row_adapters`: batches whose rows have an adapter each, in training."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"  # PEFT's name for no adapter
_CHECKPOINT = "_gradient_checkpointing_func"  # transformers', of modules that checkpoint
logger = logging.getLogger("lora_kernels")


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the model with one adapter for each row of the batch, in training and in evaluation.

    PEFT's forward takes `adapter_names` in evaluation alone. In this context each LoRA layer gets
    them. Fused layers then make one call of `multi_lora_linear`, with one base GEMM for all rows.
    An adapter gets its gradients from its own rows alone; an adapter without rows gets zeros, or
    None from layers that are PEFT's. Layers that are not fused run PEFT's forward for mixed
    batches.

    `backward` may be called after the context: layers that transformers checkpoints are recomputed
    with the adapters of their forward. If the model calls `torch.utils.checkpoint` by itself, call
    `backward` within.

    Args:
        model: a PEFT model, fused or not. Several of its adapters may train at once:
            `model.set_requires_grad(["law", "code"])`.
        names: an adapter for each row of the batch (dimension 0 of the model's inputs), "__base__"
            for none.

    Raises:
        TypeError: `model` is not a module, or `names` not a sequence of strings.
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
    rows = _Rows(_checked(model, names))
    checkpointed = [module for module in model.modules() if _CHECKPOINT in vars(module)]
    before = [vars(module)[_CHECKPOINT] for module in checkpointed]
    for module, checkpoint in zip(checkpointed, before, strict=True):
        setattr(module, _CHECKPOINT, rows.kept_by(checkpoint, module))
    try:
        with rows.added_to(model):
            yield
    finally:
        for module, checkpoint in zip(checkpointed, before, strict=True):
            setattr(module, _CHECKPOINT, checkpoint)


class _Rows:
    """The adapters of the rows, which hooks add to the arguments of a module's LoRA layers."""

    def __init__(self, names: list[str]) -> None:
        self.names, self._is_on = names, False

    @contextmanager
    def added_to(self, module: nn.Module) -> Iterator[None]:
        """Add the names in all layers within the module, unless they are being added."""
        if self._is_on:
            yield
            return
        layers = (LoraLayer, AuxiliaryTrainingWrapper)
        handles = [
            layer.register_forward_pre_hook(self._add, with_kwargs=True)
            for layer in module.modules()
            if isinstance(layer, layers)
        ]
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            for handle in handles:
                handle.remove()

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"adapter_names": self.names}

    def kept_by(self, checkpoint: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        """Return transformers' function by which the module checkpoints, which keeps the names."""

        @functools.wraps(checkpoint)
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.added_to(module):
                    return function(*args, **kwargs)

            return checkpoint(call, *args, **kwargs)

        return run


def _checked(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names as a list, if the model's layers can take them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without LoRA layers, want a PEFT model: "
            "peft.get_peft_model(model, config) adds them"
        )
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
                _warn(name)
    return list(names)


def _parameters(layer: Any, name: str) -> Iterator[nn.Parameter]:
    for kind in ("lora_A", "lora_B"):
        if name in getattr(layer, kind):
            yield from getattr(layer, kind)[name].parameters()
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        if name in getattr(layer, kind):
            yield getattr(layer, kind)[name]


@functools.cache
def _warn(name: str) -> None:
    logger.warning(
        "row_adapters: adapter %r is frozen and will not train: model.set_requires_grad([%r]) "
        "before the optimizer is made",
        name,
        name,
    )
