"""PEFT's LoRA layer with `lora_linear` as its forward, and what its next call will do.

The latter follows from the layer's state alone. `forward` and `explain` ask the same functions:
`peft_reason` (the whole call is PEFT's own), `unreadable` (the base layer is called as a module and
only the adapters are ours) and `calls` (how the active adapters share `lora_linear`).

They run on every forward, so they look modules and parameters up in `_modules` and `_parameters`:
`nn.Module.__getattr__` takes ten times as long.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate.hooks import AlignDevicesHook  # type: ignore[import-untyped]
from peft.tuners import lora
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..backends import native
from ..backends.eager import UPCAST_ROWS
from ..backends.library import follows_gpu
from ..core.call import Guard
from ..fastpath import CallCache, DoraNormCache
from ..functional import lora_linear, multi_lora_linear
from ..quantization import Weight4bit

_LINEAR_FORWARD = nn.Linear.forward
# What only PEFT's variants read; a base layer never sees it.
_NOT_FOR_BASE = ("adapter_names", *getattr(lora_layer, "VARIANT_KWARG_KEYS", ()))


class Fused(nn.Module):
    """What `fuse` puts before a PEFT layer's class: `lora_linear` as its forward.

    x [..., K] -> [..., N] in the dtype that PEFT's own forward returns. Active adapters without
    dropout are stacked along the rank and share one call. In training each adapter with dropout
    has a call of its own, because PEFT draws a mask for each.
    """

    # PEFT's target_modules="all-linear" knows its own layers by "Linear" in the class's name.

    mixed_batch: tuple[str, ...] | None = None  # those that the last call's adapter_names had
    _prepared: _PreparedForward | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        alone = not (args or kwargs or torch.compiler.is_compiling())
        if alone and (prepared := self._prepared) is not None:
            y = prepared(self, x)
            if y is not None:
                return y
            self._prepared = None
        names = kwargs.get("adapter_names") if kwargs else None
        if names is not None or self.mixed_batch is not None:
            self.mixed_batch = None if names is None else tuple(dict.fromkeys(names))
        adapters = adapters_of(self)
        if peft_reason(self, adapters, x.device, x.dtype) is not None:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        if kwargs:
            self._check_forward_args(x, **kwargs)  # type: ignore[operator]  # PEFT's own
            kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_BASE}

        base, bias = cast(nn.Module, self._modules["base_layer"]), _lora_bias(adapters)
        if dora(self, adapters[0].name):
            if args or kwargs:  # for a base that takes more than x
                return cast(Tensor, super().forward(x, *args, **kwargs))
            return _dora_linear(self, adapters[0], x)
        first: Call | MixedCall
        if names is None:
            first, *rest = calls(adapters, x.device.type, x.numel() // x.shape[-1])
        else:
            first, *rest = [_mixed_call(adapters, names, x)]
        if args or kwargs or unreadable(base, x.device) is not None:
            result = base(x, *args, **kwargs)
            dtype = result.dtype
            result = result + _lora_linear(x, None, bias, first)
        else:
            base_bias = base._parameters["bias"]
            if base_bias is not None:
                bias = base_bias if bias is None else base_bias + bias
            weight, compute_dtype = readable_weight(base, x)
            result = _lora_linear(x, weight, bias, first, compute_dtype)
            # bitsandbytes returns x's, under autocast too.
            dtype = x.dtype if is_linear4bit(base) else result.dtype
            if alone and len(adapters) == 1:
                self._prepared = _PreparedForward.build(self, adapters[0], x, weight, compute_dtype)
        for call in rest:
            result.add_(_lora_linear(x, None, None, call))  # in place: the result is ours by now
        return result if result.dtype is dtype else cast(Tensor, result.to(dtype))


class FusedLinear(Fused, lora.Linear):
    """PEFT's general LoRA layer, over `nn.Linear` or a base that we call as a module."""


class Adapter(NamedTuple):
    name: str
    lora_A: nn.Linear
    lora_B: nn.Linear
    scaling: float | Tensor  # a tensor where PEFT has prepared the model for hot-swapping
    dropout: nn.Module


class Call(NamedTuple):
    """The adapters' arguments of one `lora_linear`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    rank_gate: Tensor | None
    dropout_p: float


class MixedCall(NamedTuple):
    """The adapters' arguments of one `multi_lora_linear`."""

    lora_A: list[Tensor]
    lora_B: list[Tensor]
    names: Tensor  # `multi_lora_linear`'s index
    scaling: list[float]
    dropout_p: float


