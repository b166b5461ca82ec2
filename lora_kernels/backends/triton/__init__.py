"""Triton kernels for GPUs and, with TRITON_INTERPRET=1, for Triton's interpreter on the CPU.

One strategy, "fused": a kernel sums x·Wᵀ and P = x·Aᵀ in its main loop. The epilogue adds S·Bᵀ.
The backward computes dx and dS as y and P, with W in the other layout. dB and dA follow, in two
passes each. A 4-bit weight is decoded in each tile.

Rounding points are documented in the kernels' docstrings. P and dS are stored in float32. As GEMM
operands they are rounded as in PyTorch, to the wider dtype of x (or dY) and the adapter. Results
are deterministic: no atomics, and partial sums are added in order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

from ...core import device
from ...core.problem import Strategy
from .. import lazy_launchers

if TYPE_CHECKING:
    from .linear import lora_linear as lora_linear
    from .linear import lora_linear_backward as lora_linear_backward

FUSED = Strategy.FUSED
STRATEGIES = (FUSED,)
MIN_TRITON = (3, 4)  # of torch 2.8; tests/compile_only compiles every kernel with it


@functools.cache
def unavailable_reason() -> str | None:
    """Return why Triton cannot compile the kernels, or None, without importing Triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = device.version("triton") or ""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < MIN_TRITON:
        want = ".".join(map(str, MIN_TRITON))
        return f"Triton {version} does not compile our kernels, want {want} or newer"
    return None


@functools.cache
def is_interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


__getattr__ = lazy_launchers(__name__, codec="codec")
