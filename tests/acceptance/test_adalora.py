"""AdaLoRA: the gate E ⊙ mask on the ranks, its gradients, and the allocation of a budget."""

import torch
from torch import nn

from lora_kernels.layers import AdaLoRALinear, RankAllocator
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
    layer = randomize(AdaLoRALinear(K, N, r=R, alpha=ALPHA))
    layer.rank_mask[1] = False
    x = inputs(M, K).requires_grad_()
    y = layer(x)
    X = x.detach().double().requires_grad_()
    A, B, E, W = double(layer, "lora_A", "lora_B", "lora_E", "weight")
    want = X @ W.T + ALPHA / R * ((X @ A.T) * E * layer.rank_mask) @ B.T
    assert_same(y, want)
    got = gradients(y, {"x": x, "A": layer.lora_A, "B": layer.lora_B, "E": layer.lora_E})
    assert_all_same(got, gradients(want, {"x": X, "A": A, "B": B, "E": E}))
    assert got["E"][1] == 0


def test_the_budget_goes_where_it_matters() -> None:
    """One of two layers has something to learn, and it keeps the ranks."""
    torch.manual_seed(0)
    useful, idle = AdaLoRALinear(16, 16, r=4, alpha=8), AdaLoRALinear(16, 16, r=4, alpha=8)
    model = nn.ModuleList([useful, idle])
    x = inputs(64, 16)
    with torch.no_grad():
        target = useful(x) + x @ inputs(16, 16, seed=4) / 4
        same = idle(x)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    allocator = RankAllocator(model, target_rank=2, total=60, warmup=10, final=20)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (useful(x) - target).square().mean() + (idle(x) - same).square().mean()
        loss.backward()
        optimizer.step()
        kept = allocator.step()
    assert kept == 4
    assert useful.current_rank > idle.current_rank
