"""What a choice of backend and strategy depends on, and the choice."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_KERNEL_RANK = 256


class Layout(NamedTuple):
    """How a weight [N, K] lies in memory.

    Args:
        blocksize: of 4-bit codes; 0 for a dense weight.
        columns: whether it is stored as [K, N].
        obstacle: why tensor cores cannot take it, whatever its sizes, or None.
    """

    blocksize: int = 0
    columns: bool = False
    obstacle: str | None = None


class Problem(NamedTuple):
    """The shape of a call.

    Args:
        device_type: of x.
        x_dtype, a_dtype, b_dtype: of x, lora_A and lora_B.
        dtype: of the base GEMM.
        rank: the largest of several adapters' ranks.
        rows: M; None asks for a choice that names both strategies if M decides.
        four_bit: whether the weight is packed in 4 bits.
        columns, inner: N and K; None for unknown.
        dropout: whether x is dropped by a mask's state.
        device_index: a GPU's, or None.
        layout: of the weight; None for contiguous rows, and blocks of 64 codes.
        mixed: whether rows have adapters of their own (`multi_lora_linear`).
    """

    device_type: str
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    dtype: torch.dtype
    rank: int
    rows: int | None = None
    four_bit: bool = False
    columns: int | None = None
    inner: int | None = None
    dropout: bool = False
    device_index: int | None = None
    layout: Layout | None = None
    mixed: bool = False

    @property
    def itemsize(self) -> int:
        """The widest operand's bytes an element."""
        return max(d.itemsize for d in (self.x_dtype, self.a_dtype, self.b_dtype, self.dtype))

    def unsupported_reason(self) -> str | None:
        """Return why no kernel of this package takes the dtypes or the rank, or None."""
        return _unsupported_reason(self[1:5], self.rank)


@functools.cache  # asked in every call
def _unsupported_reason(dtypes: tuple[torch.dtype, ...], rank: int) -> str | None:
    for name, dtype in zip(("x", "lora_A", "lora_B", "y"), dtypes, strict=True):
        if dtype not in KERNEL_DTYPES:
            got = str(dtype).removeprefix("torch.")
            return f"{name} is {got}; the kernels take float32, bfloat16, float16"
    if rank > MAX_KERNEL_RANK:
        return f"rank {rank} is above the kernels' {MAX_KERNEL_RANK}"
    return None


@dataclass(frozen=True)
class Choice:
    """The backend, the strategy it follows, and the reason in words, as `explain` shows them."""

    backend: str
    strategy: str
    reason: str


def require_supported(backend: str, reason: str | None) -> None:
    """Raise RuntimeError if a requested backend cannot run for `reason`."""
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was requested and cannot run here: {reason}")
