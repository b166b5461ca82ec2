"""Every kernel with the partitions that it is cut into, and why it never sees an option.

A cell of the table is a kernel, a partition and an option. It is filled by a test in which that
kernel was launched with the option and with two parts at least. A kernel that is added, or cut in a
new way, is added here.
"""

from __future__ import annotations

from typing import NamedTuple

OPTIONS = ("dropout", "gate", "column scale", "4-bit", "adapters")
# Options that no kernel of a backend has.
ABSENT = {"triton": ("adapters", "dropout"), "cuda": ("adapters", "dropout")}
Absent = dict[str | tuple[str, str], str]  # an option, or a partition and an option -> the reason


class Kernel(NamedTuple):
    partitions: tuple[str, ...]
    absent: Absent


def _not(reason: str, *cells: str | tuple[str, str]) -> Absent:
    return dict.fromkeys(cells, reason)


_MASK = _not("the forward masks x, where P is made; dx is masked as y", "dropout")
_GATE = _not("the gate multiplies S, and the sums of dA and dB", "gate")
_WEIGHT = _not("it reads no base weight", "4-bit")
_DECODED = _not("the weight is decoded before", "4-bit")
_HOST = _not("dY has been multiplied by the column scale", "column scale")
_BASE = _not("of several adapters it makes the base GEMM alone", "adapters")
_DS = _not("dS has been multiplied by the gate", "gate")
_DY = _not("dY has no mask", "dropout")
_NORM = _not("W + (B ⊙ g)·A has no x", "dropout", "column scale", "adapters")
_CODEC = _not("it has a weight alone", "dropout", "gate", "column scale", "adapters")
_THIN = _GATE | _WEIGHT

_TILES = ("rows", "columns", "sum", "ranks")
_OF_P = ("rows", "ranks", "splits", "sum")
_OF_GRADIENT = ("columns", "ranks", "splits", "sum")
_PRODUCT = ("threads", "rows", "columns", "blocks of rows", "panels", "ranks")

KERNELS: dict[str, dict[str, Kernel]] = {
    "triton": {
        "linear, fused": Kernel(("rows", "columns", "sum", "groups of rows"), {}),
        "linear, fused, dx": Kernel(("rows", "columns", "sum", "groups of rows"), {}),
        "linear, two_pass": Kernel((*_TILES, "splits"), {}),
        "linear, two_pass, dx": Kernel((*_TILES, "splits"), {}),
        "shrink": Kernel(_OF_P, _THIN),
        "outer": Kernel(_OF_GRADIENT, _THIN),
        "shrink_outer": Kernel(("rows", "splits", "sum"), _THIN),
        "reduce": Kernel(("columns", "splits"), _WEIGHT),
        "dequantize": Kernel(("rows", "columns"), _CODEC),
    },
    "cuda": {
        "gemm": Kernel((*_TILES, "splits"), {}),
        "gemm, dx": Kernel((*_TILES, "splits"), _HOST),
        "finish": Kernel(("elements", "splits"), _not("gemm has", "gate", "4-bit")),
        "decode": Kernel(("tiles", "rows", "chunks", "splits", "sum"), {}),
        "thin": Kernel(_OF_P, _THIN),
        "thin, over rows": Kernel(_OF_GRADIENT, _THIN),
        "pair": Kernel(("rows", "ranks", "splits", "sum"), _THIN),
        "column_sums": Kernel(("columns", "splits"), _THIN),
        "reduce": Kernel(("elements", "splits"), _HOST | _WEIGHT),
    },
    "cpu": {
        "shrink": Kernel(
            ("threads", "rows", "spans", "ranks"),
            _THIN | _not("it multiplies y, not x", "column scale"),
        ),
        "few_rows": Kernel(("threads", "passes", "rows of W", "slabs", "ranks"), _BASE),
        "expand": Kernel(("threads", "rows", "columns", "ranks"), _MASK | _DECODED),
        "expand, dx": Kernel(("threads", "rows", "columns", "ranks"), _DS | _HOST | _DECODED),
        "product": Kernel(_PRODUCT, _MASK | _BASE),
        "product, dx": Kernel(_PRODUCT, _DS | _HOST | _BASE),
        "backward_pair": Kernel(("threads", "rows", "columns", "spans", "ranks"), _DY | _WEIGHT),
        "grad_a": Kernel(("threads", "rows", "columns", "ranks"), _DS | _HOST | _WEIGHT),
        "row_norm": Kernel(("threads", "rows", "columns", "ranks"), _NORM),
        "dequantize": Kernel(("threads",), _CODEC),
        "quantize": Kernel(("threads",), _CODEC),
        "multi_lora_linear": Kernel(
            ("adapters of a thread",),
            _not("one adapter's kernels take it", "gate", "column scale") | _DECODED,
        ),
        "library product": Kernel(
            ("panels",), _not("a panel is decoded", "dropout", "gate", "column scale", "adapters")
        ),
        "library product, dx": Kernel(
            ("panels",), _not("a panel is decoded", "dropout", "gate", "column scale", "adapters")
        ),
    },
    "eager": {
        "dora_norm": Kernel(("panels",), _NORM),
        "column_dot": Kernel(
            ("panels",), _not("it sums dY ⊙ z alone", "dropout", "gate", "4-bit", "adapters")
        ),
        "multi_lora_linear": Kernel(
            ("adapters",), _not("rows with adapters of their own have none", "gate", "column scale")
        ),
    },
}


def cells() -> list[tuple[str, str, str, str]]:
    """Backend, kernel, partition and option of all cells that have to be filled."""
    return [
        (backend, name, partition, option)
        for backend, kernels in KERNELS.items()
        for name, kernel in kernels.items()
        for partition in kernel.partitions
        for option in OPTIONS
        if option not in kernel.absent and (partition, option) not in kernel.absent
        if option not in ABSENT.get(backend, ())
    ]
