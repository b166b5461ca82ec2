"""PEFT's `ParamWrapper` over fused experts, with `lora_experts_linear` as its forward.

PEFT nests one wrapper for each parameter of an experts module, and writes W + s·B·A of all experts
in every forward. The fused outermost wrapper instead passes the factors of all wrappers to
`experts_forward`. It calls neither the inner wrappers nor the module. A batch whose rows name their
adapters, which PEFT refuses over experts, is one call too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..layers.experts import (
    ExpertsAdapter,
    experts_forward,
    is_quantized,
    projections,
    unsupported_reason,
)
from ..ops.context import unfused_context
from ..quantization.tensor import QuantizedTensor
from .eligibility import has_hooks, replaced_reason
from .linear import Fused
from .modules import hooks_of, patched_reason
from .sharded import parallel_reason

# transformers' implementations that `experts_forward` can replace. Others bring their own kernels.
_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm", "lora_kernels")


class FusedParamWrapper(Fused, ParamWrapper):
    """PEFT's wrapper of an experts' parameter, which never computes W + s·B·A of all experts."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names, others = kwargs.get("adapter_names"), kwargs.keys() - {"adapter_names"}
        if others or len(args) != 2 or experts_reason(self, x.device, names) is not None:
            return ParamWrapper.forward(self, x, *args, **kwargs)
        wrappers, tenants = wrappers_of(self), None
        if names is None:
            active = {wrapper.parameter_name: active_adapter(wrapper) for wrapper in wrappers}
            by_parameter = {name: adapter and [adapter] for name, adapter in active.items()}
        else:
            tenant_names = list(dict.fromkeys(names))
            by_parameter = {
                wrapper.parameter_name: adapters_by_tenant(wrapper, tenant_names)
                for wrapper in wrappers
            }
            tenants = _tenant_of_tokens(names, tenant_names, x)
        adapters = {name: adapter for name, adapter in by_parameter.items() if adapter is not None}
        return experts_forward(wrappers[-1].base_layer, x, *args, adapters, tenants)


# PEFT recognizes its wrapper by the class name when another adapter is added.
FusedParamWrapper.__name__ = ParamWrapper.__name__


def wrappers_of(wrapper: Any) -> list[Any]:
    """Return the wrapper and the wrappers nested in it, the innermost last."""
    wrappers = [wrapper]
    while isinstance(wrappers[-1].base_layer, ParamWrapper):
        wrappers.append(wrappers[-1].base_layer)
    return wrappers


def active_names(wrapper: Any) -> list[str]:
    """Return the names of the adapters that the wrapper adds in its forward."""
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def active_adapter(wrapper: Any) -> ExpertsAdapter | None:
    """Return the active adapters of a wrapper, stacked along the rank; None if it has none."""
    adapters = [_factors(wrapper, name) for name in active_names(wrapper)]
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    # lora_B is small, so scaling it is cheaper than a rank gate.
    lora_A = torch.cat([adapter.lora_A for adapter in adapters], dim=1)
    lora_B = torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=2)
    return ExpertsAdapter(lora_A, lora_B, 1.0)


def adapters_by_tenant(wrapper: Any, names: Sequence[str]) -> list[ExpertsAdapter] | None:
    """Return the adapters with these names, in order; None if the wrapper has none of them.

    A name that the wrapper lacks, such as PEFT's "__base__", gets an adapter of rank 0.
    """
    adapters = [_factors(wrapper, name) if name in wrapper.lora_A else None for name in names]
    if (first_adapter := next(filter(None, adapters), None)) is None:
        return None
    empty = first_adapter._replace(
        lora_A=first_adapter.lora_A[:, :0], lora_B=first_adapter.lora_B[:, :, :0]
    )
    return [adapter or empty for adapter in adapters]


