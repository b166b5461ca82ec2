"""Float64 references of the acceptance tests, and float32's tolerance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Sums of fewer than 2⁷ float32 terms, two products deep: each rounding is 2⁻²⁴ of its sum. A
# wrong scale, gate or missing term changes more than 2⁻⁸.
RTOL = 2.0**-18

# alpha is not r, r no power of two, sizes that no tile divides.
R, ALPHA, K, N, M = 5, 7.0, 37, 43, 11


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every adapter parameter random, B too, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def double(module: nn.Module, *names: str) -> list[Tensor]:
    """Parameters in float64, leaves that take a gradient."""
    params = dict(module.named_parameters())
    return [params[name].detach().double().requires_grad_() for name in names]


def gradients(y: Tensor, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of a sum of y with fixed weights."""
    weights = ((torch.arange(y.numel()) % 7 - 3) / 4).to(y.dtype).view(y.shape)
    found = torch.autograd.grad((y * weights).sum(), list(of.values()))
    return dict(zip(of, found, strict=True))


def assert_same(got: Tensor, want: Tensor, rtol: float = RTOL, what: Any = "") -> None:
    assert got.shape == want.shape, what
    assert want.norm() > 0, what
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= rtol, f"{what}: relative error {error:.3g}"


def assert_formula(
    call: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    x: Tensor,
    leaves: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The output of `call`, and all gradients, are those of the formula in float64.

    formula: takes x and, by name, the leaves. Without leaves `call` is a module, and the names are
        the last parts of its parameters'.

    Returns the gradients of `call`.
    """
    if leaves is None:
        params = {n.rpartition(".")[2]: p for n, p in call.named_parameters()}
        leaves = {name: params[name] for name in [*inspect.signature(formula).parameters][1:]}
    ours = {"x": x, **leaves}
    exact = {name: t.detach().double() for name, t in ours.items()}
    for t in (*ours.values(), *exact.values()):
        t.requires_grad_()
    y, want = call(x), formula(**exact)
    assert_same(y, want)
    got = gradients(y, ours)
    for name, ref in gradients(want, exact).items():
        assert_same(got[name], ref, what=name)
    return got
