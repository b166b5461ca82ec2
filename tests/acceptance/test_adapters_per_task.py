"""Adapters per task: one base, each row of a batch with its own adapter, or none; all train."""

import torch

from lora_kernels import multi_lora_linear
from tests.acceptance.formula import K, N, assert_all_same, assert_same, gradients, inputs

RANKS, SCALES, INDEX = (3, 5), (2.0, 0.5), [1, -1, 0, 1, 0, -1, 1]


def test_output_and_gradients() -> None:
    weight, x = inputs(N, K, seed=2), inputs(len(INDEX), K).requires_grad_()
    As = [inputs(r, K, seed=3 + r).requires_grad_() for r in RANKS]
    Bs = [inputs(N, r, seed=9 + r).requires_grad_() for r in RANKS]
    y = multi_lora_linear(x, weight, As, Bs, torch.tensor(INDEX), scaling=list(SCALES))

    def doubled(t: torch.Tensor) -> torch.Tensor:
        return t.detach().double().requires_grad_()

    X, A64, B64 = doubled(x), list(map(doubled, As)), list(map(doubled, Bs))
    rows = []
    for row, task in zip(X, INDEX, strict=True):
        out = weight.double() @ row
        if task >= 0:
            out = out + SCALES[task] * B64[task] @ (A64[task] @ row)
        rows.append(out)
    want = torch.stack(rows)
    assert_same(y, want)
    names = ("x", "A0", "A1", "B0", "B1")
    assert_all_same(
        gradients(y, dict(zip(names, (x, *As, *Bs), strict=True))),
        gradients(want, dict(zip(names, (X, *A64, *B64), strict=True))),
    )
