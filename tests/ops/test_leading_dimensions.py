"""x and dy of any leading dimensions, however they lie: what the CPU's kernels take as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cpu, native
from lora_kernels.bench.case import Case, inputs, run
from tests.ops.engines import every_native_engine
from tests.support.assertions import assert_close_derived

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
def test_lora_linear_of_any_leading_dimensions_is_exact_to_its_sums(
    layout: str, strategy: str | None, scaled: bool
) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[layout](K)
    A, B, W, c = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K), torch.rand(N)
    names = ["x", "lora_A", "lora_B", *(["column_scale"] if scaled else [])]

    tensors = {"x": x, "lora_A": A, "lora_B": B, **({"column_scale": c} if scaled else {})}

    def results(backend: str, W: Tensor, tensors: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        with lora_kernels.backend(backend, strategy if backend == "cpu" else None):
            y = lora_kernels.lora_linear(**leaves, weight=W, scaling=2.0)
        return [y, *torch.autograd.grad(y, [leaves[name] for name in names], dy)]

    # A float32 sum of n products is wrong by at most n·2⁻²⁴ of the same sum of absolute values; the
    # sums follow each other, and eight roundings stand for the factors beside them.
    u = (K + N + R + M * L + 8) * 2.0**-24
    wide = {name: t.double() for name, t in tensors.items()}
    absolute = {name: t.abs() for name, t in wide.items()}

    for of_dy in {layout, "contiguous", "expanded"} if x.dim() == 3 else {layout}:
        dy = LAYOUTS[of_dy](N)
        if dy.shape[:-1] != x.shape[:-1]:
            dy = dy.new_ones(1).expand(*x.shape[:-1], N)
        got = results("cpu", W, tensors, dy)
        want = results("eager", W.double(), wide, dy.double())
        limits = results("eager", W.double().abs(), absolute, dy.double().abs())
        for name, a, b, limit in zip(["y", *names], got, want, limits, strict=True):
            assert a.shape == b.shape and a.is_contiguous(), (name, of_dy)
            assert ((a.double() - b).abs() <= u * limit).all(), (name, of_dy)


@pytest.mark.parametrize("M", [1, 5, 40])
@every_native_engine
def test_lora_linear_of_strided_vectors_and_a_transposed_B_is_as_of_contiguous_ones(
    M: int, engine: str
) -> None:
    args = inputs(Case(M, 40, 64, 6, torch.float32, gate=True, column_scale=True, bias=True))
    want = run(lora_kernels.lora_linear, args)
    for name in ("rank_gate", "column_scale", "bias"):
        every_second = torch.stack([args[name].detach(), torch.full_like(args[name], 9.0)], 1)
        strided = every_second[:, 0]
        assert not strided.is_contiguous()
        args[name] = strided.requires_grad_(args[name].requires_grad)
    B = args["lora_B"].detach().t().contiguous().t()
    args["lora_B"] = B.requires_grad_(args["lora_B"].requires_grad)
    got = run(lora_kernels.lora_linear, args)
    assert_close_derived(got, want, layers=1)


@needs_native
@pytest.mark.parametrize("strategy", [cpu.LIBRARY, None], ids=["library", "chosen"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_lora_linear_of_rows_apart_under_autocast_has_the_bits_of_rows_together(
    rows: int, strategy: str | None
) -> None:
    torch.manual_seed(0)
    apart = torch.randn(rows, 2 * K)[:, :K]
    rest = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    with lora_kernels.backend("cpu", strategy), torch.autocast("cpu", torch.bfloat16):
        y = lora_kernels.lora_linear(apart, *rest, 2.0)
        assert torch.equal(y, lora_kernels.lora_linear(apart.contiguous(), *rest, 2.0))
