"""PEFT's LoRA layer over `nn.Embedding`, with one GEMM for all active adapters."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners import lora
from torch import Tensor, nn

from ..layers.embedding import lookup
from .adapters import embedding_adapters_of
from .eligibility import embedding_reason
from .linear import Fused


class FusedEmbedding(Fused, lora.Embedding):
    """PEFT's LoRA layer over an embedding: W[x] + Σ s·A[:, x]ᵀ·Bᵀ, by `layers.embedding.lookup`.

    x [...], int32 or int64 -> [..., N] in the weight's dtype, as in PEFT's own forward. Under
    autocast the low-rank update keeps the adapter's dtype; PEFT rounds it to autocast's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if names is not None or self.mixed_batch is not None:
            self.mixed_batch = None if names is None else tuple(dict.fromkeys(names))
        adapters = embedding_adapters_of(self)
        has_others = args or any(value is not None for value in kwargs.values())
        if has_others or embedding_reason(self, adapters, x.device) is not None:
            return super(Fused, self).forward(x, *args, **kwargs)
        base = cast(nn.Embedding, self._modules["base_layer"])
        factors = [(lora_A, lora_B, scaling) for _, lora_A, lora_B, scaling in adapters]
        return lookup(x, base.weight, factors, base.padding_idx, base.scale_grad_by_freq)
