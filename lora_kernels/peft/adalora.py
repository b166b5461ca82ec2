"""PEFT's AdaLoRA layer with `lora_linear` as its forward: the scaled E is the rank gate.

PEFT still allocates the rank budget, masks E, adds the orthogonality loss and saves. This code
reads parameters and calls no layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from ..core.dtypes import to_dtype
from .adapters import RowNames, svd_calls
from .base import readable_weight
from .linear import Fused, add_adapter, add_update, result_dtype
from .plan import Plan, plan_svd


class FusedSVD(Fused):
    """The mix-in by which `fuse` overrides the forward of an AdaLoRA layer.

    y = x·Wᵀ + bias + Σ ((D(x)·Aᵀ) ⊙ E·s/(ranknum + 1e-5))·Bᵀ, with dropout, stacked adapters and
    dtypes as in `Fused`. E, and ranknum if PEFT trains it, get their gradients through the gate.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters, reason, base_reason, _ = self.plan(x.device, x.dtype)
        if reason is not None or self._layout_reason(x) is not None:
            return cast(Tensor, super(Fused, self).forward(x, *args, **kwargs))
        base = cast(nn.Module, self._modules["base_layer"])
        calls = self.calls(adapters, x, RowNames())
        if args or kwargs or base_reason is not None:
            y, is_fresh = self._call_base(base, x, *args, **kwargs)
            dtype = y.dtype
            y = add_update(y, is_fresh, x, None, calls.pop(0))
        else:
            weight, compute_dtype = readable_weight(base, x)
            y = add_adapter(x, weight, base._parameters["bias"], calls.pop(0), compute_dtype)
            dtype = result_dtype(base, x, y)
        for call in calls:
            y = add_update(y, True, x, None, call)
        return to_dtype(y, dtype)

    def plan(self, device: torch.device, x_dtype: torch.dtype, names: Any = None) -> Plan:
        return plan_svd(self, device, x_dtype)

    def calls(self, adapters: Sequence[Any], x: Tensor, rows: RowNames) -> list[Any]:
        return self._cast(svd_calls(adapters, x.device.type, x.shape[:-1].numel()), x)


class FusedSVDLinear(FusedSVD, SVDLinear):
    """PEFT's AdaLoRA layer over `nn.Linear`, or over a base that is called as a module."""
