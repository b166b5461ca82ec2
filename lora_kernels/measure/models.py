"""Shapes of the linear layers of models that people fine-tune, from their published configs."""

from __future__ import annotations

import argparse
from typing import NamedTuple


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
    """(K, N) of a block's linear layers, each once: q and o, k and v, gate and up, down.

    >>> linear_shapes("llama3-8b")
    [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
    """
    hidden, keys, queries, intermediate = _MODELS[name]
    shapes = [(hidden, queries), (queries, hidden), (hidden, keys), (hidden, intermediate)]
    return list(dict.fromkeys([*shapes, (intermediate, hidden)]))


def shape(text: str) -> tuple[int, int]:
    """An argument such as 4096x14336: K, N."""
    try:
        K, N = (int(size) for size in text.split("x"))
    except ValueError:
        K = N = 0
    if min(K, N) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want KxN, such as 4096x14336")
    return K, N


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return int(text)
