"""`patch()`: TRL's SFT and DPO trainers with an adapter on `lm_head`.

TRL computes log-probabilities from `lm_head.weight`, which would drop an adapter, so it refuses a
head with an adapter. After `patch()` its trainers compute log-probabilities by
`lora_linear_log_probs` of the head and its adapter.

`patch()` replaces names of `trl.trainer.sft_trainer`, `dpo_trainer` and `utils`:

- `BaseTunerLayer` of the trainers' guard, by a class of which no LoRA layer is an instance;
- `add_fused_lm_head`, by a function that stores the model's head during a call;
- `_ChunkedLogProbFunction`, by a class whose `apply` reads that head;
- `_use_triton` of utils, so that rows without a label are left out on every device.
"""

from __future__ import annotations

import functools
import inspect
import types
from contextvars import ContextVar
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.record import Record
from ..ops.head import lora_linear_log_probs
from ..peft import fuse
from ..peft.head import operands_of_head, read_head

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
    original = utils.add_fused_lm_head
    for module in trainers:
        _replace(module, "BaseTunerLayer", _OtherTunerLayer)
        _replace(module, "add_fused_lm_head", functools.partial(_add_fused_lm_head, original))
    _replace(utils, "_ChunkedLogProbFunction", _LogProbs)
    _replace(utils, "_use_triton", lambda device: True)


def _unsupported_reason(utils: Any, trainers: Any) -> str | None:
    """Return how TRL differs from the version that `patch` was written for, or None.

    A head that does not call the replaced kernel would drop the adapter.
    """
    for module in trainers:
        for name in ("BaseTunerLayer", "add_fused_lm_head"):
            if not hasattr(module, name):
                return f"{module.__name__} has no {name}"
    code = getattr(getattr(utils, "add_fused_lm_head", None), "__code__", None)
    nested_codes = [
        const for const in getattr(code, "co_consts", ()) if isinstance(const, types.CodeType)
    ]
    called_names = {name for const in nested_codes for name in const.co_names}
    for name in ("_ChunkedLogProbFunction", "_use_triton"):
        if name not in called_names or not hasattr(utils, name):
            return f"head does not call {name}"
    got = [*inspect.signature(utils._ChunkedLogProbFunction.forward).parameters][1:]
    if got != (want := [*inspect.signature(_LogProbs.apply).parameters]):
        return f"_ChunkedLogProbFunction takes {', '.join(got)} in place of {', '.join(want)}"
    return None


def unpatch() -> None:
    """Undo `patch`. Training a model whose trainer was made before `unpatch` then raises."""
    for (module, name), value in _replaced.items():
        setattr(module, name, value)
    _replaced.clear()


def _replace(module: Any, name: str, value: Any) -> None:
    _replaced[module, name] = getattr(module, name)
    setattr(module, name, value)


class _OtherTunerLayerMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, BaseTunerLayer) and not isinstance(instance, lora.LoraLayer)


class _OtherTunerLayer(metaclass=_OtherTunerLayerMeta):
    """A class whose instances, by `isinstance`, are PEFT's layers other than LoRA layers."""


def _add_fused_lm_head(original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Add TRL's head to the model, and store the model's head during each call of the model.

    Raises ValueError if the head's adapter is not covered.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, lora.LoraLayer):
        holder: Any = [head]
        fuse(nn.ModuleList(holder))
        weight: Any = head.get_base_layer().weight
        records = read_head(head, weight.device, model.dtype)
        if isinstance(records, str):
            raise ValueError(f"model: got an adapter on its head, which is not covered: {records}")
    original(model, *args, **kwargs)
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original_forward(*args, **kwargs)
        if not _replaced:
            raise RuntimeError(
                "lora_kernels.integrations.trl.unpatch was called, and this model's head is that "
                "of patch: make a new trainer, or call patch again"
            )
        token = _head.set(self.get_output_embeddings())
        try:
            return original_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            _head.reset(token)

    model.forward = types.MethodType(forward, model)


class _LogProbs:
    """TRL's `_ChunkedLogProbFunction` for the stored head and its adapter."""

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
        head, compute_dtype = _operands(_head.get(), hidden, weight, bias)
        result = lora_linear_log_probs(
            hidden,
            head.weight,
            head.lora_A,
            head.lora_B,
            targets,
            cast(float, head.scaling),
            head.bias,
            temperature=temperature,
            outputs=[name for name in outputs if name != "log_probs"],
            logit_softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            dropout_p=head.dropout_p,
            compute_dtype=compute_dtype,
        )
        return (
            result.log_probs,
            result.entropy,
            result.log_sum_sq_probs,
            result.mean_logits,
            result.is_top1,
        )


def _operands(
    head: nn.Module | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Record, torch.dtype | None]:
    """Return the record of `head`, with its operands, and the base GEMM's dtype.

    A head without an adapter gets TRL's weight and bias, which may be gathered from several
    processes.
    """
    records: Any = "it is unknown"
    if head is not None:
        records = read_head(head, hidden.device, hidden.dtype)
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    if not isinstance(records, str):
        record, compute_dtype = operands_of_head(head, hidden)
        if isinstance(record.weight, Tensor) and not is_autocast:
            record = record._replace(weight=record.weight.to(hidden.dtype))  # like TRL
        return record, compute_dtype
    if isinstance(head, lora.LoraLayer):
        raise RuntimeError(f"the adapter on the model's head is not covered: {records}")
    return Record(weight if is_autocast else weight.to(hidden.dtype), None, None, bias), None
