"""LoRALinear: y = x·Wᵀ + b + (alpha/r)·(x·Aᵀ)·Bᵀ and its gradients."""

import torch
from torch import nn

from lora_kernels.layers import LoRALinear
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


def test_output_and_gradients() -> None:
    linear = nn.Linear(K, N)
    layer = randomize(LoRALinear.from_linear(linear, r=R, alpha=ALPHA))
    x = inputs(M, K).requires_grad_()
    y = layer(x)

    X = x.detach().double().requires_grad_()
    A, B = double(layer, "lora_A", "lora_B")
    want = X @ linear.weight.double().T + linear.bias.double() + ALPHA / R * (X @ A.T) @ B.T
    assert_same(y, want)
    assert_all_same(
        gradients(y, {"x": x, "A": layer.lora_A, "B": layer.lora_B}),
        gradients(want, {"x": X, "A": A, "B": B}),
    )


def test_starts_as_its_base_and_merges() -> None:
    linear, x = nn.Linear(K, N), inputs(M, K)
    layer = LoRALinear.from_linear(linear, r=R, alpha=ALPHA)
    assert_same(layer(x), linear(x))
    randomize(layer).eval()
    before = layer(x)
    layer.merge()
    assert_same(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer(x), before)
