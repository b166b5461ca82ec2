"""Siblings: fused layers of one parent module that are called with one x, such as q, k and v.

`fuse` gives the children of a module that have the same in_features a `Siblings`. While the
parent's forward runs, the first layer that is called computes P = x·Aᵀ of all, and each layer
threads x on to the next (see `blocks`). This happens on the eager backend's GPU path alone, with
more rows than `UPCAST_ROWS`: for few rows, stacking the A would move more bytes than it saves.

A layer shares x with the siblings that were not called yet in the parent's forward, if it gets the
same tensor object at the same version, in the same grad mode, autocast and saved-tensor hooks.
Otherwise it runs its own call. All P are computed at the first layer's call, and dropped when the
parent's forward ends. A write to x or to a later layer's lora_A in between that does not move the
version counter is not noticed. No value of a tensor and no earlier step has a part in the choice,
so that a forward and its recomputation by checkpointing decide alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks

from ..backends.eager import linear as eager
from ..backends.eager.siblings import is_p_rounded
from ..backends.library import is_on_gpu_path
from ..ops import context
from ..ops import siblings as blocks
from ..quantization import Weight4bit
from .adapters import (
    Adapter,
    casts_adapters,
    dropout_p,
    lora_bias,
    stack,
    weight_of,
)
from .base import readable_weight
from .modules import hooks_of, is_linear4bit
from .plan import plan_linear

# Layers that take what the attention made of q, k and v, never its x. By their names, because no
# call has shown it when the model is fused; a layer that shares x all the same runs its own call.
OUTPUTS = ("o_proj", "out_proj", "o", "wo", "dense", "c_proj")
# The most slots of a forward that may serve one layer alone: q's, if k and v get another tensor.
# More are a sign of layers that are called one after the other.
MAX_LONE_SLOTS = 1


class _Slot:
    """P of layers that are called with the same x, and x, threaded through them.

    Args:
        key: of `_key`.
        rows: x as rows [M, K].
        p: lora_A, its version and P for each layer that has not been called.

    `served` counts the layers that have been called.
    """

    def __init__(
        self, key: tuple[Any, ...], rows: Tensor, p: dict[Any, tuple[Tensor, int, Tensor]]
    ) -> None:
        self.key, self.rows, self.p = key, rows, p
        self.served = 0

    def matches(self, key: tuple[Any, ...]) -> bool:
        return all(map(_is_same, key, self.key))

    def take(self, layer: Any, lora_A: Tensor) -> Tensor | None:
        """Return P of a layer, once; None if there is none of this A.

        The version tells of a write in place since the first call of this forward. A write to
        `lora_A.data` between two calls of one forward goes unnoticed: to compare the values would
        wait for the GPU in each layer.
        """
        kept, version, p = self.p.pop(layer, (None, 0, None))
        return p if kept is lora_A and version == lora_A._version else None


class _Frame:
    """A forward of the parent in one thread.

    Args:
        waiting: the layers that have not been called.
        hooks: the saved-tensor hooks in force. Other ones tell that a layer is checkpointed by
            itself: it would be recomputed without its siblings.
    """

    def __init__(self, waiting: list[Any], hooks: object) -> None:
        self.waiting, self.hooks = waiting, hooks
        self.slot: _Slot | None = None
        self.lone_slots = 0


class _Frames(threading.local):
    """The frames of the forwards that are running in this thread."""

    def __init__(self) -> None:
        self.by_siblings: dict[Siblings, _Frame] = {}


_frames = _Frames()


class Siblings:
    """The names of a module's children that may share x, and the hooks of that module.

    It refers to no module and no tensor, so it is copied and pickled with the model. The shared
    tensors are in a `_Frame`, from the parent's pre-hook to its forward hook.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def begin(self, parent: nn.Module, args: Any) -> None:
        """Let the siblings share x from here on. A forward pre-hook of the parent."""
        if not torch.compiler.is_compiling():
            layers = [parent._modules.get(name) for name in self.names]
            members = [each for each in layers if self.has(each)]
            _frames.by_siblings[self] = _Frame(members, _saved_tensors_hooks())

    def has(self, layer: nn.Module | None) -> bool:
        """Return True for a layer of the group; False if `fuse` or `unfuse` has taken it out."""
        return layer is not None and vars(layer).get("_siblings") is self

    def end(self, parent: nn.Module, args: Any, result: Any) -> None:
        """Drop what is shared. A forward hook of the parent, which runs after an exception too.

        After a KeyboardInterrupt no hook runs, and the parent's next forward drops it.
        """
        if not torch.compiler.is_compiling():
            _frames.by_siblings.pop(self, None)

    def call(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return y of a layer that shares x with its siblings; None if it runs its own call."""
        frame = _frames.by_siblings.get(self)
        if frame is None or not _has_many_rows(x):
            return None
        if not any(each is layer for each in frame.waiting):
            return None
        frame.waiting = [each for each in frame.waiting if each is not layer]
        if not _can_share(x) or frame.hooks != _saved_tensors_hooks():
            return None
        adapter = sharing_adapter(layer, x.device, x.dtype)
        call = None if isinstance(adapter, str) else _Call.build(layer, adapter, x)
        if isinstance(adapter, str) or call is None:
            return None
        key, lora_A = _key(x), weight_of(adapter.lora_A)
        slot = frame.slot
        if slot is None or not slot.matches(key):
            if slot is not None and slot.served == 1:
                frame.lone_slots += 1
            slot = frame.slot = None
            if frame.lone_slots <= MAX_LONE_SLOTS:
                members = [(layer, adapter), *_sharing(frame.waiting, x)]
                slot = frame.slot = _fill(members, x, key)
        p = None if slot is None else slot.take(layer, lora_A)
        if slot is None or p is None:
            return None
        y, slot.rows = call.run(slot.rows, p, x.shape[:-1])
        slot.served += 1
        if not slot.p:
            frame.slot = None
        if layer.mixed_batch is not None:
            layer.mixed_batch = None
        # bitsandbytes returns x's dtype, under autocast too.
        return y.to(x.dtype) if isinstance(call.weight, Weight4bit) else y


class _Call(NamedTuple):
    """The arguments of a layer's `blocks.sibling_linear`, beside x and P."""

    weight: Tensor | Weight4bit
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    rank_gate: Tensor | None

    @classmethod
    def build(cls, layer: Any, adapter: Adapter, x: Tensor) -> _Call | None:
        """Return the call of a layer; None if the base computes in another dtype than x's, or if
        the call is another backend's."""
        base = cast(nn.Module, layer._modules["base_layer"])
        weight, compute_dtype = readable_weight(base, x)
        lora_A, lora_B, scaling, gate, _ = stack([adapter], 0.0)
        cast_dtype = context.autocast_dtype(context.device_of(x)[0], x.dtype)
        is_cast, dtype = cast_dtype is not None, cast_dtype or x.dtype
        if compute_dtype not in (None, dtype) and not is_cast:
            return None
        if isinstance(weight, Tensor) and not is_cast and weight.dtype is not dtype:
            return None
        bias, base_bias = lora_bias([adapter]), base._parameters["bias"]
        if base_bias is not None:
            bias = base_bias if bias is None else base_bias + bias
        if is_cast or casts_adapters(layer, x.device.type, dtype):
            lora_B = lora_B.to(dtype)
            lora_A = blocks.empty_like(lora_A, dtype)
        if not blocks.is_eager(x, weight, lora_A, lora_B):
            return None
        return cls(weight, lora_B, scaling, bias, gate)

    def run(self, rows: Tensor, p: Tensor, leading: Sequence[int]) -> tuple[Tensor, Tensor]:
        weight, lora_B, scaling, bias, gate = self
        weight = weight if isinstance(weight, Weight4bit) else weight.to(rows.dtype)
        return blocks.sibling_linear(rows, p, weight, lora_B, scaling, bias, gate, leading)


def _sharing(layers: Sequence[Any], x: Tensor) -> Iterator[tuple[Any, Adapter]]:
    """Yield the layers that would share x, each with its adapter."""
    for layer in layers:
        adapter = sharing_adapter(layer, x.device, x.dtype)
        if not isinstance(adapter, str):
            yield layer, adapter


def _fill(members: Sequence[tuple[Any, Adapter]], x: Tensor, key: tuple[Any, ...]) -> _Slot | None:
    """Compute P of the members whose A fits the first one's; None if that is alone."""
    cast_dtype = context.autocast_dtype(context.device_of(x)[0], x.dtype)
    is_cast, dtype = cast_dtype is not None, cast_dtype or x.dtype
    first, *_ = members
    members = [each for each in members if mismatch_reason(first, each, x.device, dtype) is None]
    members = [each for each in members if weight_of(each[1].lora_A).shape[1] == x.shape[-1]]
    if len(members) < 2:
        return None
    is_cast = is_cast or casts_adapters(first[0], x.device.type, dtype)
    lora_A = [weight_of(adapter.lora_A) for _, adapter in members]
    lora_B = [weight_of(adapter.lora_B) for _, adapter in members]
    dtypes = [dtype if is_cast else t.dtype for t in (*lora_A, *lora_B)]
    has_gate = any(isinstance(a.scaling, Tensor) or a.diag is not None for _, a in members)
    rows, p = blocks.down_projections(
        x.to(dtype),
        [A.to(dtype) for A in lora_A] if is_cast else lora_A,
        is_p_rounded(dtype, dtypes, has_gate),
    )
    found = zip(members, lora_A, p, strict=True)
    return _Slot(key, rows, {layer: (A, A._version, t) for (layer, _), A, t in found})


def sharing_adapter(layer: Any, device: torch.device, x_dtype: torch.dtype) -> Adapter | str:
    """Return the adapter of a layer that can share x on this device, or why it cannot."""
    if not getattr(type(layer), "shares_x", False):  # no wrapper that hands attributes on
        return f"it is a {type(layer).__name__}"
    if any(hooks_of(layer)):
        return "a hook sits on it"
    adapters, reason, base_reason, is_dora = plan_linear(layer, device, x_dtype)
    if reason is not None or base_reason is not None:
        return cast(str, reason or base_reason)
    base: Any = layer._modules["base_layer"]
    if not _computes_in(base, device, x_dtype):
        return f"its base computes in {base.compute_dtype}, x has {x_dtype}"
    if len(adapters) > 1:
        return "several adapters are active"
    adapter: Adapter = adapters[0]
    if is_dora or adapter.is_alora:
        return f"adapter {adapter.name!r} is {'an aLoRA' if adapter.is_alora else 'DoRA'}"
    if dropout_p(adapter.dropout):
        return "its dropout is active"
    if weight_of(adapter.lora_A).is_inference():
        return "its lora_A is an inference tensor"
    return adapter


def mismatch_reason(
    first: tuple[Any, Adapter], other: tuple[Any, Adapter], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why a layer that can share x on this device does not share it with another one."""
    own, firsts = (weight_of(adapter.lora_A).dtype for _, adapter in (other, first))
    if own is not firsts:
        return f"its lora_A has {own}, that of the first {firsts}"
    casts = [casts_adapters(layer, device.type, dtype) for layer, _ in (other, first)]
    return None if casts[0] is casts[1] else "its adapter is rounded, or that of the first is"


def _computes_in(base: Any, device: torch.device, x_dtype: torch.dtype) -> bool:
    """Return True if the base GEMM runs in x's dtype or autocast's, as far as the base knows."""
    if not is_linear4bit(base) or context.autocast_dtype(device.type, x_dtype) is not None:
        return True
    return not base.compute_type_is_set or base.compute_dtype in (None, x_dtype)


def _has_many_rows(x: Tensor) -> bool:
    return x.dim() > 0 and x.numel() > eager.UPCAST_ROWS * x.shape[-1]


def _can_share(x: Tensor) -> bool:
    """Return True if layers may share x in the state of this thread."""
    has_hooks = x._backward_hooks or x._post_accumulate_grad_hooks
    return blocks.can_run_block(x) and not x.is_inference() and not has_hooks


def _key(x: Tensor) -> tuple[Any, ...]:
    """Return what is equal for calls that share x, to be compared by identity or equality."""
    cast_dtype = context.autocast_dtype(context.device_of(x)[0], x.dtype)
    return x, x._version, x.requires_grad, cast_dtype, torch.is_grad_enabled()


def _is_same(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, Tensor) and a == b)


def _saved_tensors_hooks() -> object:
    """Return the saved-tensor hooks in force, while tracing too (the argument ignores that)."""
    return _top_saved_tensors_default_hooks(True)


# Groups in a model


def add_siblings(model: nn.Module) -> None:
    """Let the fused linear layers on GPUs share x with those beside them."""
    for parent in model.modules():
        for names in _groups(parent):
            siblings = Siblings(names)
            for name in names:
                vars(parent._modules[name])["_siblings"] = siblings
            parent.register_forward_pre_hook(siblings.begin)
            parent.register_forward_hook(siblings.end, always_call=True)


def _groups(parent: nn.Module) -> Iterator[list[str]]:
    """Yield the names of children that are fused linear layers with the same in_features."""
    if isinstance(parent, nn.Sequential):
        return  # calls them one after the other
    groups: dict[int, dict[int, str]] = {}
    for name, layer in parent._modules.items():
        is_output = name in OUTPUTS
        if getattr(type(layer), "shares_x", False) and _is_on_gpu(layer) and not is_output:
            groups.setdefault(cast(Any, layer).in_features, {}).setdefault(id(layer), name)
    yield from (list(names.values()) for names in groups.values() if len(names) > 1)


def _is_on_gpu(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, Tensor) and is_on_gpu_path(weight.device.type)


def remove_siblings(model: nn.Module) -> None:
    """Undo `add_siblings`."""
    for module in model.modules():
        vars(module).pop("_siblings", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if owner_of(hook) is not None:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def siblings_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Siblings]]:
    """Yield the name of each parent, the parent and its siblings."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if (found := owner_of(hook)) is not None:
                yield name, module, found


def owner_of(hook: Any) -> Siblings | None:
    """Return the siblings whose method the hook is."""
    found = getattr(hook, "__self__", None)
    return found if isinstance(found, Siblings) else None
