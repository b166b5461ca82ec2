"""How many parts the CPU's kernels cut a call into, by the constants of csrc/cpu.

For instruction sets up to avx512bf16; AMX has kernels of its own.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

CPU = Path(__file__).resolve().parents[2] / "csrc/cpu"
UNITS = ("kernels.h", "kernels_impl.h", "streamed_impl.h", "few_rows_impl.h", "row_norm_impl.h")
UNITS += ("product_impl.h",)
_CONSTANT = re.compile(r"^constexpr \w+ (\w+(?:<bf16x2>)?) = (\d+)(?: << (\d+))?;", re.MULTILINE)


@functools.cache
def constants(isa: str) -> dict[str, int]:
    """Return the integers that the unit of this instruction set is compiled with."""
    vector = "avx512" if isa.startswith("avx512") else isa
    text = "".join((CPU / file).read_text() for file in (f"vec_{vector}.h", *UNITS))
    return {name: int(n) << int(shift or 0) for name, n, shift in _CONSTANT.findall(text)}


def cut(size: int, part: int) -> int:
    return -(-size // part)


def threads_of(isa: str, work: int, parts: int) -> int:
    """Return how many of two threads have work."""
    return min(2, parts) if work >= constants(isa)["MIN_PARALLEL_WORK"] else 1


def of_products(isa: str, M: int, N: int, K: int, R: int, pairs: bool) -> dict[str, int]:
    """Return the parts of `gemm` in both directions, or of `expand` in its place."""
    c = constants(isa)
    chain = 2 * c["CHAIN<bf16x2>"] if pairs else c["CHAIN"]
    found = {"rows of product": cut(M, c["Y_ROWS"]), "blocks of rows": cut(M, c["BLOCK_ROWS"])}
    found |= {"rows of expand": cut(M, c["EXPAND_ROWS"]), "ranks": cut(R, c["RANK_BLOCK"])}
    for name, columns, terms in (("y", N, K), ("dx", K, N)):
        tiles = found["rows of product"] * cut(columns, c["V"] * c["W"])
        found[f"columns of {name}"] = cut(columns, max(c["V"] * c["W"], c["PANEL_COLUMNS"]))
        found[f"panels of {name}"] = cut(terms, chain)
        found[f"threads of {name}"] = threads_of(isa, M * columns * R, tiles)
    return found


def of_thin_products(isa: str, M: int, N: int, K: int, R: int) -> dict[str, int]:
    """Return the parts of `shrink`, `backward_pair` and `grad_a`: P, dS with dB, and dA."""
    c, span = constants(isa), 256 * constants(isa)["W"]
    rows, pairs, strips = cut(M, c["DOT_ROWS"]), cut(M, c["PAIR_ROWS"]), cut(K, c["GRAD_A_COLUMNS"])
    return {
        "rows of P": rows,
        "spans of P": cut(K, span),
        "ranks of P": cut(R, 4),
        "threads of P": threads_of(isa, M * K * R, rows),
        "rows of dS": pairs,
        "columns of dB": cut(N, 64),
        "spans of dS": cut(N, span),
        "threads of dS": threads_of(isa, M * N * R, pairs),
        "rows of dA": cut(M, c["GRAD_A_ROWS"]),
        "columns of dA": strips,
        "threads of dA": threads_of(isa, M * K * R, strips),
    }


def of_few_rows(
    isa: str, M: int, N: int, K: int, R: int, itemsize: int, is_quantized: bool
) -> dict[str, int]:
    """Return the parts of the GEMV kernels. `itemsize`: of the elements of x that they read."""
    c = constants(isa)
    threads = threads_of(isa, M * N * K, N)
    slabs = cut(M * K * itemsize, c["X_SLAB_BYTES"]) if is_quantized else cut(K, 160 * c["W"])
    return {
        "threads": threads,
        "ranks": cut(R, c["RANK_BLOCK"]),
        "slabs": slabs,
        "passes": cut(M, c["CODED_PASS_ROWS" if is_quantized else "PASS_ROWS"]),
        "rows of W": cut(N // threads, c["STREAMS"] * c["STOLEN_ROWS"]),
    }


def of_row_norm(isa: str, N: int, K: int, R: int) -> dict[str, int]:
    c = constants(isa)
    return {
        "rows": cut(N, 16 * c["Y_ROWS"]),
        "columns": cut(K, c["NORM_COLUMNS"]),
        "ranks": cut(R, c["RANK_BLOCK"]),
        "threads": threads_of(isa, N * K * R, cut(N, c["Y_ROWS"])),
    }
