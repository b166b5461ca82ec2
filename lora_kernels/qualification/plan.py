"""The list of strategies that may be chosen on a GPU, and the claims that a worker checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..backends.eager import orders
from ..choice.verdicts import Group
from ..core.problem import Strategy

DTYPES = ("bfloat16",)  # of the base GEMM, by default
KNOWN_DTYPES = ("bfloat16", "float16")
SQUARE, WIDE = (4096, 4096), (14336, 4096)  # N and K: Llama-3-8B's q and o, and gate and up
# The smallest M for which forward and backward are timed too. M = 1 is decoding, which has no
# backward: a slow backward there must not keep the forward from its kernel.
STEP_ROWS = 8

# M, and N and K of Llama-3-8B's layers, at which the orders of a training step are timed. The ranks
# are one adapter's, and those of four adapters that share an x.
ORDER_ROWS = (1024, 8192)
ORDER_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
ORDER_RANK, SKINNY_RANKS = 16, (16, 64)
MM, UPDATE = "mm", "update"  # timed beside the orders; they decide nothing


class Candidate(NamedTuple):
    """A strategy that may be chosen, and where it is timed.

    Args:
        weight: "dense" or "4bit".
        rows: M. Above the largest the strategy is never chosen, nor below the smallest, unless
            that is 16 or less: a tile of 16 rows takes its time for one row too.
        bound: why it can win: the share of the roofline that it cannot exceed at 14336×4096, by
            `python -m tests.compile_only.bounds`.
    """

    backend: str
    strategy: Strategy
    weight: str
    rows: tuple[int, ...]
    bound: str


# Eager takes four launches. Above the rows of bitsandbytes' own kernel (64 on H100) it decodes to
# memory first, which moves 4.5 bytes an element where the codes have 0.52: 12 % of the roofline.
CANDIDATES = (
    Candidate(
        "cuda",
        Strategy.COOPERATIVE,
        "4bit",
        (1, 16),
        "at most 72 % of an H100's bandwidth, in one launch",
    ),
    Candidate(
        "cuda",
        Strategy.COOPERATIVE,
        "dense",
        (1, 16),
        "at most 91 % of an H100's bandwidth, in one launch",
    ),
    Candidate(
        "cuda",
        Strategy.TWO_PASS,
        "4bit",
        (17, 128),
        "at most 26 % of an H100's roofline; decoding first, at most 12 %",
    ),
    Candidate(
        "triton",
        Strategy.FUSED,
        "4bit",
        (16, 128),
        "at most 34 % of an H100's roofline, in one launch; decoding first, at most 12 %",
    ),
    Candidate(
        "triton",
        Strategy.FUSED,
        "dense",
        (16,),
        "at most 92 % of an H100's bandwidth, in one launch",
    ),
)


class Claim(NamedTuple):
    """A statement about a group that the worker checks; tiers are checked in order.

    - "odd sizes": y and every gradient are within the tolerance of the float64 reference, at sizes
      that are no multiple of a tile.
    - "many blocks": the same where the grid has several times the blocks that fit the card.
    - "memory": nothing outside of the results is written and no uninitialised memory is read; ten
      repeats have equal bits.
    - "autocast": the same as "odd sizes" for float32 inputs under autocast.
    - "two streams", "graph": calls on two streams at once, and replays of a captured CUDA graph,
      have the bits of a call by itself.
    - "time": always holds; measures the group and eager. For an order or a skinny GEMM of a
      training step a sample of each timed result is within the tolerance.

    Args:
        sizes: M, N and K of the calls that "time" measures; of a skinny GEMM M, the wide dimension
            and the rank.
    """

    group: Group
    name: str
    tier: int
    sizes: tuple[tuple[int, int, int], ...] = ()


def list_claims(
    dtypes: Sequence[str] = DTYPES, shapes: Sequence[tuple[int, int]] = (SQUARE, WIDE)
) -> list[Claim]:
    """Return the claims on the kernels for these dtypes of the base GEMM, in order.

    shapes: N and K of the weights that are timed.

    >>> sum(len(claim.sizes) for claim in list_claims())
    100
    """
    claims = []
    for dtype in dtypes:
        for adapter in dict.fromkeys((dtype, "float32")):
            for backend, strategy, weight, rows, _ in CANDIDATES:
                group = Group(backend, str(strategy), dtype, adapter, weight)
                names = {"odd sizes": 0, "many blocks": 0, "memory": 0, "graph": 1}
                if adapter == dtype:  # which autocast rounds float32 adapters to
                    names["autocast"] = 0
                if strategy is Strategy.COOPERATIVE:
                    names["two streams"] = 1
                claims += [Claim(group, name, tier) for name, tier in names.items()]
                sizes = tuple((M, N, K) for N, K in shapes for M in rows)
                claims.append(Claim(group, "time", 2, sizes))
    return sorted([*claims, *list_orders(dtypes)], key=lambda claim: claim.tier)


def list_orders(dtypes: Sequence[str] = DTYPES) -> list[Claim]:
    """Return the claims on the orders and the skinny GEMMs of a training step, in order."""
    claims = []
    columns = tuple(dict.fromkeys(N for N, _ in ORDER_SHAPES))
    inner = tuple(dict.fromkeys(K for _, K in ORDER_SHAPES))
    wide = {orders.P: inner, orders.DS: columns, orders.DA: inner, orders.DB: columns}
    for dtype in dtypes:
        for name in (MM, UPDATE, orders.BASE_FIRST):
            group = Group("eager", name, dtype, dtype, "order")
            sizes = tuple((M, N, K) for M in ORDER_ROWS for N, K in ORDER_SHAPES)
            claims.append(Claim(group, "time", 2, sizes))
        for name, widths in wide.items():
            group = Group("triton", name, dtype, dtype, "skinny")
            claims += [Claim(group, claim, 0) for claim in ("odd sizes", "memory")]
            sizes = tuple((M, n, R) for M in ORDER_ROWS for n in widths for R in SKINNY_RANKS)
            claims.append(Claim(group, "time", 2, sizes))
    return sorted(claims, key=lambda claim: claim.tier)
