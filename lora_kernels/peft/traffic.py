"""Comparison of the bytes that a fused layer and PEFT's move on a GPU, counted on meta tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import traffic
from .base import is_conv1d, is_linear4bit

ROWS = (1, 512, 8192)  # of x, at which a layer is counted
_PLAIN = ("Parameter", "Params4bit")
_counted: dict[tuple[object, ...], str | None] = {}  # by what decides the traffic


def excess(layer: Any, set_class: Callable[[Any], None]) -> str | None:
    """Return why PEFT's layer stays as it is: the fused one would move more bytes; None if not.

    Args:
        layer: PEFT's, with its weights on a GPU. It is not called and not changed.
        set_class: makes a copy of the layer, on meta, the fused one.

    The forward and the training step are counted at `ROWS` rows of x, once for layers that are
    alike.
    """
    if any(type(p).__name__ not in _PLAIN for p in layer.parameters()):
        return None  # sharded, for one: what lies on the card is not known yet
    key = _signature(layer)
    if key not in _counted:
        _counted[key] = _excess(layer, set_class)
    return _counted[key]


def _signature(layer: Any) -> tuple[object, ...]:
    """Return a key that is equal for layers with equal traffic."""
    base = layer.get_base_layer()
    tensors = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    dropouts = tuple(m.p for m in layer.modules() if isinstance(m, nn.Dropout))
    types = type(layer), type(base), getattr(base, "compute_dtype", None)
    variant, scaling = str(getattr(layer, "lora_variant", "")), str(layer.scaling)
    return *types, tensors, dropouts, tuple(layer.active_adapters), scaling, variant


def _excess(layer: Any, set_class: Callable[[Any], None]) -> str | None:
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        return None  # `fuse` computes the adapter alone there, and calls the base layer
    if is_linear4bit(base):
        from ..quantization import bitsandbytes

        if bitsandbytes.check(base.weight.device) is not None:
            return None  # PyTorch decodes correctly, if in more bytes; `explain` gives the reason
        bitsandbytes.check(torch.device("meta"))
    try:
        twin = on_meta(layer)
        peft = [_count(twin, rows) for rows in ROWS]
        set_class(twin)
        ours = [_count(twin, rows) for rows in ROWS]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        return f"its memory traffic could not be counted: {type(error).__name__}: {reason}"
    for rows, mine, theirs in zip(ROWS, ours, peft, strict=True):
        for what, a, b in zip(("forward", "training step"), mine, theirs, strict=True):
            if a > b:
                return (
                    f"fused, its {what} with {rows} row{'s' * (rows > 1)} of x would move "
                    f"{a / 1e6:.3f} MB, PEFT's own {b / 1e6:.3f}"
                )
    return None


def _count(layer: Any, rows: int) -> tuple[int, int]:
    """Return the bytes of the forward and of the training step, which includes the forward."""
    base = layer.get_base_layer()
    trained = [p for name, p in layer.named_parameters() if name.startswith("lora_")]
    for p in trained:
        p.requires_grad_()
    dtype = base.weight.dtype
    if not dtype.is_floating_point or is_linear4bit(base):
        dtype = base.compute_dtype or torch.bfloat16
    columns = base.weight.shape[0] if is_conv1d(base) else base.in_features
    x = torch.empty(rows, columns, dtype=dtype, device="meta", requires_grad=True)
    layer.train()
    forward, backward = traffic.count_layer(lambda: layer(x), [x, *trained])
    return forward.bytes, forward.bytes + backward.bytes


def on_meta(layer: nn.Module) -> Any:
    """Return a copy of the layer whose tensors are on meta.

    >>> on_meta(nn.Linear(2, 3)).weight.device
    device(type='meta')
    """
    memo: dict[int, Any] = {}
    for module in layer.modules():
        for p in module.parameters(recurse=False):
            memo[id(p)] = _parameter_on_meta(p)
            state = getattr(p, "quant_state", None)
            if state is not None:
                memo[id(state)] = memo[id(p)].quant_state
        for b in module.buffers(recurse=False):
            memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(layer, memo)


def _parameter_on_meta(p: Any) -> Any:
    empty = torch.empty_like(p.data, device="meta")
    if not hasattr(p, "quant_state"):
        return nn.Parameter(empty, requires_grad=p.requires_grad)
    fields = {**p.__dict__, "quant_state": _state_on_meta(p.quant_state)}
    twin = empty.as_subclass(type(p))
    twin.__dict__.update(fields)
    return twin


def _state_on_meta(state: Any) -> Any:
    """Return a copy of bitsandbytes' QuantState on meta."""
    twin = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(twin, name, torch.empty_like(value, device="meta"))
    if state.nested:
        twin.state2 = _state_on_meta(state.state2)
    return twin
