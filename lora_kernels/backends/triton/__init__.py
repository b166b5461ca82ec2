"""Triton kernels, for GPUs (and, with TRITON_INTERPRET=1, for the CPU, in Triton's interpreter).

Forward, "fused": one kernel sums x·Wᵀ and P = D(x)·Aᵀ side by side, then adds S·Bᵀ. "two_pass": a
kernel computes P, and the GEMM starts its sums at S·Bᵀ. "cooperative": one launch for up to 16
rows, in which a few programs compute partial sums of P before all read W, and S·Bᵀ is added in the
epilogue; with more rows or ranks, or more programs than are co-resident, it runs as "two_pass".
"library": cuBLAS computes x·Wᵀ, after a 4-bit weight was decoded, and one pass over y adds the
rest. Backward: dx and dS are computed as y and P are, with W in the other layout; then dB and dA,
each in two passes.

Rounding points: those named in the kernels' docstrings. P and dS are float32 in memory; as operands
of a product they are rounded to the wider of x's (dY's) dtype and the adapter's, as PyTorch would.
Deterministic: atomics count who has published, never data; shares are added in order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

from ...core.problem import Strategy, require_supported
from .. import lazy_launchers

if TYPE_CHECKING:
    import torch

    from .equation import dora_norm as dora_norm
    from .equation import lora_linear as lora_linear
    from .equation import lora_linear_backward as lora_linear_backward
    from .equation import multi_lora_linear as multi_lora_linear
    from .equation import multi_lora_linear_backward as multi_lora_linear_backward

FUSED = Strategy.FUSED
TWO_PASS = Strategy.TWO_PASS
COOPERATIVE = Strategy.COOPERATIVE
LIBRARY = Strategy.LIBRARY
STRATEGIES = (FUSED, TWO_PASS, COOPERATIVE, LIBRARY)
TWO_STEPS = (TWO_PASS, LIBRARY)  # P is complete before the base GEMM starts


@functools.cache
def unavailable_reason() -> str | None:
    """Return why Triton cannot be imported, or None. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


@functools.cache
def is_interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def require(device: torch.device) -> None:
    """Raise RuntimeError if no kernel runs on the device."""
    from . import configs

    target = configs.target(device.type, device.index)
    require_supported("triton", configs.unsupported_reason(target, device.type))


__getattr__ = lazy_launchers(__name__, codec="codec")
