"""Training only adapter weights: one step of SGD moves lora_A and lora_B, and nothing else."""

import torch
from torch import nn

from lora_kernels.layers import LoRALinear, count_lora_parameters, mark_only_lora_as_trainable
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_same, inputs, randomize


def test_one_step() -> None:
    model = nn.Sequential(
        nn.Linear(K, K), LoRALinear(K, N, r=R, alpha=ALPHA, bias=True), nn.LayerNorm(N)
    )
    mark_only_lora_as_trainable(randomize(model))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["1.lora_A", "1.lora_B"]
    assert count_lora_parameters(model).lora == R * (K + N)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    x = inputs(M, K)
    model(x).square().mean().backward()
    optimizer.step()

    exact = {n: p.double().requires_grad_() for n, p in before.items()}
    h = x.double() @ exact["0.weight"].T + exact["0.bias"]
    update = (h @ exact["1.lora_A"].T) @ exact["1.lora_B"].T
    y = h @ exact["1.weight"].T + exact["1.bias"] + ALPHA / R * update
    loss = nn.LayerNorm(N, dtype=torch.float64)(y).square().mean()
    for name in ("1.lora_A", "1.lora_B"):
        (grad,) = torch.autograd.grad(loss, exact[name], retain_graph=True)
        moved = dict(model.named_parameters())[name].detach() - before[name]
        # The sum was rounded to the weight's spacing, which a small update feels.
        spacing = 2.0**-24 * before[name].norm() / (0.5 * grad.norm())
        assert_same(moved, -0.5 * grad, rtol=2.0**-16 + spacing.item(), what=name)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name]), name
