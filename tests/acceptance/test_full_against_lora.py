"""The full-against-LoRA comparison: ΔW by full fine-tuning, and what of it a rank can hold."""

import torch
from torch import nn

from lora_kernels.layers import LoRALinear, count_lora_parameters
from tests.acceptance.formula import assert_same, inputs

K, N, ROWS, TRUE_RANK = 24, 20, 256, 3


def task() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Targets that the base misses by a ΔW of rank 3."""
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=False)
    delta = inputs(N, TRUE_RANK, seed=2) @ inputs(TRUE_RANK, K, seed=3) / K
    x = inputs(ROWS, K)
    with torch.no_grad():
        return base, x, x @ (base.weight + delta).T


def fitted(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_rank_that_is_enough_reaches_the_full_one() -> None:
    base, x, y = task()
    start = (base(x) - y).square().mean().item()
    found = {}
    for r in (1, TRUE_RANK):
        layer = LoRALinear.from_linear(task()[0], r=r, alpha=2.0 * r)
        assert count_lora_parameters(layer).lora == r * (K + N)
        found[r] = fitted(layer, x, y)
    full = fitted(task()[0], x, y)
    assert full < 0.01 * start
    assert found[TRUE_RANK] < 0.01 * start
    assert found[1] > 10 * found[TRUE_RANK]


def test_loras_gradients_are_the_full_ones_through_A_and_B() -> None:
    """dA = s·Bᵀ·dW and dB = s·dW·Aᵀ, where dW is the gradient of full fine-tuning."""
    base, x, y = task()
    layer = LoRALinear.from_linear(base, r=TRUE_RANK, alpha=7.0)
    with torch.no_grad():
        layer.lora_B.copy_(inputs(N, TRUE_RANK, seed=5))
    (layer(x) - y).square().mean().backward()

    A, B, scale = layer.lora_A.detach().double(), layer.lora_B.detach().double(), 7.0 / TRUE_RANK
    merged = (base.weight.double() + scale * B @ A).detach().requires_grad_()
    (x.double() @ merged.T - y.double()).square().mean().backward()
    assert_same(layer.lora_A.grad, scale * B.T @ merged.grad)
    assert_same(layer.lora_B.grad, scale * merged.grad @ A.T)
