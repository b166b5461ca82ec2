"""LoRALinear: y = x·Wᵀ + b + (alpha/r)·(x·Aᵀ)·Bᵀ and its gradients."""

import torch
from torch import Tensor, nn

from lora_kernels.layers import LoRALinear
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
    W, bias = linear.weight.double(), linear.bias.double()

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ W.T + bias + ALPHA / R * (x @ lora_A.T) @ lora_B.T

    layer = randomize(LoRALinear.from_linear(linear, r=R, alpha=ALPHA))
    assert_formula(layer, formula, inputs(M, K))


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
