"""LoRA+: lora_B learns `ratio` times as fast as lora_A."""

import torch
from torch import nn

from lora_kernels.layers import LoRALinear, lora_plus_parameter_groups
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_same, double, inputs, randomize

LR, RATIO = 0.25, 8.0


def test_one_step_of_sgd() -> None:
    model = nn.Sequential(LoRALinear(K, N, r=R, alpha=ALPHA), nn.LayerNorm(N))
    layer = randomize(model)[0]
    groups = lora_plus_parameter_groups(model, lr=LR, ratio=RATIO)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(3, LR), (1, LR * RATIO)]
    A, B, W = double(layer, "lora_A", "lora_B", "weight")
    before = {"lora_A": layer.lora_A.detach().clone(), "lora_B": layer.lora_B.detach().clone()}
    x = inputs(M, K)
    model(x).square().mean().backward()  # the norm's weight is one, so that this is its mean square
    torch.optim.SGD(groups).step()

    y = x.double() @ W.T + ALPHA / R * (x.double() @ A.T) @ B.T
    loss = nn.functional.layer_norm(y, (N,)).square().mean()
    grads = torch.autograd.grad(loss, [A, B])
    for name, grad, lr in zip(before, grads, (LR, LR * RATIO), strict=True):
        moved = getattr(layer, name).detach() - before[name]
        # The mean square of what a norm returns hardly moves: gradients near 0, the update rounded
        # to the weight's spacing.
        spacing = 2.0**-23 * before[name].norm() / (lr * grad.norm())
        assert_same(moved, -lr * grad, rtol=2.0**-10 + spacing.item(), what=name)