@dataclasses.dataclass(eq=False)
class _PreparedForward:
    """The call that `forward` makes for a layer with one adapter, and the guards it depends on.

    Each call checks all guards. Nothing here refers to the layer, so that reference counting alone
    frees it.
    """

    x_dtype: torch.dtype
    device: torch.device | None  # None: the CPU, of which x says it is there in less time
    weight: Tensor | Weight4bit
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    compute_dtype: torch.dtype | None
    active: str | list[str]
    dropout: nn.Module
    scalings: dict[str, float]
    base_parameters: dict[str, Any]
    adapter_dtypes: tuple[torch.dtype, torch.dtype]
    modules: dict[str, Any]
    guards: tuple[tuple[Any, ...], ...]  # objects, keys, expected values
    hooks: tuple[dict[int, Any], ...]  # of the modules, all empty
    cache: CallCache

    @classmethod
    def build(
        cls,
        layer: Any,
        adapter: Adapter,
        x: Tensor,
        weight: Tensor | Weight4bit,
        compute_dtype: torch.dtype | None,
    ) -> _PreparedForward | None:
        """Build it for a layer whose `forward` has just called `lora_linear` on its base.

        Returns None for a layer whose state the guards do not cover.
        """
        name, lora_A, lora_B, scaling, dropout = adapter
        modules = layer._modules
        base = modules["base_layer"]
        stored, four_bit = base._parameters["weight"], isinstance(weight, Weight4bit)
        if native.module is None or isinstance(scaling, Tensor) or is_conv1d(base):
            return None
        if is_linear4bit(base) and (not four_bit or type(stored) is nn.Parameter):
            return None  # decoded for float64; FSDP2's, which goes after the call
        if lora_B._parameters["bias"] is not None:
            return None
        A, B = _weight(lora_A), _weight(lora_B)
        if not (A.is_leaf and B.is_leaf):
            return None  # functional_call's, whose graph would stay until the next call

        called = (base, lora_A, lora_B, dropout)
        entries: list[tuple[dict[str, Any], str]] = [
            *((modules, kind) for kind in ("base_layer", "lora_A", "lora_B", "lora_dropout")),
            # Of the active ones a layer may get another yet.
            *((modules["lora_A"]._modules, active) for active in layer.active_adapters),
            *((modules[kind]._modules, name) for kind in ("lora_B", "lora_dropout")),
            (layer.scaling, name),
            (layer.lora_variant, name),
            *((module.__dict__, "forward") for module in called),
            (base._parameters, "weight"),
            (lora_A._parameters, "weight"),
            (lora_B._parameters, "weight"),
            (lora_B._parameters, "bias"),
        ]
        if four_bit:
            entries += [
                (base.__dict__, "compute_dtype"),
                (base.__dict__, "compute_type_is_set"),
                (stored.__dict__, "quant_state"),
                (stored.quant_state.__dict__, "absmax"),
            ]
        guards = [
            *(Guard(entry, key, entry.get(key)) for entry, key in entries),
            Guard(base, type, type(base)),  # changes when its bias is parametrized
            Guard(nn.Linear, "forward", _LINEAR_FORWARD),
            Guard(stored, _address, _address(stored)),
        ]
        cache = CallCache()
        cache.renew(x, (weight, A, B), (scaling, compute_dtype, dropout_p(dropout)))
        return cls(
            x.dtype,
            None if x.is_cpu else x.device,
            weight,
            A,
            B,
            scaling,
            compute_dtype,
            copy.copy(layer._active_adapter),
            dropout,
            layer.scaling,
            base._parameters,
            (A.dtype, B.dtype),
            modules,
            tuple(zip(*guards, strict=True)),
            tuple(hooks for module in called for hooks in _hooks(module)),
            cache,
        )

    def _holds(self, layer: Any) -> bool:
        """Return True if `forward` would decide the same, but for x and the adapter's dtypes."""
        assert native.module is not None  # else nothing is prepared
        return (
            layer._active_adapter == self.active
            and not (layer._disable_adapters or layer.merged_adapters or layer.mixed_batch)
            and layer._modules is self.modules
            and layer.scaling is self.scalings  # which PEFT's rescale_adapter_scale replaces
            and native.module.unchanged(*self.guards, self.hooks)
        )

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return y, or None if `forward` has to decide again."""
        if not self._holds(layer):
            return None
        bias, p = self.base_parameters["bias"], dropout_p(self.dropout)
        tensors, numbers = (
            (self.weight, self.lora_A, self.lora_B),
            (self.scaling, self.compute_dtype, p),
        )
        y = self.cache.call(x, bias, tensors, numbers)  # which guards x and the adapter
        if y is not None:
            return y
        if (
            x.dtype is not self.x_dtype
            or not (x.is_cpu if self.device is None else x.device == self.device)
            or (self.lora_A.dtype, self.lora_B.dtype) != self.adapter_dtypes
        ):
            return None
        y = lora_linear(
            x, *tensors, self.scaling, bias, dropout_p=p, compute_dtype=self.compute_dtype
        )
        self.cache.renew(x, tensors, numbers)
        # bitsandbytes returns x's dtype, under autocast too.
        return y.to(x.dtype) if isinstance(self.weight, Weight4bit) else y

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # nothing of a copied or saved layer
        return type(None), ()


def _address(weight: Tensor) -> tuple[int, bool]:
    return weight.data_ptr(), weight.requires_grad


def _lora_linear(
    x: Tensor,
    weight: Tensor | Weight4bit | None,
    bias: Tensor | None,
    call: Call | MixedCall,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    if isinstance(call, MixedCall):
        A, B, names, scaling, p = call
        kwargs: dict[str, Any] = {"dropout_p": p, "compute_dtype": compute_dtype}
        return multi_lora_linear(x, weight, A, B, names, scaling, bias, **kwargs)
    lora_A, lora_B, factor, gate, p = call
    kwargs = {"rank_gate": gate, "dropout_p": p, "compute_dtype": compute_dtype}
    return lora_linear(x, weight, lora_A, lora_B, factor, bias, **kwargs)


def adapters_of(layer: Any) -> list[Adapter]:
    """The adapters that its last call named for its rows, or else the active ones; of those that
    this layer has."""
    modules = cast(dict[str, Any], layer._modules)
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropout = modules["lora_dropout"]._modules
    return [
        Adapter(name, lora_A[name], lora_B[name], layer.scaling[name], dropout[name])
        for name in layer.mixed_batch or layer.active_adapters
        if name in lora_A
    ]


def peft_reason(
    layer: Any, adapters: Sequence[Adapter], device: torch.device, x_dtype: torch.dtype
) -> str | None:
    """Why the layer's whole forward is PEFT's own for an x on this device; None where it is not."""
    reason = state_reason(layer, adapters)
    if reason is not None:
        return reason
    for name, lora_A, lora_B, _, dropout in adapters:
        if name in layer.lora_variant:
            variant = _variant_reason(layer, adapters, name, device)
            if variant is not None:
                return f"adapter {name!r} is a {variant}"
        reason = unreadable(lora_A, device) or unreadable(lora_B, device)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
        if (x_dtype is torch.float64) is not (_weight(lora_A).dtype is torch.float64):
            return f"adapter {name!r}: float64 goes with float64 alone"
        if reason := dropout_reason(dropout):
            return f"adapter {name!r}: {reason}"
    return None if layer.mixed_batch is None else _mixed_reason(layer, adapters)


def _mixed_reason(layer: Any, adapters: Sequence[Adapter]) -> str | None:
    """Why rows that name their adapters cannot share a call; None where they can."""
    for name, _, lora_B, scaling, _ in adapters:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a DoRA, and rows name their adapters"
        if lora_B._parameters["bias"] is not None:
            return f"adapter {name!r} has a lora_bias, and rows name their adapters"
        if isinstance(scaling, Tensor):
            return f"adapter {name!r} is prepared for hot-swapping, and rows name their adapters"
    dtypes = {(_weight(a.lora_A).dtype, _weight(a.lora_B).dtype) for a in adapters}
    if len(dtypes) > 1 or len({dropout_p(a.dropout) for a in adapters}) > 1:
        return "adapters that rows name differ in dtype or dropout"
    return None


def state_reason(layer: Any, adapters: Sequence[object]) -> str | None:
    """As `peft_reason`, as far as it is the same for layers of every kind."""
    if layer.disable_adapters:
        return "adapters are disabled: the base layer's own forward"
    if layer.merged:
        loss = getattr(layer, "merge_loss", None)
        return "adapters are merged: the base layer's own forward" + (f"; {loss}" if loss else "")
    if not adapters:
        return "no active adapter on this layer: the base layer's own forward"
    if trainable_base(layer):
        return "the base weight is trainable"
    return None


def dropout_reason(dropout: nn.Module) -> str | None:
    """Why it may be more than dropout."""
    if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if any(_hooks(dropout)):
        return "a hook sits on its dropout"
    return f"{reason} (its dropout's)" if (reason := patched(dropout)) else None


def dora(layer: Any, name: str) -> bool:
    """Whether the adapter is a DoRA."""
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def _variant_reason(
    layer: Any, adapters: Sequence[Adapter], name: str, device: torch.device
) -> str | None:
    """What an adapter is that is left to PEFT for being a variant of LoRA; None if it is not."""
    if not dora(layer, name):
        variant = type(layer.lora_variant[name]).__name__
        return f"variant of LoRA ({variant}), not covered in this version"
    if len(adapters) > 1:
        return "DoRA beside other active adapters, over whose results PEFT takes it"
    if isinstance(adapters[0].scaling, Tensor):
        return "DoRA prepared for hot-swapping"
    reason = unreadable(layer.base_layer, device)
    if reason is not None:
        return f"DoRA, which needs the base weight: {reason}"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer or any(_hooks(magnitude)) or patched(magnitude):
        return "DoRA whose magnitude is no plain module of PEFT's"
    if magnitude.weight.device != device:
        return f"DoRA whose magnitude is on {magnitude.weight.device}, x on {device}"
    return None


def _dora_linear(layer: Any, adapter: Adapter, x: Tensor) -> Tensor:
    """y = magnitude ⊘ norm ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias; with dropout, which PEFT puts before the
    base product too, of the dropped x, and (x − dropped)·Wᵀ beside it."""
    base, A, B = layer.base_layer, _weight(adapter.lora_A), _weight(adapter.lora_B)
    weight, compute_dtype = readable_weight(base, x)
    bias, scaling = base._parameters["bias"], cast(float, adapter.scaling)
    norm = layer.__dict__.setdefault("_norm", DoraNormCache())(weight, A, B, scaling)
    scale = layer.lora_magnitude_vector[adapter.name].weight / norm
    if not dropout_p(adapter.dropout):
        y = lora_linear(
            x, weight, A, B, scaling, bias, column_scale=scale, compute_dtype=compute_dtype
        )
    else:
        dropped = adapter.dropout(x)
        rest, none = x - dropped, (A.detach(), B.detach(), 0.0)
        y = lora_linear(
            dropped, weight, A, B, scaling, column_scale=scale, compute_dtype=compute_dtype
        ) + lora_linear(rest, weight, *none, bias, compute_dtype=compute_dtype)
    return y.to(x.dtype) if is_linear4bit(base) else y


def unreadable(module: nn.Module, device: torch.device) -> str | None:
    """Why calling the module may be more than `F.linear` on plain parameters on this device."""
    four_bit, conv1d = is_linear4bit(module), is_conv1d(module)
    if type(module) is not nn.Linear and not four_bit and not conv1d:
        return f"{type(module).__name__} is not exactly nn.Linear"
    if any(_hooks(module)):
        return f"a hook sits on its {'Conv1D' if conv1d else 'nn.Linear'}"
    if nn.Linear.forward is not _LINEAR_FORWARD:
        return "nn.Linear.forward was replaced"
    if conv1d and type(module).forward.__module__ != type(module).__module__:
        return "Conv1D.forward was replaced"
    if "forward" in module.__dict__ and (reason := patched(module)):
        return reason
    weight = module._parameters.get("weight")
    if four_bit:
        from .base4bit import unreadable_4bit

        return unreadable_4bit(module, device)
    return tensor_reason(device, weight=weight)


def tensor_reason(device: torch.device, **tensors: Any) -> str | None:
    """Why one of them is no plain matrix on this device."""
    for name, tensor in tensors.items():
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device != device:
            return f"its {name} is on {tensor.device}, x on {device}"
        if tensor.dim() != 2:
            return f"its {name} is flattened to {list(tensor.shape)}"
    return None


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    forward = module._forward_pre_hooks, module._forward_hooks
    return *forward, module._backward_pre_hooks, module._backward_hooks


def is_linear4bit(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' 4-bit linear, which nobody imports in order to ask."""
    cls = type(module)
    names = ("Linear4bit", "LinearNF4", "LinearFP4")
    return cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in names


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, GPT-2's linear layer, whose weight is [K, N]."""
    cls = type(module)
    return cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D"