def _tenant_of_tokens(names: Sequence[str], tenant_names: Sequence[str], x: Tensor) -> Tensor:
    """Return the tenant of each token [T]. names: of the tenant of each row of the batch."""
    rows, tokens = len(names), x.shape[0]
    if not rows or tokens % rows:
        raise ValueError(f"adapter_names: got {rows} for {tokens} tokens, want one a row of x")
    index = torch.tensor([tenant_names.index(name) for name in names], device="cpu")
    index = index.to(x.device, non_blocking=True)
    return index.repeat_interleave(tokens // rows, output_size=tokens)


def _factors(wrapper: Any, name: str) -> ExpertsAdapter:
    """Return views of one adapter's weights as [E, r, in] and [E, out, r]."""
    A, B, E = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    lora_A = A.view(E, -1, A.shape[1])
    lora_B = B.view(B.shape[0], -1, E).permute(2, 0, 1)  # the expert is B's innermost index
    return ExpertsAdapter(lora_A, lora_B, float(wrapper.scaling[name]))


def wrapper_reason(wrapper: Any) -> str | None:
    """Return why `fuse` leaves a ParamWrapper to PEFT; None if it fuses the wrapper."""
    base: nn.Module = wrapper.get_base_layer()
    if (reason := unsupported_reason(base)) is not None:
        return f"PEFT's ParamWrapper over {wrapper.parameter_name}: {reason}"
    if wrapper.parameter_name not in projections(base) or wrapper.num_experts < 2:
        return f"PEFT's ParamWrapper over {wrapper.parameter_name}, which is no experts' projection"
    implementation = getattr(getattr(base, "config", None), "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return f"experts_implementation={implementation!r} has kernels of its own"
    if any(p.requires_grad for p in _stacks(base)):
        return "the base weight is trainable"
    reason = replaced_reason(FusedParamWrapper) or patched_reason(wrapper)
    if reason is None and (reason := patched_reason(base)) is not None:
        # transformers' expert parallelism replaces the forward.
        reason = parallel_reason(*base._parameters.values()) or reason
    return reason


def experts_reason(
    wrapper: Any, device: torch.device, names: Sequence[str] | None = None
) -> str | None:
    """Return why a fused wrapper runs PEFT's forward for x on this device.

    names: the adapter of each row, for which PEFT's forward raises.
    """
    if (context_reason := unfused_context()) is not None:
        return context_reason
    wrappers = wrappers_of(wrapper)
    if names is not None and any(member.disable_adapters or member.merged for member in wrappers):
        return "adapters are disabled or merged, where rows name their own"
    if names is None and not any(map(active_names, wrappers)):
        if any(member.merged for member in wrappers) and not wrapper.disable_adapters:
            return "adapters are merged: the base layer's own forward"
        disabled = wrapper.disable_adapters
        return "adapters are disabled" if disabled else "no active adapter on this layer"
    if any(member.disable_adapters and member.merged for member in wrappers):
        return "adapters are merged and disabled: PEFT takes them out first"
    base = wrappers[-1].base_layer
    reason = parallel_reason(*base._parameters.values()) or wrapper_reason(wrapper)
    if reason is not None:
        return reason
    if any(member.lora_variant for member in wrappers):
        return "it has a variant of LoRA"
    for module in (*wrappers[1:], base):
        if patched_reason(module) or any(_foreign_hooks(module)):
            return f"a hook or another forward sits on its {type(module).__name__}"
    factors = [m[name].weight for w in wrappers for m in (w.lora_A, w.lora_B) for name in m]
    for t in (*_stacks(base), *factors):
        if type(t) not in (nn.Parameter, Tensor, QuantizedTensor):
            return f"it has a {type(t).__name__}"
        if t.device != device:
            return f"it has a tensor on {t.device}, x on {device}"
        if t.dim() < 2:
            return "it has a flattened tensor, as by FSDP1 or ZeRO-3"
    return None


def _stacks(experts: nn.Module) -> Iterable[Tensor]:
    """Yield the stored parameters of the projections, packed if they are quantized."""
    for name in projections(experts):
        if is_quantized(experts, name):
            yield cast(Any, experts).parametrizations[name].original
        else:
            yield experts.get_parameter(name)


# Hooks that are defined in these modules may be skipped with the inner wrappers' calls. They cache
# bitsandbytes' decoded parameters, or add adapter_names to a layer's arguments.
_KNOWN_HOOKS = (
    "bitsandbytes.nn.parametrize",
    "lora_kernels.peft.mixed_batch",
    "peft.tuners.lora.model",
)


def _foreign_hooks(module: nn.Module) -> Iterable[Any]:
    """Yield the module's hooks, except those of `_KNOWN_HOOKS`.

    The hooks by which ZeRO-3 gathers parameters are left out while the parameters are gathered.
    """
    for hooks in hooks_of(module) if has_hooks(module) else ():
        for hook in hooks.values():
            callback = getattr(hook, "func", hook)  # PEFT's is a partial function
            if getattr(callback, "__module__", None) not in _KNOWN_HOOKS:
                yield hook
