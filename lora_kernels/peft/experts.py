"""PEFT's `ParamWrapper` over fused experts, with `lora_experts_linear` as its forward.

PEFT wraps each parameter of an experts module in a wrapper of its own, one inside of another, and
writes W + s·B·A of all experts in every forward. The fused outermost wrapper hands the factors of
all wrappers to `experts_forward` instead.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..layers.experts import (
    ExpertsAdapter,
    experts_forward,
    projections,
    unsupported_reason,
)


class FusedParamWrapper(ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of an experts' parameter, computed without the effective weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 2:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        self._check_forward_args(x, *args)
        wrappers = chain(self)
        for wrapper in wrappers:
            if wrapper.disable_adapters and wrapper.merged:
                wrapper.unmerge()
        adapters = {
            wrapper.parameter_name: adapter
            for wrapper in wrappers
            if (adapter := active_adapter(wrapper)) is not None
        }
        return experts_forward(wrappers[-1].base_layer, x, *args, adapters)


def chain(wrapper: Any) -> list[Any]:
    """Return the wrapper and those inside of it."""
    found = [wrapper]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def active_adapter(wrapper: Any) -> ExpertsAdapter | None:
    """Return the active adapters of a wrapper, stacked along the rank; None if it has none."""
    if wrapper.disable_adapters or wrapper.merged:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    parts = [_factors(wrapper, name) for name in names]
    if len(parts) < 2:
        return parts[0] if parts else None
    # The scalings go into lora_B, which is small.
    lora_A = torch.cat([part.lora_A for part in parts], dim=1)
    lora_B = torch.cat([part.lora_B * part.scaling for part in parts], dim=2)
    return ExpertsAdapter(lora_A, lora_B, 1.0)


def _factors(wrapper: Any, name: str) -> ExpertsAdapter:
    """Return one adapter's views [E, r, in] and [E, out, r] of PEFT's weights."""
    A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    lora_A = A.view(E, -1, A.shape[1])
    lora_B = B.view(B.shape[0], -1, E).permute(2, 0, 1)
    return ExpertsAdapter(lora_A, lora_B, float(wrapper.scaling[name]))


def unfusable_reason(wrapper: Any) -> str | None:
    """Return why a ParamWrapper stays PEFT's own, or None."""
    base: nn.Module = wrapper.get_base_layer()
    if (reason := unsupported_reason(base)) is not None:
        return reason
    if wrapper.parameter_name not in projections(base):
        return f"{wrapper.parameter_name} is not a projection of the experts"
    implementation = getattr(getattr(base, "config", None), "_experts_implementation", None)
    if implementation not in (None, "eager", "batched_mm", "grouped_mm", "lora_kernels"):
        return f"experts_implementation={implementation!r} has kernels of its own"
    return None
