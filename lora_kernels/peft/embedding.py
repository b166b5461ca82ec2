"""PEFT's LoRA layer over `nn.Embedding`, with one GEMM for all active adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..core.record import CodePath, Record, path_reason
from ..layers.embedding import lookup
from .eligibility import has_hooks, hook_reason, state_reason, tensor_reason
from .linear import Fused
from .modules import original_forward, patched_reason
from .read import NO_ADAPTER, add_variant

_EMBEDDING_FORWARD = original_forward(nn.Embedding)
# The operands that a fused embedding takes.
EMBEDDING = CodePath("an embedding", (frozenset({"others", "scaling"}),))


class FusedEmbedding(Fused, lora.Embedding):
    """PEFT's LoRA layer over an embedding: W[x] + Σ s·A[:, x]ᵀ·Bᵀ, by `layers.embedding.lookup`.

    x [...], int32 or int64 -> [..., N] in the weight's dtype, as in PEFT's own forward. Under
    autocast the low-rank update keeps the adapter's dtype; PEFT rounds it to autocast's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if names is not None or self.mixed_batch is not None:
            self.mixed_batch = None if names is None else tuple(dict.fromkeys(names))
        if args or any(value is not None for value in kwargs.values()):
            return super(Fused, self).forward(x, *args, **kwargs)
        records = read_embedding(self, x.device)
        if isinstance(records, str):
            return super(Fused, self).forward(x, *args, **kwargs)
        base = cast(nn.Embedding, self._modules["base_layer"])
        return lookup(x, base.weight, records, base.padding_idx, base.scale_grad_by_freq)


def read_embedding(layer: Any, device: torch.device) -> list[Record] | str:
    """Return a record for each active adapter of a fused embedding, or the reason.

    The reason (a string) is why PEFT's forward computes an x on this device. lora_A is [R, K], and
    lora_B [N, R].
    """
    if layer.mixed_batch is not None:
        return "the last call named an adapter for each row (adapter_names)"
    reason = state_reason(layer) or _table_reason(layer.base_layer, device)
    if reason is not None:
        return reason
    lora_A = layer._modules["lora_embedding_A"]._parameters
    lora_B = layer._modules["lora_embedding_B"]._parameters
    records = []
    for name in layer.active_adapters:
        if name not in lora_A:
            continue
        if getattr(layer, "input_fns", {}).get(name) or getattr(layer, "output_fns", {}).get(name):
            return f"adapter {name!r} is sharded over devices"
        record: Record | str = Record(
            layer.base_layer.weight,
            lora_A[name],
            lora_B[name],
            None,
            layer.scaling[name],
            0.0,
            name,
        )
        if layer.lora_variant:
            record = add_variant(layer, cast(Record, record), device)
        if not isinstance(record, str):
            record = tensor_reason(device, lora_A=record.lora_A, lora_B=record.lora_B) or record
        if isinstance(record, str):
            return f"adapter {name!r}: {record}"
        records.append(record)
    return (path_reason(records, EMBEDDING) or records) if records else NO_ADAPTER


def _table_reason(base: nn.Module, device: torch.device) -> str | None:
    """Return why calling the base embedding may do more than `F.embedding`."""
    if type(base) is not nn.Embedding:
        return f"the base is a {type(base).__name__}, not exactly nn.Embedding"
    if has_hooks(base):
        return hook_reason(base, "its nn.Embedding")
    if nn.Embedding.forward is not _EMBEDDING_FORWARD:
        return "nn.Embedding.forward was replaced"
    if "forward" in base.__dict__ and (reason := patched_reason(base)):
        return reason
    if base.max_norm is not None:
        return "the base has max_norm, by which each lookup writes to what it looks up in"
    if base.sparse:
        return "the base asks for sparse gradients"
    if hasattr(base, "embed_scale"):
        return "the base has an embed_scale"
    return tensor_reason(device, weight=cast(Tensor, base._parameters["weight"]))
