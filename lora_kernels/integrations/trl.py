"""`patch()`: TRL's SFT and DPO trainers with an adapter on `lm_head`.

TRL computes log-probabilities from `lm_head.weight`, which would drop an adapter, and refuses one.
After `patch()` its trainers compute them by `lora_linear_log_probs` of the head and its adapter.

`patch()` replaces names of `trl.trainer.sft_trainer`, `dpo_trainer` and `utils`:

- `BaseTunerLayer` of the trainers' guard, by a class that has no LoRA layer as an instance;
- `add_fused_lm_head`, by one that remembers the model's head for the length of a call;
- `_ChunkedLogProbFunction`, by a class whose `apply` reads that head;
- `_use_triton` of utils, so that rows without a label are left out on every device.
"""

from __future__ import annotations

import functools
import inspect
import types
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ops.head import lora_linear_log_probs
from ..peft import fuse
from ..peft.loss import Head, head_of, head_reason

_replaced: dict[tuple[Any, str], Any] = {}  # module and name -> TRL's object, while patched
_head: ContextVar[Any] = ContextVar("lora_kernels_trl_head", default=None)


def patch() -> None:
    """Let TRL's SFTTrainer and DPOTrainer train an adapter on `lm_head`; see the module.

    Call it before a trainer is made. It may be called again. `unpatch` undoes it.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL has a head that `patch` does not know.

    >>> from lora_kernels.integrations import trl
    >>> trl.patch()  # doctest: +SKIP
    """
    import trl
    from trl.trainer import dpo_trainer, sft_trainer, utils

    if _replaced:
        return
    trainers: Any = (sft_trainer, dpo_trainer)
    if reason := _unsupported_reason(utils, trainers):
        raise RuntimeError(
            f"lora_kernels.integrations.trl.patch: got TRL {trl.__version__}, whose {reason}; "
            "want one with the head of TRL 1.16"
        )
    trls_own = utils.add_fused_lm_head
    for module in trainers:
        _replace(module, "BaseTunerLayer", _RefusedTuner)
        _replace(module, "add_fused_lm_head", functools.partial(_add_fused_lm_head, trls_own))
    _replace(utils, "_ChunkedLogProbFunction", _LogProbs)
    _replace(utils, "_use_triton", lambda device: True)


def _unsupported_reason(utils: Any, trainers: Any) -> str | None:
    """Return what differs from the TRL that was read, or None.

    A head that does not call the replaced kernel would drop the adapter.
    """
    for module in trainers:
        for name in ("BaseTunerLayer", "add_fused_lm_head"):
            if not hasattr(module, name):
                return f"{module.__name__} has no {name}"
    code = getattr(getattr(utils, "add_fused_lm_head", None), "__code__", None)
    inner = [each for each in getattr(code, "co_consts", ()) if isinstance(each, types.CodeType)]
    called = {name for each in inner for name in each.co_names}
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        if name not in called or not hasattr(utils, name):
            return f"head does not call {name}"
    got = [*inspect.signature(utils._ChunkedLogProbFunction.forward).parameters][1:]
    if got != (want := [*inspect.signature(_LogProbs.apply).parameters]):
        return f"_ChunkedLogProbFunction takes {', '.join(got)} in place of {', '.join(want)}"
    return None


def unpatch() -> None:
    """Undo `patch`. A model whose trainer was made in between raises if it is trained then."""
    for (module, name), value in _replaced.items():
        setattr(module, name, value)
    _replaced.clear()


def _replace(module: Any, name: str, value: Any) -> None:
    _replaced[module, name] = getattr(module, name)
    setattr(module, name, value)


class _IsRefused(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, BaseTunerLayer) and not isinstance(instance, lora.LoraLayer)


class _RefusedTuner(metaclass=_IsRefused):
    """PEFT's layers other than LoRA's, as far as `isinstance` tells."""


def _add_fused_lm_head(trls_own: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Add TRL's head to the model, and remember the model's head in each call of it.

    Raises ValueError if the head's adapter is not covered.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, lora.LoraLayer):
        holder: Any = [head]
        fuse(nn.ModuleList(holder))
        weight: Any = head.get_base_layer().weight
        reason = head_reason(head, weight.device, model.dtype)
        if reason is not None:
            raise ValueError(f"model: got an adapter on its head, which is not covered: {reason}")
    trls_own(model, *args, **kwargs)
    inner = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return inner(*args, **kwargs)
        if not _replaced:
            raise RuntimeError(
                "lora_kernels.integrations.trl.unpatch was called, and this model's head is that "
                "of patch: make a new trainer, or call patch again"
            )
        token = _head.set(self.get_output_embeddings())
        try:
            return inner(*args, fused_lm_head=True, **kwargs)
        finally:
            _head.reset(token)

    model.forward = types.MethodType(forward, model)


class _LogProbs:
    """`ChunkedLogProbFunction` of TRL, of the head that is called and its adapter."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        head = _head_arguments(_head.get(), hidden, weight, bias)
        found = lora_linear_log_probs(
            hidden,
            head.weight,
            head.lora_A,
            head.lora_B,
            targets,
            head.scaling,
            head.bias,
            temperature=temperature,
            outputs=[name for name in outputs if name != "log_probs"],
            logit_softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            dropout_p=head.dropout_p,
            compute_dtype=head.compute_dtype,
        )
        return (
            found.log_probs,
            found.entropy,
            found.log_sum_sq_probs,
            found.mean_logits,
            found.is_top1,
        )


def _head_arguments(
    head: nn.Module | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Head:
    """Return the arguments of `head`.

    A head without an adapter has the weight and bias that TRL gives, which may be gathered from
    several processes.
    """
    reason = "it is unknown"
    if head is not None:
        reason = head_reason(head, hidden.device, hidden.dtype) or ""
    if not reason:
        found = head_of(head, hidden)
        if isinstance(found.weight, Tensor) and not torch.is_autocast_enabled(hidden.device.type):
            return found._replace(weight=found.weight.to(hidden.dtype))  # as TRL casts it
        return found
    if isinstance(head, lora.LoraLayer):
        raise RuntimeError(f"the adapter on the model's head is not covered: {reason}")
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    return Head(weight, None, None, 1.0, bias, 0.0, None)