def base_weight(base: nn.Module) -> Tensor:
    """[N, K], the base's own memory."""
    weight = cast(Tensor, base._parameters["weight"])
    return weight.t() if is_conv1d(base) else weight


def readable_weight(base: nn.Module, x: Tensor) -> tuple[Tensor | Weight4bit, torch.dtype | None]:
    """The weight of a base that is not `unreadable`, and the dtype to compute in if it is 4-bit."""
    if is_linear4bit(base):
        from .base4bit import prepared  # which imports bitsandbytes

        return prepared(base, x)
    return base_weight(base), None


def patched(module: nn.Module) -> str | None:
    """Why an instance's own `forward` may do more than its class's; None where it does not."""
    forward: Any = module.__dict__.get("forward")
    if forward is None:
        return None
    if getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        hook: Any = module._hf_hook
        if type(hook) is not AlignDevicesHook:
            return f"accelerate's {type(hook).__name__} sits on it"
        if hook.offload:
            return "accelerate offloads its weights"
        # What remains of the hook is to move x to the weights, and those are beside x.
        forward = module._old_forward
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    return "its forward was replaced"


def trainable_base(layer: Any) -> bool:
    weight = cast(nn.Module, layer._modules["base_layer"])._parameters.get("weight")
    return weight is not None and weight.requires_grad


