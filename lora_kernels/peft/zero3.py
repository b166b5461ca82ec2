"""DeepSpeed's ZeRO-3: all parameters of a fused layer are gathered for the layer's call.

DeepSpeed partitions parameters. Its hooks gather a module's own parameters before the module's
forward and before its backward, and free them afterwards. A fused layer reads the parameters of its
children without calling the children. So `fuse` registers the children's parameters with the layer,
by `deepspeed.zero.register_external_parameter`, before or after the engine is made. Gradients are
reduced in the same way as for PEFT's forward.

A layer could also be a leaf of ZeRO-3 (`set_z3_leaf_modules`). DeepSpeed then reduces its gradients
in a backward hook of the layer. The hook fails if no input needs a gradient, or if the layer is
called twice before a backward.

A view that a forward saves for its backward, such as a transposed weight or 4-bit codes, would keep
gathered parameters in memory. So the view is not saved, and the backward makes it again from the
parameter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import (  # type: ignore[attr-defined, unused-ignore]
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _saved_tensors_hooks_is_enabled,
    _top_saved_tensors_default_hooks,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .modules import hooks_of


def is_zero3(model: nn.Module) -> bool:
    """Return True if ZeRO-3 will partition the model's parameters, or has partitioned any."""
    enabled: bool = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    return enabled or any(map(is_partitioned, model.parameters()))


def is_partitioned(p: object) -> bool:
    """Return True if ZeRO-3 owns the parameter, whether it is currently gathered or not."""
    return hasattr(p, "ds_id")


def gather_in_call(layers: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather all parameters of each layer for the layer's call."""
    for layer in layers:
        if not is_gathered_in_call(layer):
            # The hooks run before DeepSpeed's hooks, which gather, and those which free.
            layer.register_forward_pre_hook(_gather_pre_hook, prepend=True)
            layer.register_forward_hook(_release_hook, prepend=True, always_call=True)


def is_gathered_in_call(layer: nn.Module) -> bool:
    """Return True if `gather_in_call` was called for the layer."""
    return _gather_pre_hook in layer._forward_pre_hooks.values()


def stop_gathering(model: nn.Module) -> None:
    """Undo `gather_in_call` for all layers of a model."""
    for layer in filter(is_gathered_in_call, model.modules()):
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [
                key for key, hook in hooks.items() if hook in (_gather_pre_hook, _release_hook)
            ]:
                del hooks[key]
                layer._forward_hooks_always_called.pop(key, None)
        for p in _child_parameters(layer):
            getattr(layer, "_external_params", {}).pop(id(p), None)


class _RunningForward(NamedTuple):
    """A running forward of a layer whose parameters are gathered.

    has_hooks: whether hooks pack the tensors that the forward saves.
    """

    layer: nn.Module
    has_hooks: bool


class _RunningForwards(threading.local):
    """The running forwards of this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_RunningForward] = []


_running = _RunningForwards()


def hooks_gather(module: nn.Module) -> bool:
    """Return True if all hooks of a module are DeepSpeed's, or those of `gather_in_call`."""
    ours = _gather_pre_hook, _release_hook
    return all(
        hook in ours or getattr(hook, "__module__", "").startswith("deepspeed.")
        for hook_dict in hooks_of(module)
        for hook in hook_dict.values()
    )


def is_gathered(module: nn.Module) -> bool:
    """Return True if the module's parameters are gathered, and all its hooks are DeepSpeed's.

    The parameters are gathered during the forward of a layer that was given to `gather_in_call`.
    """
    if not any(module is child for running in _running.stack for child in running.layer.modules()):
        return False
    return hooks_gather(module)


@contextmanager
def as_gathered(layer: nn.Module) -> Iterator[None]:
    """Let `is_gathered` return its value in the layer's call."""
    _running.stack.append(_RunningForward(layer, False))
    try:
        yield
    finally:
        _running.stack.pop()


def _gather_pre_hook(layer: nn.Module, args: Any) -> None:
    """Register the parameters to gather, and pack saved views. A forward pre-hook."""
    if torch.compiler.is_compiling():
        return
    partitioned = [p for p in _child_parameters(layer) if is_partitioned(p)]
    registered = getattr(layer, "_external_params", {})
    for p in partitioned:
        if id(p) not in registered:
            from deepspeed.runtime.zero import register_external_parameter

            register_external_parameter(layer, p)
    # Other saved-tensor hooks stay in force, such as those of checkpointing, which recomputes.
    has_hooks = bool(partitioned) and _saved_tensors_hooks_is_enabled()
    has_hooks = has_hooks and _top_saved_tensors_default_hooks(True) is None
    if has_hooks:
        _push_saved_tensors_default_hooks(_Packing(partitioned).pack, _unpack)
    _running.stack.append(_RunningForward(layer, has_hooks))


def _release_hook(layer: nn.Module, args: Any, result: Any) -> None:
    """Undo `_gather_pre_hook`. A forward hook, which runs after an exception too."""
    if _running.stack and _running.stack[-1].layer is layer and _running.stack.pop().has_hooks:
        _pop_saved_tensors_default_hooks()


def _child_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the modules below the layer. DeepSpeed gathers the layer's own."""
    for child in layer.children():
        yield from child.parameters()


class _View(NamedTuple):
    """A view of a parameter, whose address changes when it is gathered again."""

    parameter: nn.Parameter
    offset: int  # in bytes
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _SavedTensor(NamedTuple):
    tensor: Tensor
    version: int


class _Packing:
    """The pack hook of the tensors that a forward saves. Views of `parameters` become `_View`s."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def pack(self, t: Tensor) -> _View | _SavedTensor:
        is_plain = type(t) in (Tensor, nn.Parameter) and t.numel() > 0
        address = t.data_ptr() if is_plain else 0
        for p in self.parameters if is_plain else ():
            if p.is_contiguous() and p.data_ptr() <= address < p.data_ptr() + p.nbytes:
                offset = address - p.data_ptr()
                return _View(p, offset, t.dtype, tuple(t.shape), t.stride())
        return _SavedTensor(t, t._version)


def _unpack(saved: _View | _SavedTensor) -> Tensor:
    if isinstance(saved, _SavedTensor):
        t, version = saved
        if t._version != version:  # autograd's check, which packed tensors do not get
            raise RuntimeError(
                "a tensor that a fused layer needs for its backward was modified in place: got "
                f"version {t._version}, want {version}"
            )
        return t
    p = saved.parameter
    flat = p.detach().view(-1).view(saved.dtype)
    offset = flat.storage_offset() + saved.offset // saved.dtype.itemsize
    return flat.as_strided(saved.size, saved.stride, offset)
