"""`fuse(model, loss=True)`: causal language models whose training loss needs no logits in memory.

transformers' `loss_function` receives finished logits, so the models get another forward. The new
forward mirrors `XForCausalLM.forward` from the hidden states on, for the classes of `LOGITS`. Their
forwards differ only in how they transform the logits. The new forward runs in training with labels.
The class's forward runs evaluation, generation, and calls for which `call_reason` gives a reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from ..core.record import CodePath, Record, path_reason
from ..ops.context import unfused_context
from ..ops.head import lora_linear_cross_entropy
from .adapters import add_bias, lora_bias, share_calls, stack_records
from .base import readable_weight
from .eligibility import replaced_reason
from .frozen import StreamedLinear
from .linear import Fused
from .modules import hooks_of, original_forward, patched_reason
from .read import active_names, read, read_base
from .zero3 import is_gathered_in_call, is_partitioned

# Class of transformers -> logit_scale and logit_softcap of a model.
_Logits = Callable[[Any], tuple[float, float | None]]


def _default_options(model: Any) -> tuple[float, float | None]:
    return 1.0, None


def _softcap_options(model: Any) -> tuple[float, float | None]:
    return 1.0, model.config.final_logit_softcapping


def _scale_options(model: Any) -> tuple[float, float | None]:
    return model.logit_scale, None


def _divisor_options(model: Any) -> tuple[float, float | None]:
    return 1.0 / model.config.logits_scaling, None


_UNSCALED = (
    "Arcee Cwm Ernie4_5 Exaone4 Gemma Glm Glm4 Helium Lfm2 Llama Ministral Mistral Nemotron Olmo "
    "Olmo2 Olmo3 Phi Phi3 Qwen2 Qwen3 SeedOss SmolLM3 StableLm Starcoder2"
)
LOGITS: dict[str, _Logits] = {
    f"{family}ForCausalLM": logits
    for families, logits in (
        (_UNSCALED, _default_options),
        ("Gemma2 Gemma3 VaultGemma", _softcap_options),
        ("Cohere Cohere2", _scale_options),
        ("Granite", _divisor_options),
    )
    for family in families.split()
}
# Fields of `CausalLMOutputWithPast`. Their names depend on the version of transformers.
_OUTPUTS = ("cache", "past_key_values", "hidden_states", "attentions")


# The operands of a head that the loss without logits takes.
LOSS = CodePath(
    "the loss without logits",
    (
        frozenset(
            {"dropout_p", "others", "is_transposed", "scaling", "lora_bias", "rank_gate", "ranknum"}
        ),
    ),
)


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
        for name in ("forward", "_old_forward"):  # accelerate stores the forward that it wraps
            forward = vars(module).get(name)
            if getattr(getattr(forward, "__func__", None), "is_fused_loss", False):
                if name == "forward":
                    del module.forward
                else:
                    setattr(module, name, MethodType(type(module).forward, module))
        vars(module).pop("_loss_requested", None)


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


def _owner(cls: Any) -> str:
    """Return the name of the class that defines the forward; "" if not a class of transformers."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    is_transformers = owner.__module__.startswith("transformers.models.")
    return owner.__name__ if is_transformers else ""


def has_fused_loss(module: Any) -> bool:
    """Return True if the instance's forward is the one that this file builds."""
    forward = vars(module).get("forward")
    return getattr(getattr(forward, "__func__", None), "is_fused_loss", False)


def model_reason(module: Any) -> str | None:
    """Return why the loss of a causal language model is left to transformers, or None."""
    cls = type(module)
    if _owner(cls) not in LOGITS:
        return f"the forward of {cls.__name__} is not covered in this version"
    if original_forward(cls) is None:
        return f"{cls.__name__}.forward was replaced"
    return None if has_fused_loss(module) else patched_reason(module)


