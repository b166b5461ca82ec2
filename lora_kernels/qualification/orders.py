"""The orders and the skinny GEMMs of a training step: what is compared, checked and timed.

A call has two sides: today's GEMMs, and another order or a kernel of this package. Both are checked
by the tolerance of the oracle before a time counts. "mm" and "update" are timed for the report, and
decide nothing: "mm" is the base GEMM alone beside all of y, and "update" adds P·Bᵀ to a y that is
there, beside P·Bᵀ alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..backends.eager import orders, products
from ..choice.verdicts import Group
from ..oracle import tolerance
from . import timing
from .card import Card
from .plan import MM, ORDER_RANK, UPDATE, Claim

SCALING = 2.0
WHOLE = (1040, 208, 16)  # of "memory": rows of whole 16 bytes, as in the timed calls
SAMPLE = 64  # rows or columns of a timed call that are compared with the reference


class Call:
    """One of `Group.strategy`'s GEMMs, with operands that are cold in each call.

    Args:
        sizes: M, N and K of y; M, the wide dimension and the rank of a skinny GEMM.

    Attributes:
        count: how many copies of the operands there are, which calls read in turn.
    """

    def __init__(self, card: Card, group: Group, *sizes: int) -> None:
        self.name, (self.M, self.n, self.k) = group.strategy, sizes
        self.is_skinny = self.name in orders.SKINNY
        dtype = getattr(torch, group.dtype)

        def draw(*shape: int, fan: int = 1) -> Tensor:
            return torch.randn(shape, device=card.device, dtype=dtype) / math.sqrt(fan)

        M, n, k = self.M, self.n, self.k
        shapes: Sequence[tuple[int, int]]
        if self.name in (orders.P, orders.DS):
            small = (k, n) if self.name == orders.P else (n, k)  # A [R, K], or B [N, R]
            shapes = ((M, n), small)
        elif self.is_skinny:
            shapes = ((M, n), (M, k))
        else:
            shapes = ((M, k), (n, k), (M, ORDER_RANK), (n, ORDER_RANK))  # x, W, P and B
        size = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        self.count = max(2, -(-card.cold_bytes // size))
        fan = n if self.name in (orders.P, orders.DS) else M if self.is_skinny else k
        self.operands = [
            [draw(*shape, fan=fan if i == 1 else 1) for i, shape in enumerate(shapes)]
            for _ in range(self.count)
        ]
        self.y = draw(M, n) if self.name == UPDATE else None

    def ours(self, number: int) -> Tensor:
        """Return the other order's or the kernel's result."""
        a, b, *others = self.operands[number % self.count]
        if self.name == orders.P:
            return orders.shrink(a, b, 1.0, a.new_empty(self.M, self.k))
        if self.name == orders.DS:
            return orders.shrink(a, b.t(), SCALING, a.new_empty(self.M, self.k))
        if self.name == orders.DA:
            return orders.outer(b, a, 1.0, a.new_empty(self.k, self.n))
        if self.name == orders.DB:
            dB: Tensor = a.new_empty(self.n, self.k)
            orders.outer(b, a, SCALING, dB.t())
            return dB
        p, lora_B = others
        base: Tensor = cast(Tensor, self.y) if self.name == UPDATE else linear(a, b)
        if self.name == MM:
            return base
        return base.addmm_(p, lora_B.t(), alpha=SCALING)

    def todays(self, number: int) -> Tensor:
        """Return the result of the GEMMs that run without a verdict."""
        a, b, *others = self.operands[number % self.count]
        if self.name == orders.P:
            return linear(a, b)
        if self.name == orders.DS:
            return products.scaled_mm(a, b, SCALING)
        if self.name == orders.DA:
            return torch.mm(b.t(), a)
        if self.name == orders.DB:
            return products.scaled_mm(a.t(), b, SCALING)
        p, lora_B = others
        update: Tensor = linear(p, lora_B)
        if self.name == UPDATE:
            return update
        return update.addmm_(a, b.t(), beta=SCALING)

    def find_miss(self, most: int) -> str | None:
        """Return how `ours` misses the tolerance, or None; "mm" and "update" are not compared.

        most: rows, or columns of a gradient, that are compared with the float64 reference.
        """
        if self.name in (MM, UPDATE):
            return None
        got, eager = self.ours(0), self.todays(0)
        wide = [t.double() for t in self._sample(0, most)]
        a, b, *others = wide
        if self.name in (orders.P, orders.DS):
            want = a @ b.t() if self.name == orders.P else SCALING * (a @ b)
        elif self.is_skinny:
            want = b.t() @ a if self.name == orders.DA else SCALING * (a.t() @ b)
        else:
            want = a @ b.t() + SCALING * (others[0] @ others[1].t())
        if self.name == orders.DA:
            got, eager = got[:, :most], eager[:, :most]
        else:
            got, eager = got[:most], eager[:most]
        terms = self.M if self.name in (orders.DA, orders.DB) else self.k
        terms = self.n if self.name in (orders.P, orders.DS) else terms
        u = tolerance.unit_roundoff(got.dtype)
        found = tolerance.compare(got, want, eager, u, [terms])
        return None if found.ok else f"{self.name} {found}"

    def _sample(self, number: int, most: int) -> list[Tensor]:
        """Return on the CPU the operands of the first rows or columns of a result."""
        a, b, *others = self.operands[number]
        a = a[:, :most] if self.name in (orders.DA, orders.DB) else a[:most]
        others = [others[0][:most], others[1]] if others else []
        return [t.cpu() for t in (a, b, *others)]


def odd_sizes(card: Card, group: Group) -> str | None:
    """Return the miss of calls whose sizes are no multiple of a tile."""
    sizes = ((1037, 203, 16), (133, 1000, 61)) if group.weight == "skinny" else ((133, 203, 99),)
    misses = (Call(card, group, *size).find_miss(size[0] + size[1]) for size in sizes)
    return next((miss for miss in misses if miss is not None), None)


def time(card: Card, claim: Claim) -> tuple[str | None, Any]:
    """Return a miss of a timed call or None, and the numbers of a `verdicts.Point` for each."""
    points = []
    for sizes in claim.sizes:
        card.free_memory()
        call = Call(card, claim.group, *sizes)
        if (miss := call.find_miss(SAMPLE)) is not None:
            return f"at {'×'.join(map(str, sizes))}: {miss}", ()
        M, n, k = sizes
        rank = k if call.is_skinny else ORDER_RANK
        sides = {
            str(claim.group): (torch.no_grad, call.ours),
            "eager": (torch.no_grad, call.todays),
        }
        seconds = timing.interleave(card, sides, call.count)
        points.append((M, n, k, rank, *seconds, None, None))
    return None, points


def launch_all(card: Card, claim: Claim) -> None:
    """Launch what the claim launches, each call once, and judge nothing."""
    if claim.name == "odd sizes":
        odd_sizes(card, claim.group)
        return
    for sizes in claim.sizes or (WHOLE,):
        Call(card, claim.group, *sizes).ours(0)
