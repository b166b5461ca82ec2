"""StableLoRALinear: Xavier's start, and gradients whose joint norm is cut."""

import math

import torch

from lora_kernels.layers import StableLoRALinear
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_same, double, inputs, randomize

LIMIT = 0.25


def test_xaviers_start() -> None:
    torch.manual_seed(0)
    layer = StableLoRALinear(512, N, r=R)
    bound, n = math.sqrt(6 / (R + 512)), R * 512
    low, high = layer.lora_A.min().item(), layer.lora_A.max().item()
    assert -bound <= low < -0.99 * bound and 0.99 * bound < high <= bound
    # Four standard errors of n uniform numbers: of the mean, and of the standard deviation, whose
    # relative one is √((kurtosis − 1) / 4n), with a kurtosis of 1.8.
    sd = bound / math.sqrt(3)
    assert abs(layer.lora_A.mean().item()) < 4 * sd / math.sqrt(n)
    assert abs(layer.lora_A.std().item() / sd - 1) < 4 * math.sqrt(0.2 / n)
    assert not layer.lora_B.any()


def test_gradients_within_the_limit_stay_as_they_are() -> None:
    for factor, is_cut in ((1.01, False), (0.99, True)):
        layer = randomize(StableLoRALinear(K, N, r=R, alpha=ALPHA))
        layer(inputs(M, K)).square().sum().backward()
        grads = [p.grad.clone() for p in (layer.lora_A, layer.lora_B)]
        layer.max_grad_norm = factor * torch.stack([g.norm() for g in grads]).norm().item()
        layer.clip_gradients()
        for param, grad in zip((layer.lora_A, layer.lora_B), grads, strict=True):
            assert torch.equal(param.grad, grad) is not is_cut


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
