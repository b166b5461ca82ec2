"""MemoryEfficientLoRALinear: x alone is kept for the backward, and the gradients are the same."""

import torch

from lora_kernels.layers import LoRALinear, MemoryEfficientLoRALinear
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_formula, inputs, randomize


def kept(layer: LoRALinear, x: torch.Tensor) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(t.shape), t)[1], lambda t: t
    ):
        layer(x)
    return shapes


def test_output_gradients_and_what_is_kept() -> None:
    layer = randomize(MemoryEfficientLoRALinear(K, N, r=R, alpha=ALPHA))
    x = inputs(M, K).requires_grad_()
    shapes = kept(layer, x)
    assert torch.Size([M, R]) not in shapes
    assert torch.Size([M, N]) not in shapes
    assert torch.Size([M, R]) in kept(LoRALinear(K, N, r=R, alpha=ALPHA), x)

    def formula(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.double().T + ALPHA / R * (x @ lora_A.T) @ lora_B.T

    assert_formula(layer, formula, x)
