"""PEFT's LoRA layer over `nn.Embedding` with one product for all its adapters.

`forward` and `explain` ask the same `peft_reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..layers.embedding import lookup
from .linear import Fused, _hooks, patched, state_reason, tensor_reason

_EMBEDDING_FORWARD = nn.Embedding.forward


class FusedEmbedding(Fused, lora.Embedding):
    """PEFT's LoRA layer over an embedding: W[x] + Σ s·A[:, x]ᵀ·Bᵀ, by `layers.embedding.lookup`.

    x [...], int32 or int64 -> [..., N] in the weight's dtype, as PEFT's own forward. Under autocast
    the adapter's product stays in its own dtype, where PEFT's is rounded.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if names is not None or self.mixed_batch is not None:
            self.mixed_batch = None if names is None else tuple(dict.fromkeys(names))
        adapters = adapters_of(self)
        more = args or any(value is not None for value in kwargs.values())
        if more or peft_reason(self, adapters, x.device) is not None:
            return super(Fused, self).forward(x, *args, **kwargs)
        base = cast(nn.Embedding, self._modules["base_layer"])
        products = [(lora_A, lora_B, scaling) for _, lora_A, lora_B, scaling in adapters]
        return lookup(x, base.weight, products, base.padding_idx, base.scale_grad_by_freq)


class Adapter(NamedTuple):
    name: str
    lora_A: Tensor  # [R, K]
    lora_B: Tensor  # [N, R]
    scaling: float | Tensor


def adapters_of(layer: Any) -> list[Adapter]:
    """The active adapters, of those that this layer has."""
    lora_A = layer._modules["lora_embedding_A"]._parameters
    lora_B = layer._modules["lora_embedding_B"]._parameters
    return [
        Adapter(name, lora_A[name], lora_B[name], layer.scaling[name])
        for name in layer.active_adapters
        if name in lora_A
    ]


def peft_reason(layer: Any, adapters: Sequence[Adapter], device: torch.device) -> str | None:
    """Why the layer's whole forward is PEFT's own for an x on this device; None where it is not."""
    if layer.mixed_batch is not None:
        return "the last call named an adapter for each row (adapter_names)"
    reason = state_reason(layer, adapters) or _base_reason(layer.base_layer, device)
    if reason is not None:
        return reason
    for name, lora_A, lora_B, _ in adapters:
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            return f"adapter {name!r} is a variant of LoRA ({variant}), not covered in this version"
        if getattr(layer, "input_fns", {}).get(name) or getattr(layer, "output_fns", {}).get(name):
            return f"adapter {name!r} is sharded over devices"
        reason = tensor_reason(device, lora_A=lora_A, lora_B=lora_B)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
    return None


def _base_reason(base: nn.Module, device: torch.device) -> str | None:
    """Why looking up in the base may be more than `F.embedding` on a plain weight on this device,
    or PEFT's lookup in lora_A more than it is here."""
    if type(base) is not nn.Embedding:
        return f"the base is a {type(base).__name__}, not exactly nn.Embedding"
    if any(_hooks(base)):
        return "a hook sits on its nn.Embedding"
    if nn.Embedding.forward is not _EMBEDDING_FORWARD:
        return "nn.Embedding.forward was replaced"
    if "forward" in base.__dict__ and (reason := patched(base)):
        return reason
    if base.max_norm is not None:
        return "the base has max_norm, by which each lookup writes to what it looks up in"
    if base.sparse:
        return "the base asks for sparse gradients"
    if hasattr(base, "embed_scale"):
        return "the base has an embed_scale"
    return tensor_reason(device, weight=cast(Tensor, base._parameters["weight"]))
