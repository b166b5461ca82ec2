"""Adapters per task: one base, each row of a batch with its own adapter, or none; all train."""

import torch
from torch import Tensor

from lora_kernels import multi_lora_linear
from tests.acceptance.formula import K, N, assert_formula, inputs

RANKS, SCALES, INDEX = (3, 5), (2.0, 0.5), [1, -1, 0, 1, 0, -1, 1]


def test_output_and_gradients() -> None:
    weight = inputs(N, K, seed=2)
    As = [inputs(r, K, seed=3 + r) for r in RANKS]
    Bs = [inputs(N, r, seed=9 + r) for r in RANKS]

    def call(x: Tensor) -> Tensor:
        return multi_lora_linear(x, weight, As, Bs, torch.tensor(INDEX), scaling=list(SCALES))

    def formula(x: Tensor, **leaves: Tensor) -> Tensor:
        rows = []
        for row, task in zip(x, INDEX, strict=True):
            out = weight.double() @ row
            if task >= 0:
                out = out + SCALES[task] * leaves[f"B{task}"] @ (leaves[f"A{task}"] @ row)
            rows.append(out)
        return torch.stack(rows)

    leaves = dict(zip(("A0", "A1", "B0", "B1"), (*As, *Bs), strict=True))
    assert_formula(call, formula, inputs(len(INDEX), K), leaves)
