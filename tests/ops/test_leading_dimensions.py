"""x and dy of any leading dimensions, however they lie: what the CPU's kernels take as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cpu, native

needs_native = pytest.mark.skipif(native.module is None, reason="the native kernels were not built")

M, L, K, N, R = 2, 5, 10, 7, 3
LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "contiguous": lambda n: torch.randn(M, L, n),
    "transposed": lambda n: torch.randn(L, M, n).transpose(0, 1),
    "every other column": lambda n: torch.randn(M, L, 2 * n)[..., ::2],
    "rows apart": lambda n: torch.randn(M, L, 2 * n)[..., :n],
    "expanded": lambda n: torch.randn(1, 1, n).expand(M, L, n),
    "a dimension of one": lambda n: torch.randn(M, n)[:, None],
    "no dimension": lambda n: torch.randn(n),
    "two, rows apart": lambda n: torch.randn(L, 2 * n)[:, :n],
    "no rows": lambda n: torch.randn(0, L, n),
}


@needs_native
@pytest.mark.parametrize("scaled", [False, True], ids=["", "column_scale"])
@pytest.mark.parametrize("strategy", [cpu.LIBRARY, None], ids=["library", "chosen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, strategy: str | None, scaled: bool) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout](K)
    A, B, W, c = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K), torch.rand(N)
    names = ["x", "lora_A", "lora_B", *(["column_scale"] if scaled else [])]

    def results(backend: tuple[str, str | None], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        tensors = {"x": x, "lora_A": A, "lora_B": B, **({"column_scale": c} if scaled else {})}
        args = {name: t.to(dtype) if dtype is not t.dtype else t for name, t in tensors.items()}
        leaves = {name: t.detach().requires_grad_() for name, t in args.items()}
        with lora_kernels.backend(*backend):
            y = lora_kernels.lora_linear(**leaves, weight=W.to(dtype), scaling=2.0)
        return [y, *torch.autograd.grad(y, [leaves[name] for name in names], dy.to(dtype))]

    for of_dy in {layout, "contiguous", "expanded"} if x.dim() == 3 else {layout}:
        dy = LAYOUTS[of_dy](N)
        if dy.shape[:-1] != x.shape[:-1]:
            dy = dy.new_ones(1).expand(*x.shape[:-1], N)
        got = results(("cpu", strategy), dy, torch.float32)
        want = results(("eager", None), dy, torch.float64)
        for name, a, b in zip(["y", *names], got, want, strict=True):
            assert a.shape == b.shape and a.is_contiguous(), (name, of_dy)
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4, msg=f"{name}, {of_dy}")
