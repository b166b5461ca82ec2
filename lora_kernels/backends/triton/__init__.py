"""Triton kernels, for GPUs (and, with TRITON_INTERPRET=1, for the CPU, in Triton's interpreter).

Forward, "single pass": one kernel sums x·Wᵀ and P = D(x)·Aᵀ side by side, then adds S·Bᵀ. "Split":
P first, by itself, and S·Bᵀ is where the product's sums start. "Publish first, consume last": one
launch for up to 16 rows, in which a few programs make shares of P before all stream W, and S·Bᵀ is
added at the end; with more rows or ranks, or more programs than are co-resident, it is split.
"Library product": cuBLAS makes x·Wᵀ, a 4-bit weight decoded before it, and one pass over y adds the
rest. Backward: dx and dS are made as y and P are, with W in the other layout; then dB and dA, each
in two passes.

Rounding points: those named in the kernels' docstrings. P and dS are float32 in memory; as operands
of a product they are rounded to the wider of x's (dY's) dtype and the adapter's, as PyTorch would.
Deterministic: atomics count who has published, never data; shares are added in order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

from .. import lazy_launchers

if TYPE_CHECKING:
    import torch

SINGLE_PASS = "single pass"
SPLIT = "split"
COOPERATIVE = "publish first, consume last"
LIBRARY = "library product + rank update"
STRATEGIES = (SINGLE_PASS, SPLIT, COOPERATIVE, LIBRARY)
TWO_STEPS = (SPLIT, LIBRARY)  # P is complete before the base GEMM starts


@functools.cache
def absence() -> str | None:
    """Why there is no Triton; None where there is. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def require(device: torch.device) -> None:
    """RuntimeError where no kernel can run on it, saying why."""
    from . import configs

    target = configs.target(device.index) if device.type == "cuda" else None
    why = configs.unfit(absence(), configs.INTERPRETER if interpreted() else target, device.type)
    if why is not None:
        raise RuntimeError(f"backend 'triton' was requested and cannot run here: {why}")


__getattr__ = lazy_launchers(__name__, codec="codec")
