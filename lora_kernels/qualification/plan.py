"""The list of strategies that may be chosen on a GPU, and the claims that a worker checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..choice.verdicts import Group
from ..core.problem import Strategy

DTYPES = ("bfloat16",)  # of the base GEMM, by default
KNOWN_DTYPES = ("bfloat16", "float16")
SQUARE, WIDE = (4096, 4096), (14336, 4096)  # N and K: Llama-3-8B's q and o, and gate and up
# The smallest M for which forward and backward are timed too. M = 1 is decoding, which has no
# backward: a slow backward there must not keep the forward from its kernel.
STEP_ROWS = 8


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
    - "time": always holds; measures the group and eager.

    Args:
        sizes: M, N and K of the calls that "time" measures.
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
    36
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
    return sorted(claims, key=lambda claim: claim.tier)
