"""`fuse(model, loss=True)`: causal language models whose training loss needs no logits in memory.

The models get another forward. In training, with labels, it runs the class's own forward, in which
the head returns a `DeferredLogits`. The loss of that needs no logits. Evaluation, generation, and
calls for which `call_reason` gives a reason have logits as before.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..ops.context import unfused_context
from .deferred import DeferredLogits, defer_logits
from .head import read_head
from .modules import original_forward, patched_reason


def fuse_losses(model: nn.Module) -> None:
    """Replace the forward of each causal language model in `model` that is covered.

    A model that is not covered is marked for `explain`. Raises ValueError if there is no such
    model.
    """
    models = list(causal_models(model))
    if not models:
        raise ValueError(
            f"model: got {type(model).__name__} without a causal language model of transformers, "
            "want one beside loss=True"
        )
    for _, module in models:
        module._loss_requested = True
        if not has_fused_loss(module) and model_reason(module) is None:
            cls: Any = type(module)
            module.forward = MethodType(_forward_of(cls), module)


def restore_losses(model: nn.Module) -> None:
    """Undo `fuse_losses`."""
    for module in model.modules():
        for name in _FORWARDS:
            if not _is_fused_loss(vars(module).get(name)):
                continue
            if name == "forward":
                del module.forward
            else:
                setattr(module, name, MethodType(type(module).forward, module))
        for name in ("_loss_requested", "_logits_reason"):
            vars(module).pop(name, None)


def requested_losses(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of each model for which `fuse(loss=True)` was called."""
    for name, module in model.named_modules():
        if "_loss_requested" in vars(module):
            yield name, module


def causal_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of each causal language model of transformers."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            yield name, module


_FORWARDS = ("forward", "_old_forward")  # accelerate stores the forward that it wraps


def _is_fused_loss(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "is_fused_loss", False)


def has_fused_loss(module: Any) -> bool:
    """Return True if the instance's forward, or the one below accelerate's, is built here."""
    return any(_is_fused_loss(vars(module).get(name)) for name in _FORWARDS)


def model_reason(module: Any) -> str | None:
    """Return why the loss of a causal language model is left to transformers, or None."""
    if module.config.is_encoder_decoder:
        return f"{type(module).__name__} is an encoder and a decoder"
    if original_forward(type(module)) is None:
        return f"{type(module).__name__}.forward was replaced"
    return None if has_fused_loss(module) else patched_reason(module)


def call_reason(module: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why the next training step computes logits of hidden states in x_dtype, or None."""
    if (reason := _step_reason(module)) is not None:
        return reason
    records = read_head(module.get_output_embeddings(), device, x_dtype)
    return f"its head: {records}" if isinstance(records, str) else None


def last_reason(module: Any) -> str | None:
    """Return what computed the logits in the last training step of a model; None if nothing did."""
    reason: str | None = vars(module).get("_logits_reason")
    return reason


def _step_reason(module: Any) -> str | None:
    """Return why a training step leaves the model's head alone, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if (reason := unfused_context()) is not None:
        return reason
    if module.loss_function is not ForCausalLMLoss:
        return "its loss_function was replaced"
    if module.get_output_embeddings() is None:
        return "it has no output embedding"
    return None


@functools.cache
def _forward_of(cls: Any) -> Any:
    """Return the class's forward, with a loss that needs no logits in training."""
    class_forward = cls.forward
    names = list(inspect.signature(class_forward).parameters)[1:]

    @functools.wraps(class_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_own = cls.forward is class_forward  # or replaced after `fuse`
        given = dict(zip(names, args, strict=False)) | kwargs
        to_keep = given.get("logits_to_keep", 0)
        keeps_all = isinstance(to_keep, int) and to_keep == 0
        is_step = self.training and given.get("labels") is not None and keeps_all
        if not (is_own and is_step) or _step_reason(self) is not None:
            return cls.forward(self, *args, **kwargs)
        return _run_step(cls.forward, self, args, kwargs)

    forward.is_fused_loss = True  # type: ignore[attr-defined]
    return forward


class _HeadForward:
    """A forward of a head, for one call in one thread: it returns logits that are not computed.

    The head's own forward is back before the call reads the head.
    """

    def __init__(self, head: Any) -> None:
        self.head, self.own = head, vars(head).get("forward")
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()
        self.logits: DeferredLogits | None = None
        self.reason: str | None = "the forward of its class does not call its head"
        vars(head)["forward"] = self

    def restore(self) -> None:
        """Give the head its own forward again, unless that is done."""
        attributes = vars(self.head)
        if attributes.get("forward") is not self:
            return
        if self.own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.thread is not None and self.thread != threading.get_ident():
            forward = self.own or functools.partial(type(self.head).forward, self.head)
            return forward(*args, **kwargs)
        self.restore()
        self.reason = "its head gets more than x"
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            (x,) = args
            records = read_head(self.head, x.device, x.dtype)
            if not isinstance(records, str):
                self.reason, self.logits = None, defer_logits(self.head, x)
                return self.logits
            self.reason = f"its head: {records}"
        return self.head.forward(*args, **kwargs)


def _run_step(forward: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """Return the outputs of a training step's forward, in which the head's logits are deferred."""
    head = module.get_output_embeddings()
    if isinstance(vars(head).get("forward"), _HeadForward):  # another model's, or thread's, step
        return forward(module, *args, **kwargs)
    head_forward = _HeadForward(head)
    try:
        outputs = forward(module, *args, **kwargs)
    finally:
        head_forward.restore()
    reason, logits = head_forward.reason, head_forward.logits
    if logits is not None:
        outputs = _without_logits(outputs)
        reason = logits.op
        logits.call.nodes.clear()  # which refer to each other
    if not torch.compiler.is_compiling():
        module._logits_reason = reason
    return outputs


def _without_logits(outputs: Any) -> Any:
    """Return a model's outputs without the logits that its loss did not need.

    Logits that something needed, or without a loss, are computed.
    """

    def tensor_of(value: Any) -> Any:
        if type(value) is not DeferredLogits:
            return value
        if value.call.has_loss and value.op is None:
            return None
        return value.computed("no cross_entropy in the forward")

    if isinstance(outputs, tuple):
        given = [(value, tensor_of(value)) for value in outputs]
        return tuple(new for old, new in given if old is None or new is not None)
    return type(outputs)(**{name: tensor_of(value) for name, value in outputs.items()})
