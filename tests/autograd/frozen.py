"""Checks of frozen adapters: the saved tensors, and that nothing reads a tensor that is not saved.

In the backward, uninitialized memory stands in place of what was not saved. Here it holds NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lora_kernels import lora_experts_linear, lora_linear, multi_lora_linear
from lora_kernels.ops import autograd, experts, linear, multi
from tests.autograd.cases import K, M, N, R, make_case, require_grad

FACTORS = ("lora_A", "lora_B")
FROZEN = [("lora_A",), ("lora_B",), ("lora_A", "lora_B")]


@contextmanager
def unread_is_nan() -> Iterator[list[Tensor]]:
    """Fill what stands for tensors that were not saved with NaN, and yield them."""
    make, made = autograd.new_unsaved, []

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made.append(make(*args, **kwargs).fill_(torch.nan))
        return made[-1]

    with ExitStack() as patches:
        for module in (linear, multi, experts):
            patches.enter_context(mock.patch.object(module, "new_unsaved", filled))
        yield made


def gradients(
    call: Callable[[], Tensor], leaves: dict[str, Tensor], kept: Sequence[Tensor]
) -> tuple[dict[str, Tensor], set[tuple[int, ...]]]:
    """Return the gradients, and the shapes that are saved beside the tensors of `kept`."""
    addresses, shapes = {t.data_ptr() for t in kept}, set()

    def pack(t: Tensor) -> Tensor:
        if t.numel() and t.data_ptr() not in addresses and t.dtype is not torch.int64:
            shapes.add(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    dy = torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape)
    return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True)), shapes


def check(
    call: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    frozen: Sequence[str],
    kept: Sequence[Tensor],
    p_shape: tuple[int, ...],
    recompute: bool = False,
    more: Sequence[tuple[int, ...]] = (),
) -> None:
    """Each gradient that is left has the bits that it has beside all others.

    Args:
        call: of the function.
        leaves: tensors that need gradients, by name; "x" is one.
        frozen: the starts of the names of those that are frozen then.
        kept: tensors that may be saved in any case.
        p_shape: of P.
        recompute: whether P is made from x in the backward.
        more: shapes that are saved in any case.
    """
    x_shape = tuple(leaves["x"].shape)
    with unread_is_nan() as unread:
        want, _ = gradients(call, leaves, kept)
        assert not unread
        for name in [n for n in leaves if n.startswith(tuple(frozen))]:
            leaves.pop(name).requires_grad_(False)
        got, saved = gradients(call, leaves, kept)
    for name, grad in got.items():
        assert torch.equal(grad, want[name]), name
    reads_p = any(name.startswith(("lora_B", "rank_gate")) for name in leaves)
    reads_x = any(n.startswith("lora_A") for n in leaves) or (recompute and reads_p)
    expected = {x_shape} if reads_x else set()
    expected |= {p_shape} if reads_p and not recompute else set()
    assert saved == expected | set(more)
    shapes = [*[x_shape] * (not reads_x), *[p_shape] * (not reads_p)]
    assert [tuple(t.shape) for t in unread] == shapes


def check_linear(
    option: str, frozen: Sequence[str], x_shape: tuple[int, ...], recompute: bool = False
) -> None:
    check_case(make_case(option, torch.float32, x_shape), frozen, recompute)


def check_case(case: dict[str, Any], frozen: Sequence[str], recompute: bool = False) -> None:
    leaves = require_grad(case)
    kept = [t for n, t in case.items() if isinstance(t, Tensor) and n != "x"]
    (N, R), rows = case["lora_B"].shape, case["x"].numel() // case["x"].shape[-1]
    z = [(rows, N)] if "column_scale" in leaves else []
    check(
        lambda: lora_linear(**case, recompute=recompute),
        leaves,
        frozen,
        kept,
        (rows, R),
        recompute,
        z,
    )


def check_multi(index: Sequence[int], frozen: Sequence[str], dropout_p: float) -> None:
    case, ranks = make_case("plain", torch.float32), (3, 2, 4)
    generator = torch.Generator().manual_seed(1)
    lora_A = [torch.randn(r, K, generator=generator) for r in ranks]
    lora_B = [torch.randn(N, r, generator=generator) for r in ranks]
    named = {f"lora_A{e}": A for e, A in enumerate(lora_A)}
    named |= {f"lora_B{e}": B for e, B in enumerate(lora_B)}
    leaves = {"x": case["x"]} | named
    for t in leaves.values():
        t.requires_grad_()
    rng = torch.tensor([3, 4]) if dropout_p else None
    arguments = lora_A, lora_B, torch.tensor(index), [0.5, 1.5, 2.0]
    check(
        lambda: multi_lora_linear(
            case["x"], case["weight"], *arguments, dropout_p=dropout_p, rng=rng
        ),
        leaves,
        frozen,
        [case["weight"], *lora_A, *lora_B],
        (M, 4),
    )


def check_experts(frozen: Sequence[str], dropout_p: float) -> None:
    generator, E = torch.Generator().manual_seed(1), 3
    shapes = {"x": (M, K), "weight": (E, N, K), "lora_A": (E, R, K), "lora_B": (E, N, R)}
    case = {n: torch.randn(*shape, generator=generator) for n, shape in shapes.items()}
    leaves = {n: case[n].requires_grad_() for n in ("x", *FACTORS)}
    rng, offsets = torch.tensor([3, 4]) if dropout_p else None, torch.tensor([2, 2, 5])
    check(
        lambda: lora_experts_linear(
            **case, offsets=offsets, scaling=1.5, dropout_p=dropout_p, rng=rng
        ),
        leaves,
        frozen,
        [case[n] for n in ("weight", *FACTORS)],
        (M, R),
    )


SORTED, SCATTERED = [0, 0, 1, 1, -1, 2], [2, 0, -1, 0, 1, 2]
SOME = [("lora_A1",), ("lora_B0",), ("lora_A0", "lora_B1")]  # of one adapter beside others
every_multi = list(itertools.product((SORTED, SCATTERED), [*FROZEN, *SOME], (0.0, 0.25)))
every_experts = list(itertools.product(FROZEN, (0.0, 0.25)))