def call_reason(module: Any, device: torch.device, x_dtype: torch.dtype) -> str | None:
    """Return why the next training step computes logits of hidden states in x_dtype, or None."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if (context_reason := unfused_context()) is not None:
        return context_reason
    if module.loss_function is not ForCausalLMLoss:
        return "its loss_function was replaced"
    records = read_head(module.get_output_embeddings(), device, x_dtype)
    return f"its head: {records}" if isinstance(records, str) else None


def read_head(head: Any, device: torch.device, x_dtype: torch.dtype) -> list[Record] | str:
    """Return the records of an output embedding, one without an adapter if it has none.

    Returns the reason (a string) if the head is called as a module for x on this device.
    """
    if is_gathered_in_call(head) or is_partitioned(getattr(head, "weight", None)):
        return "DeepSpeed's ZeRO-3 gathers it when it is called"
    if any(hooks_of(head)):
        return "a hook sits on it"
    is_adapted = isinstance(head, lora.LoraLayer)
    if is_adapted:
        if not isinstance(head, Fused):
            return f"PEFT's {type(head).__name__} is not covered here, or not fused"
        if (reason := replaced_reason(type(head)) or patched_reason(head)) is not None:
            return reason
        if head.disable_adapters and head.merged:
            return "its adapters are merged and disabled"
        if head.mixed_batch is not None:  # of the last call; "__base__" alone names no adapter
            return "rows name their adapters"
        if has_active_adapter(head):
            records = read(head, device, x_dtype)
            if isinstance(records, str):
                return records
            if len(share_calls(records, device.type, None)) > 1:
                return "several adapters, each with dropout of its own"
            return path_reason(records, LOSS) or records
    base: Any = head.get_base_layer() if is_adapted else head
    if type(base) is StreamedLinear:
        return [Record(base._parameters["weight"], None, None, base._parameters["bias"])]
    record = read_base(base, device)
    return record.called or [record]


def has_active_adapter(layer: Any) -> bool:
    """Return True if a call adds adapters to the base layer's result."""
    return not (layer.disable_adapters or layer.merged) and bool(active_names(layer))


def operands_of_head(head: Any, x: Tensor) -> tuple[Record, torch.dtype | None]:
    """Return one record of a head for x, with the operand of its weight, and the base GEMM's dtype.

    head: an output embedding that `read_head` reads.
    """
    records = read_head(head, x.device, x.dtype)
    assert not isinstance(records, str)
    record = records[0]
    base = head.get_base_layer() if isinstance(head, lora.LoraLayer) else head
    weight, compute_dtype = readable_weight(base, x)
    if record.lora_A is not None:
        record = stack_records(records)._replace(bias=add_bias(record.bias, lora_bias(records)))
        if record.rank_gate is not None:
            B, gate = record.lora_B, record.rank_gate
            record = record._replace(lora_B=B * gate.to(B.dtype))
    return record._replace(weight=weight), compute_dtype


@functools.cache
def _forward_of(cls: Any) -> Any:
    """Return the class's forward, with a loss that needs no logits in training."""
    import inspect

    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils.generic import can_return_tuple

    original_forward = cls.forward
    names = list(inspect.signature(original_forward).parameters)[1:]
    outputs = [name for name in _OUTPUTS if name in CausalLMOutputWithPast.__dataclass_fields__]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def run(self: Any, labels: Tensor, **kwargs: Any) -> Any:
        accepted = _arguments_of(type(self.model).forward)
        base_outputs = self.model(
            **{n: t for n, t in kwargs.items() if accepted is None or n in accepted}
        )
        x, logits = base_outputs.last_hidden_state, None
        # As in transformers, the loss gets the arguments that the forward does not name.
        loss_kwargs = {name: value for name, value in kwargs.items() if name not in names}
        if call_reason(self, x.device, x.dtype) is None:
            loss = _loss(self, x, labels, **loss_kwargs)
        else:
            logits = _logits(self, x)
            sizes = {"vocab_size": self.config.vocab_size}
            loss = self.loss_function(logits=logits, labels=labels, **sizes, **loss_kwargs)
        others = {name: getattr(base_outputs, name, None) for name in outputs}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    @functools.wraps(original_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.forward is not original_forward:  # replaced after `fuse`
            return cls.forward(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if kwargs.get("labels") is None or not self.training or not keeps_all:
            return original_forward(self, **kwargs)
        kwargs.pop("logits_to_keep", None)
        return run(self, kwargs.pop("labels"), **kwargs)

    forward.is_fused_loss = True  # type: ignore[attr-defined]
    return forward


@functools.cache
def _arguments_of(forward: Any) -> frozenset[str] | None:
    """Return the names of the arguments that a forward takes; None if it takes any.

    Models of transformers 4.56 refuse arguments that only the loss reads.
    """
    import inspect

    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_any else frozenset(p.name for p in parameters)


def _logits(module: Any, x: Tensor) -> Tensor:
    """Return the same logits as the class's forward."""
    scale, cap = LOGITS[_owner(type(module))](module)
    head: Any = module.get_output_embeddings()
    logits: Tensor = head(x)
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _loss(
    module: Any,
    x: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return `ForCausalLMLoss` of the hidden states x [..., S, K] and labels [..., S]."""
    record, compute_dtype = operands_of_head(module.get_output_embeddings(), x)
    scale, cap = LOGITS[_owner(type(module))](module)
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = lora_linear_cross_entropy(
        x,
        record.weight,
        record.lora_A,
        record.lora_B,
        shift_labels.to(x.device),
        record.scaling,
        record.bias,
        ignore_index=ignore_index,
        logit_softcap=cap,
        logit_scale=scale,
        reduction="mean" if num_items_in_batch is None else "sum",
        dropout_p=record.dropout_p,
        compute_dtype=compute_dtype,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
