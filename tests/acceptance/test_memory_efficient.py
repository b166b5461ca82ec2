"""MemoryEfficientLoRALinear: x alone is kept for the backward, and the gradients are the same."""

import torch

from lora_kernels.layers import LoRALinear, MemoryEfficientLoRALinear
from tests.acceptance.formula import (
    ALPHA,
    K,
    M,
    N,
    R,
    assert_all_same,
    assert_same,
    double,
    gradients,
    inputs,
    randomize,
)


def kept(layer: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Size]]:
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(t.shape), t)[1], lambda t: t
    ):
        y = layer(x)
    return y, shapes


def test_output_gradients_and_what_is_kept() -> None:
    layer = randomize(MemoryEfficientLoRALinear(K, N, r=R, alpha=ALPHA))
    x = inputs(M, K).requires_grad_()
    y, shapes = kept(layer, x)
    assert torch.Size([M, R]) not in shapes
    assert torch.Size([M, N]) not in shapes
    assert torch.Size([M, R]) in kept(LoRALinear(K, N, r=R, alpha=ALPHA), x)[1]

    X = x.detach().double().requires_grad_()
    A, B, W = double(layer, "lora_A", "lora_B", "weight")
    want = X @ W.T + ALPHA / R * (X @ A.T) @ B.T
    assert_same(y, want)
    assert_all_same(
        gradients(y, {"x": x, "A": layer.lora_A, "B": layer.lora_B}),
        gradients(want, {"x": X, "A": A, "B": B}),
    )
