"""DoRA: y = magnitude ⊘ ‖W + s·BA‖ ⊙ (x·(W + s·BA)ᵀ), the norm a constant in the backward."""

import torch
from torch import nn

from lora_kernels.layers import DoRALinear
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
    layer = randomize(DoRALinear.from_linear(linear, r=R, alpha=ALPHA))
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.2 * inputs(N, seed=4))
    x = inputs(M, K).requires_grad_()
    y = layer(x)
    X = x.detach().double().requires_grad_()
    A, B, m, W = double(layer, "lora_A", "lora_B", "magnitude", "weight")
    direction = W + ALPHA / R * B @ A
    norm = direction.norm(dim=1).detach()
    want = X @ (m / norm)[:, None].mul(direction).T + linear.bias.double()
    assert_same(y, want)
    params = {"x": x, "A": layer.lora_A, "B": layer.lora_B, "m": layer.magnitude}
    assert_all_same(gradients(y, params), gradients(want, {"x": X, "A": A, "B": B, "m": m}))


def test_starts_as_its_base() -> None:
    linear, x = nn.Linear(K, N), inputs(M, K)
    layer = DoRALinear.from_linear(linear, r=R, alpha=ALPHA)
    assert_same(layer(x), linear(x))
    assert_same(layer.magnitude, linear.weight.norm(dim=1))
