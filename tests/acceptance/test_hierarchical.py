"""HierarchicalLoRALinear: Σᵢ wᵢ·(alpha/rᵢ)·(x·Aᵢᵀ)·Bᵢᵀ, its weights wᵢ trained too."""

from lora_kernels.layers import HierarchicalLoRALinear
from tests.acceptance.formula import (
    ALPHA,
    K,
    M,
    N,
    assert_all_same,
    assert_same,
    double,
    gradients,
    inputs,
    randomize,
)

RANKS, WEIGHTS = (2, 3, 7), (0.6, 0.3, 0.1)


def test_output_and_gradients() -> None:
    layer = randomize(HierarchicalLoRALinear(K, N, ranks=RANKS, weights=WEIGHTS, alpha=ALPHA))
    x = inputs(M, K).requires_grad_()
    y = layer(x)
    X = x.detach().double().requires_grad_()
    A, B, W, w = double(layer, "lora_A", "lora_B", "weight", "level_weights")
    want = X @ W.T
    for i, (Ai, Bi) in enumerate(zip(A.split(RANKS), B.split(RANKS, dim=1), strict=True)):
        want = want + w[i] * ALPHA / RANKS[i] * (X @ Ai.T) @ Bi.T
    assert_same(y, want)
    params = {"x": x, "A": layer.lora_A, "B": layer.lora_B, "w": layer.level_weights}
    assert_all_same(gradients(y, params), gradients(want, {"x": X, "A": A, "B": B, "w": w}))
