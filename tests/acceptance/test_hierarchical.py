"""HierarchicalLoRALinear: Σᵢ wᵢ·(alpha/rᵢ)·(x·Aᵢᵀ)·Bᵢᵀ, its weights wᵢ trained too."""

from torch import Tensor

from lora_kernels.layers import HierarchicalLoRALinear
from tests.acceptance.formula import ALPHA, K, M, N, assert_formula, inputs, randomize

RANKS, WEIGHTS = (2, 3, 7), (0.6, 0.3, 0.1)


def test_output_and_gradients() -> None:
    layer = randomize(HierarchicalLoRALinear(K, N, ranks=RANKS, weights=WEIGHTS, alpha=ALPHA))

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor, level_weights: Tensor) -> Tensor:
        y = x @ layer.weight.double().T
        for w, r, A, B in zip(
            level_weights, RANKS, lora_A.split(RANKS), lora_B.split(RANKS, dim=1), strict=True
        ):
            y = y + w * ALPHA / r * (x @ A.T) @ B.T
        return y

    assert_formula(layer, formula, inputs(M, K))