def calls(adapters: Sequence[Adapter], device_type: str, rows: int | None) -> list[Call]:
    """Return a call for each of the `groups` of adapters."""
    found = groups(adapters, device_type, rows)
    return [_call(group, dropout_p(group[0].dropout)) for group in found]


def _mixed_call(adapters: Sequence[Adapter], names: Sequence[str], x: Tensor) -> MixedCall:
    """names: one for each x[i]; PEFT's "__base__", and what this layer has not, are no adapter."""
    places = {adapter.name: e for e, adapter in enumerate(adapters)}
    index = torch.tensor([places.get(name, -1) for name in names], device=x.device)
    return MixedCall(
        [_weight(adapter.lora_A) for adapter in adapters],
        [_weight(adapter.lora_B) for adapter in adapters],
        index.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]),
        [cast(float, adapter.scaling) for adapter in adapters],
        dropout_p(adapters[0].dropout),
    )


def groups(adapters: Sequence[Any], device_type: str, rows: int | None) -> list[Sequence[Any]]:
    """Return the adapters to be stacked: those without dropout together, each with dropout alone.

    On a GPU, beside x of at most `UPCAST_ROWS` rows each adapter is alone: stacking copies the
    adapters in every call, which moves more bytes than it saves.

    Args:
        adapters: the active ones.
        device_type: of x.
        rows: of x; None for many.
    """
    if len(adapters) == 1:
        return [adapters]
    if rows is not None and rows <= UPCAST_ROWS and follows_gpu(device_type):
        return [[adapter] for adapter in adapters]
    plain = [adapter for adapter in adapters if not dropout_p(adapter.dropout)]
    masked: list[Sequence[Any]] = [[a] for a in adapters if dropout_p(a.dropout)]
    return [plain, *masked] if plain else masked


