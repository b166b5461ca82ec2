"""DoRA: y = magnitude ⊘ ‖W + s·BA‖ ⊙ (x·(W + s·BA)ᵀ), the norm a constant in the backward."""

import torch
from torch import Tensor, nn

from lora_kernels.layers import DoRALinear
from tests.acceptance.formula import (
    ALPHA,
    K,
    M,
    N,
    R,
    assert_formula,
    assert_same,
    inputs,
    randomize,
)


def test_output_and_gradients() -> None:
    linear = nn.Linear(K, N)
    layer = randomize(DoRALinear.from_linear(linear, r=R, alpha=ALPHA))
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.2 * inputs(N, seed=4))

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
        direction = linear.weight.double() + ALPHA / R * lora_B @ lora_A
        norm = direction.norm(dim=1).detach()
        return x @ (magnitude / norm)[:, None].mul(direction).T + linear.bias.double()

    assert_formula(layer, formula, inputs(M, K))


def test_starts_as_its_base() -> None:
    linear, x = nn.Linear(K, N), inputs(M, K)
    layer = DoRALinear.from_linear(linear, r=R, alpha=ALPHA)
    assert_same(layer(x), linear(x))
    assert_same(layer.magnitude, linear.weight.norm(dim=1))
