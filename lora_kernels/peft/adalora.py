"""PEFT's AdaLoRA layer with `lora_linear` as its forward: E, scaled, is the gate on the ranks.

`forward` and `explain` ask the same functions, as in `linear`. The budget, the masks on E, the
orthogonality's loss and the files are PEFT's own: they read parameters and call no layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from .linear import (
    Call,
    Fused,
    _lora_linear,
    dropout_p,
    dropout_reason,
    groups,
    is_linear4bit,
    readable_weight,
    state_reason,
    tensor_reason,
    unreadable,
)


class FusedSVD(Fused):
    """What `fuse` puts before an AdaLoRA layer's class.

    y = x·Wᵀ + bias + Σ ((D(x)·Aᵀ) ⊙ E·s/(ranknum + 1e-5))·Bᵀ, with dropout, stacked adapters and
    dtypes as in `Fused`. The gradients of E, and of ranknum where PEFT trains it, come through the
    gate.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = adapters_of(self)
        if peft_reason(self, adapters, x.device, x.dtype) is not None:
            return cast(Tensor, super(Fused, self).forward(x, *args, **kwargs))
        base = cast(nn.Module, self._modules["base_layer"])
        todo = calls(adapters, x.device.type, x.numel() // x.shape[-1])
        if args or kwargs or unreadable(base, x.device) is not None:
            y: Tensor = base(x, *args, **kwargs)
            dtype = y.dtype
        else:
            weight, compute_dtype = readable_weight(base, x)
            y = _lora_linear(x, weight, base._parameters["bias"], todo.pop(0), compute_dtype)
            # bitsandbytes returns x's, under autocast too.
            dtype = x.dtype if is_linear4bit(base) else y.dtype
        for call in todo:
            y = y + _lora_linear(x, None, None, call)
        return y if y.dtype is dtype else y.to(dtype)


class FusedSVDLinear(FusedSVD, SVDLinear):
    """PEFT's general AdaLoRA layer, over `nn.Linear` or a base that we call as a module."""


class Adapter(NamedTuple):
    name: str
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    lora_E: Tensor  # [R, 1]
    ranknum: Tensor  # [1]
    scaling: float | Tensor
    dropout: nn.Module


def adapters_of(layer: Any) -> list[Adapter]:
    """The active adapters, of those that this layer has."""
    modules = layer._modules
    lora_A, lora_B, lora_E, ranknum = (
        modules[name]._parameters for name in ("lora_A", "lora_B", "lora_E", "ranknum")
    )
    dropout = modules["lora_dropout"]._modules
    scaling = layer.scaling
    return [
        Adapter(name, *(each[name] for each in (lora_A, lora_B, lora_E, ranknum, scaling, dropout)))
        for name in layer.active_adapters
        if name in lora_A
    ]


def peft_reason(
    layer: Any, adapters: Sequence[Adapter], device: torch.device, x_dtype: torch.dtype
) -> str | None:
    """Why the layer's whole forward is PEFT's own for an x on this device; None where it is not."""
    reason = state_reason(layer, adapters)
    if reason is not None:
        return reason
    for name, lora_A, lora_B, lora_E, ranknum, _, dropout in adapters:
        reason = tensor_reason(device, lora_A=lora_A, lora_B=lora_B, lora_E=lora_E)
        reason = reason or dropout_reason(dropout)
        if reason is None and ranknum.device != device:
            reason = f"its ranknum is on {ranknum.device}, x on {device}"
        if reason is None and not lora_A.shape[0]:
            reason = "every rank was taken from it"
        if reason is None and (x_dtype is torch.float64) is not (lora_A.dtype is torch.float64):
            reason = "float64 goes with float64 alone"
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    return None


def calls(adapters: Sequence[Adapter], device_type: str, rows: int | None) -> list[Call]:
    """Return a call for each of the `groups` of adapters."""
    found = groups(adapters, device_type, rows)
    return [_call(group, dropout_p(group[0].dropout)) for group in found]


def _call(adapters: Sequence[Adapter], dropout_p: float) -> Call:
    if len(adapters) == 1:
        adapter = adapters[0]
        return Call(adapter.lora_A, adapter.lora_B, 1.0, _gate(adapter), dropout_p)
    return Call(
        torch.cat([adapter.lora_A for adapter in adapters]),
        torch.cat([adapter.lora_B for adapter in adapters], dim=1),
        1.0,
        torch.cat([_gate(adapter) for adapter in adapters]),
        dropout_p,
    )


def _gate(adapter: Adapter) -> Tensor:
    """E · scaling / (ranknum + 1e-5), [R], as PEFT has it."""
    dtype = torch.promote_types(adapter.lora_E.dtype, torch.float32)
    return adapter.lora_E.flatten().to(dtype) * adapter.scaling / (adapter.ranknum + 1e-5)
