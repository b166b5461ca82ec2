"""Comparison of the bytes that a fused layer and PEFT's move on a GPU, counted on meta tensors."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import traffic
from ..backends.decode4bit import bitsandbytes_reason
from .adapters import ALORA, variant_of
from .base import is_conv1d, is_linear4bit
from .linear import peft_class, set_class

ROWS = (1, 512, 8192)  # the numbers of rows of x at which a layer is counted
_PLAIN = ("Parameter", "Params4bit")
_PHASES = ("forward", "training step")
_counted: dict[tuple[object, ...], Counts | str] = {}  # by `_signature` and rows


class Counts(NamedTuple):
    """Bytes of PEFT's layer and of the fused layer, each (forward, training step)."""

    peft: tuple[int, int]
    fused: tuple[int, int]


def excess(layer: Any, fused_class: Any) -> str | None:
    """Return the reason if the fused layer would move more bytes than PEFT's; None if not.

    The forward and the training step are counted at `ROWS` rows of x, once for layers that are
    alike.

    Args:
        layer: PEFT's layer, with its weights on a GPU. It is not called and not changed.
        fused_class: the class that `fuse` would give the layer.
    """
    if not _is_countable(layer):
        return None
    for rows in ROWS:
        counts = _counts(layer, fused_class, rows)
        if isinstance(counts, str):
            return counts
        for phase, fused, peft in zip(_PHASES, counts.fused, counts.peft, strict=True):
            if fused > peft:
                return (
                    f"fused, its {phase} with {_rows(rows)} of x would move {fused / 1e6:.3f} MB, "
                    f"PEFT's own {peft / 1e6:.3f}"
                )
    return None


def _rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def _is_countable(layer: Any) -> bool:
    """Return True if the bytes follow from the layer's shapes and state."""
    if any(type(p).__name__ not in _PLAIN for p in layer.parameters()):
        return False  # a sharded parameter, for one: its size on the GPU is not known yet
    if any(variant_of(layer, name) == ALORA for name in getattr(layer, "lora_variant", ())):
        return False  # they depend on the rows in which it is active
    base = layer.get_base_layer()
    if is_linear4bit(base) and bitsandbytes_reason(base.weight.device) is not None:
        return False  # PyTorch then decodes, and moves more bytes; `explain` gives the reason
    # Any other base layer is called as a module, whose bytes are the same with PEFT.
    return isinstance(base, nn.Linear) or is_conv1d(base)


def _signature(layer: Any) -> tuple[object, ...]:
    """Return a key that is equal for layers with equal traffic, fused or not."""
    base = layer.get_base_layer()
    tensors = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    dropouts = tuple(m.p for m in layer.modules() if isinstance(m, nn.Dropout))
    types = peft_class(layer), type(base), getattr(base, "compute_dtype", None)
    variant, scaling = str(getattr(layer, "lora_variant", "")), str(layer.scaling)
    return *types, tensors, dropouts, tuple(layer.active_adapters), scaling, variant


def _counts(layer: Any, fused_class: Any, rows: int) -> Counts | str:
    """Return the bytes at this number of rows, or why they could not be counted."""
    key = (*_signature(layer), rows)
    if key not in _counted:
        try:
            twin = copy_to_meta(layer)
            set_class(twin, peft_class(layer))
            peft = _count(twin, rows)
            set_class(twin, fused_class)
            _counted[key] = Counts(peft, _count(twin, rows))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            name = type(error).__name__
            _counted[key] = f"its memory traffic could not be counted: {name}: {reason}"
    return _counted[key]


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


def copy_to_meta(layer: nn.Module) -> Any:
    """Return a copy of the layer whose tensors are on meta.

    >>> copy_to_meta(nn.Linear(2, 3)).weight.device
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
