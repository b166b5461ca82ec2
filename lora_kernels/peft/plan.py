"""The plan of a fused linear layer's call: `forward` executes it, `explain` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .adapters import adapters_of, svd_adapters_of
from .eligibility import is_dora, linear_reason, svd_reason, unreadable_reason


class Plan(NamedTuple):
    """The decisions of one call, which depend on the layer's state, and on x's device and dtype.

    Args:
        adapters: the `Adapter` or `SVDAdapter` of the call, in order.
        reason: why PEFT's own forward computes the call; None if this package does.
        base_reason: why the base layer is called as a module; None if its weight is read.
        is_dora: whether the one adapter is a DoRA.
    """

    adapters: list[Any]
    reason: str | None
    base_reason: str | None = None
    is_dora: bool = False


def plan_linear(
    layer: Any, device: torch.device, x_dtype: torch.dtype, names: Sequence[str] | None = None
) -> Plan:
    """Plan a call of PEFT's LoRA layer.

    names: the adapters that the rows of x name; None for the active ones.
    """
    adapters = adapters_of(layer, names)
    reason = linear_reason(layer, adapters, device, x_dtype, names is not None)
    if reason is not None:
        return Plan(adapters, reason)
    return Plan(adapters, None, _base_reason(layer, device), is_dora(layer, adapters[0].name))


def plan_svd(layer: Any, device: torch.device, x_dtype: torch.dtype) -> Plan:
    """Plan a call of PEFT's AdaLoRA layer."""
    adapters = svd_adapters_of(layer)
    reason = svd_reason(layer, adapters, device, x_dtype)
    return Plan(adapters, reason, None if reason else _base_reason(layer, device))


def _base_reason(layer: Any, device: torch.device) -> str | None:
    return unreadable_reason(cast(nn.Module, layer._modules["base_layer"]), device)