def dropout_p(dropout: nn.Module) -> float:
    """The probability with which it drops now."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _call(adapters: Sequence[Adapter], dropout_p: float) -> Call:
    """The adapters stacked along the rank, a gate with the scaling of each, unless one will do."""
    _, lora_A, lora_B, scaling, _ = adapters[0]
    if len(adapters) == 1 and not isinstance(scaling, Tensor):
        return Call(_weight(lora_A), _weight(lora_B), scaling, None, dropout_p)
    A = torch.cat([_weight(adapter.lora_A) for adapter in adapters])
    B = torch.cat([_weight(adapter.lora_B) for adapter in adapters], dim=1)
    if not any(isinstance(a.scaling, Tensor) or a.scaling != scaling for a in adapters):
        return Call(A, B, cast(float, scaling), None, dropout_p)
    return Call(A, B, 1.0, torch.cat([_gate(adapter) for adapter in adapters]), dropout_p)


def _gate(adapter: Adapter) -> Tensor:
    """The adapter's scaling on each of its ranks, [R]."""
    A, scaling = _weight(adapter.lora_A), adapter.scaling
    R, dtype = A.shape[0], torch.promote_types(A.dtype, torch.float32)
    if isinstance(scaling, Tensor):
        return scaling.to(A.device, dtype).expand(R)
    return torch.full((R,), scaling, dtype=dtype, device=A.device)


def _weight(linear: nn.Linear) -> Tensor:
    return cast(Tensor, linear._parameters["weight"])


def _lora_bias(adapters: Sequence[Adapter]) -> Tensor | None:
    """The sum of scaling · lora_B.bias, [N]; None without `lora_bias`."""
    total: Tensor | None = None
    for adapter in adapters:
        bias = adapter.lora_B._parameters["bias"]
        if bias is not None:
            part = adapter.scaling * bias
            total = part if total is None else total + part
    return total
