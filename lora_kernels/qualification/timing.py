"""The times of a group's calls and of the eager backend's, in the worker of a qualification."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..choice import choose as selection
from ..choice.verdicts import Group, Seconds
from ..ops import linear
from ..quantization import QuantizedWeight, quantize_4bit
from .card import Card
from .plan import STEP_ROWS

RANK = 16
ROUNDS, HOST_ROUNDS = 7, 3
FEW, LEAST_CALLS = 128, 12  # up to so many rows at least so many calls are timed as one


def measure(
    card: Card, group: Group, sizes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[Any, ...]]:
    """Yield the numbers of a `verdicts.Point` for each M, N and K."""
    for M, N, K in sizes:
        card.free_memory()
        call = Timed(card, group, M, N, K)
        passes = -(-LEAST_CALLS // call.count) if M <= FEW else 1
        forward = by_group(card, group, call.forward, passes * call.count)
        step: tuple[Seconds | None, ...] = (None, None)
        if M >= STEP_ROWS:
            step = by_group(card, group, call.step, min(call.count, 4))
        yield M, N, K, RANK, *forward, *step


class Timed:
    """`lora_linear` on cold weights: a call reads another copy than the one before."""

    def __init__(self, card: Card, group: Group, M: int, N: int, K: int) -> None:
        dtype, adapter = (getattr(torch, name) for name in (group.dtype, group.adapter))

        def draw(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, device=card.device, dtype=dtype) / math.sqrt(shape[-1])

        self.weights = cold_weights(card, dtype, group.weight, N, K)
        self.count = len(self.weights)
        x, A, B = (
            draw(M, K, dtype=dtype),
            draw(RANK, K, dtype=adapter),
            draw(N, RANK, dtype=adapter),
        )
        self.leaves = [t.requires_grad_() for t in (x, A, B)]
        self.dy = draw(M, N, dtype=dtype)

    def y(self, number: int) -> Tensor:
        x, A, B = self.leaves
        return linear.lora_linear(x, self.weights[number % self.count], A, B, 2.0)

    def forward(self, number: int) -> object:
        with torch.no_grad():
            return self.y(number)

    def step(self, number: int) -> object:
        return torch.autograd.grad(self.y(number), self.leaves, self.dy)


@functools.lru_cache(maxsize=4)  # two kinds and two shapes of one dtype, for all groups
def cold_weights(card: Card, dtype: torch.dtype, kind: str, N: int, K: int) -> list[Any]:
    """Return copies of a weight, in all twice the L2 cache and at least two."""
    dense = torch.randn(N, K, device=card.device, dtype=dtype) / K**0.5
    with selection.backend("eager"):
        weight = quantize_4bit(dense, "nf4", 64, True) if kind == "4bit" else dense
    size = weight.packed.nbytes if isinstance(weight, QuantizedWeight) else weight.nbytes
    count = max(2, -(-card.cold_bytes // size))
    if isinstance(weight, QuantizedWeight):
        return [replace(weight, packed=weight.packed.clone()) for _ in range(count)]
    return [weight.clone() for _ in range(count)]


Call = Callable[[int], object]


def by_group(card: Card, group: Group, call: Call, count: int) -> tuple[Seconds, Seconds]:
    """Return the median seconds of a call by the group and by eager, which take turns."""
    engine = functools.partial(card.engine, group)
    eager = functools.partial(selection.backend, "eager")
    return interleave(card, {str(group): (engine, call), "eager": (eager, call)}, count)


def interleave(
    card: Card,
    engines: Mapping[str, tuple[Callable[[], AbstractContextManager[Any]], Call]],
    count: int,
) -> tuple[Seconds, Seconds]:
    """Return the median seconds of two engines' calls, which take turns.

    engines: name -> the context of its calls, and the call of a number below `count`.
    """
    clocks, device, host = {}, dict[str, list[float]](), dict[str, list[float]]()
    for name, (engine, call) in engines.items():
        with engine():
            clocks[name] = card.clocks(name, call, count)
    for number in range(ROUNDS + 1):  # the first warms up
        for name, (engine, _) in engines.items():
            with engine():
                device.setdefault(name, []).append(clocks[name].device() / count)
                if number <= HOST_ROUNDS:
                    host.setdefault(name, []).append(clocks[name].host() / count)
    ours, eager = (
        Seconds(
            statistics.median(device[name][1:]),
            statistics.median(host[name][1:]),
            clocks[name].is_captured,
        )
        for name in engines
    )
    return ours, eager
