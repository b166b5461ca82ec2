"""The list of strategies that may be chosen on a GPU, and the claims that a worker checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..choice.verdicts import Group
from ..core.problem import Strategy

DTYPES = ("bfloat16", "float16")  # of the base GEMM, in the default plan
SQUARE, WIDE = (4096, 4096), (14336, 4096)  # N and K: Llama-3-8B's q and o, and gate and up
# The smallest M for which forward and backward are timed too. M = 1 is decoding, which has no
# backward: a slow backward there must not keep the forward from its kernel.
STEP_ROWS = 8


class Candidate(NamedTuple):
    """A strategy that may be chosen, and where it is timed.

    Args:
        weight: "dense" or "4bit".
        rows: M. Above the largest the strategy is never chosen; below the smallest its ratio there
            counts.
        shapes: N and K of the weights.
    """

    backend: str
    strategy: Strategy
    weight: str
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]


CANDIDATES = (
    # Tokens: each code is read once, in one launch, where the eager backend launches four kernels.
    Candidate("cuda", Strategy.COOPERATIVE, "4bit", (1, 16), (SQUARE, WIDE)),
    Candidate("cuda", Strategy.COOPERATIVE, "dense", (1, 16), (SQUARE, WIDE)),
    # Up to 128 rows decoding in the GEMM moves fewer bytes than writing the decoded weight does.
    Candidate("cuda", Strategy.TWO_PASS, "4bit", (8, 32, 128), (SQUARE, WIDE)),
    # cuBLAS is ahead where arithmetic decides: only while the weight's bytes do is it timed.
    Candidate("cuda", Strategy.TWO_PASS, "dense", (8, 128), (SQUARE,)),
    # One pass over x, by wgmma from sm_90 on; and all there is where no CUDA kernels were built.
    Candidate("triton", Strategy.FUSED, "4bit", (16, 128), (SQUARE,)),
    Candidate("triton", Strategy.FUSED, "dense", (16, 512), (SQUARE,)),
    # Few rows: all multiprocessors share x·Aᵀ, which each tile of the fused kernel computes again.
    Candidate("triton", Strategy.TWO_PASS, "4bit", (16,), (SQUARE,)),
    Candidate("triton", Strategy.TWO_PASS, "dense", (16,), (SQUARE,)),
)


class Claim(NamedTuple):
    """A statement about a group that the worker checks; tiers are checked in order.

    - "odd sizes": y and every gradient are within the tolerance of the float64 reference, at sizes
      that are no multiple of a tile.
    - "many blocks": the same where the grid has several times the blocks that fit the card.
    - "memory": nothing outside of the results is written and no uninitialised memory is read; ten
      repeats, and a replay of recorded launches, have equal bits.
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


def plan(
    dtypes: Sequence[str] = DTYPES, shapes: Sequence[tuple[int, int]] | None = None
) -> list[Claim]:
    """Return the claims on the kernels for these dtypes of the base GEMM, in order.

    shapes: N and K of the weights that are timed; None for those of CANDIDATES.

    >>> sum(len(claim.sizes) for claim in plan())
    88
    """
    claims = []
    for dtype in dtypes:
        for adapter in dict.fromkeys((dtype, "float32")):
            for backend, strategy, weight, rows, own in CANDIDATES:
                group = Group(backend, str(strategy), dtype, adapter, weight)
                names = {"odd sizes": 0, "many blocks": 0, "memory": 0, "graph": 1}
                if adapter == dtype:  # which autocast rounds float32 adapters to
                    names["autocast"] = 0
                if strategy is Strategy.COOPERATIVE:
                    names["two streams"] = 1
                claims += [Claim(group, name, tier) for name, tier in names.items()]
                sizes = tuple((M, N, K) for N, K in shapes or own for M in rows)
                claims.append(Claim(group, "time", 2, sizes))
    return sorted(claims, key=lambda claim: claim.tier)
