"""The output embedding of a language model: its operands for the loss without logits."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

from ..core.record import CodePath, Record, path_reason
from .adapters import add_bias, lora_bias, share_calls, stack_records
from .base import readable_weight
from .eligibility import replaced_reason
from .frozen import StreamedLinear
from .linear import Fused
from .modules import hooks_of, patched_reason
from .read import active_names, read, read_base
from .zero3 import is_gathered_in_call, is_partitioned

# The operands of a head that the loss without logits takes.
LOSS = CodePath(
    "the loss without logits",
    (
        frozenset(
            {"dropout_p", "others", "is_transposed", "scaling", "lora_bias", "rank_gate", "ranknum"}
        ),
    ),
)


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
