"""StableLoRALinear: Xavier's start, and gradients whose joint norm is cut."""

import math

import torch

from lora_kernels.layers import StableLoRALinear
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_same, double, inputs, randomize

LIMIT = 0.25


def test_xaviers_start() -> None:
    torch.manual_seed(0)
    layer = StableLoRALinear(512, N, r=R)
    bound = math.sqrt(6 / (R + 512))
    largest = layer.lora_A.abs().max().item()
    assert 0.99 * bound < largest <= bound
    assert layer.lora_A.std().item() < 1.05 * bound / math.sqrt(3)
    assert not layer.lora_B.any()


def test_gradients_are_cut_together() -> None:
    layer = randomize(StableLoRALinear(K, N, r=R, alpha=ALPHA, max_grad_norm=LIMIT))
    x = inputs(M, K)
    layer(x).square().sum().backward()
    norm = layer.clip_gradients()

    A, B, W = double(layer, "lora_A", "lora_B", "weight")
    X = x.double()
    loss = (X @ W.T + ALPHA / R * (X @ A.T) @ B.T).square().sum()
    grads = torch.autograd.grad(loss, [A, B])
    joint = torch.stack([g.norm() for g in grads]).norm()
    assert joint > LIMIT
    assert_same(norm, joint)
    for param, grad in zip((layer.lora_A, layer.lora_B), grads, strict=True):
        assert_same(param.grad, grad * LIMIT / joint, rtol=2.0**-16)
