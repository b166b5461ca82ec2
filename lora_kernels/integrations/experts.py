"""`experts_implementation="lora_kernels"` for transformers' mixtures of experts."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..layers.experts import experts_forward, unsupported_reason

NAME = "lora_kernels"


def lora_kernels_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute frozen experts, dense or 4-bit, by `lora_experts_linear`."""
    if (reason := unsupported_reason(self)) is not None:
        raise TypeError(f"experts_implementation={NAME!r}: {reason}")
    return experts_forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, lora_kernels_experts_forward)
