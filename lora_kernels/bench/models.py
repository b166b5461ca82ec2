"""Shapes of the linear layers of models that people fine-tune, from their published configs."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

ROWS = {"cpu": (1, 16, 512), "cuda": (1, 16, 512, 4096, 16384)}  # of x


class Model(NamedTuple):
    hidden: int
    keys: int  # out-features of k, and of v
    queries: int  # of q
    intermediate: int


_MODELS = {
    "smollm2-135m": Model(576, 192, 576, 1536),
    "llama3-8b": Model(4096, 1024, 4096, 14336),
    "qwen3-8b": Model(4096, 1024, 4096, 12288),
    "llama3-70b": Model(8192, 1024, 8192, 28672),
}
NAMES = tuple(_MODELS)


def linear_shapes(name: str) -> list[tuple[int, int]]:
    """Return (K, N) of a block's linear layers, each once: q and o, k and v, gate and up, down.

    >>> linear_shapes("llama3-8b")
    [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    """
    hidden, keys, queries, intermediate = _MODELS[name]
    shapes = [(hidden, queries), (queries, hidden), (hidden, keys), (hidden, intermediate)]
    return list(dict.fromkeys([*shapes, (intermediate, hidden)]))


def sizes(form: str) -> Callable[[str], tuple[int, ...]]:
    """Return a parser of arguments such as 4096x14336, in a form such as KxN.

    >>> sizes("KxN")("4096x14336")
    (4096, 14336)
    """
    example = "x".join(["256", "2048", "2048"][: form.count("x") + 1])

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != form.count("x") + 1 or not all(map(str.isdecimal, parts)) or "0" in parts:
            raise argparse.ArgumentTypeError(f"got {text!r}, want {form}, such as {example}")
        return tuple(map(int, parts))

    return parse


def positive(text: str) -> int:
    """Parse an argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return int(text)


def real(limit: float, want: str) -> Callable[[str], float]:
    """Return a parser of arguments that are numbers of at least 0 and below a limit.

    >>> seconds("0.5"), probability("0")
    (0.5, 0.0)
    """

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 <= (value := float(text)) < limit:
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, want {want}")

    return parse


seconds = real(math.inf, "a finite number of seconds, 0 or more")  # 0: the fewest rounds
probability = real(1.0, "a probability in [0, 1)")


def requested_shapes(args: argparse.Namespace) -> list[tuple[int, int, int]] | None:
    """Return M, K, N of the requested layers, or None.

    These are --shapes, or those of --model with --rows; on a GPU llama3-8b's by default.
    """
    name = args.model or ("llama3-8b" if args.device == "cuda" and not args.quant else None)
    shapes: list[tuple[int, int, int]] | None = args.shapes
    if not shapes and name:
        shapes = [(M, K, N) for M in args.rows or ROWS[args.device] for K, N in linear_shapes(name)]
    return shapes
