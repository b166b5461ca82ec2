"""AdaLoRA: the gate E ⊙ mask on the ranks, its gradients, and the allocation of a budget."""

import torch
from torch import Tensor, nn

from lora_kernels.layers import AdaLoRALinear, RankAllocator
from tests.acceptance.formula import ALPHA, K, M, N, R, assert_formula, inputs, randomize


def test_output_and_gradients() -> None:
    layer = randomize(AdaLoRALinear(K, N, r=R, alpha=ALPHA))
    layer.rank_mask[1] = False

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor) -> Tensor:
        update = ((x @ lora_A.T) * lora_E * layer.rank_mask) @ lora_B.T
        return x @ layer.weight.double().T + ALPHA / R * update

    assert assert_formula(layer, formula, inputs(M, K))["lora_E"][1] == 0


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
