"""The inputs of the choice of backend and strategy, and the choice."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_KERNEL_RANK = 256
MANY_ROWS = 4096  # M, N or K of a large model, the default if the size is unknown
# Why Triton and CUDA do not run `multi_lora_linear`.
ONE_ADAPTER = (
    "the kernels for GPUs take one adapter; in a GEMM of several, a NaN of one reaches the rows of "
    "the others"
)
# Why Triton and CUDA do not run a call with dropout.
NO_DROPOUT = "the kernels for GPUs have no dropout; the eager backend runs PyTorch's"
_FORMS = "shift", "codes of 8 bits", "scales in float16"  # of `Codes.operands`
# The operands of `Problem.extra` that a backend takes. The eager backend takes all.
EXTRA_OPERANDS = {"cpu": ("rng", *_FORMS), "triton": (), "cuda": ()}


class Strategy(str, Enum):
    """The way in which a backend computes a call. Members are strings, the names for users.

    >>> Strategy("fused") is Strategy.FUSED, f"{Strategy.FUSED}"
    (True, 'fused')
    >>> Strategy.GEMV.description
    'for few rows of x, reads each row of a dense weight once'
    """

    description: str

    FUSED = "fused", "sums the base GEMM and the low-rank update in one kernel"
    TWO_PASS = "two_pass", "computes P = D(x)·Aᵀ first; one GEMM then starts its sums at S·Bᵀ"
    COOPERATIVE = "cooperative", "for few rows of x, one launch: some blocks compute P, all read W"
    LIBRARY = "library", "runs the base GEMM in PyTorch's library, and the update beside it"
    GEMV = "gemv", "for few rows of x, reads each row of a dense weight once"
    GEMV_QUANTIZED = "gemv_quantized", "for few rows of x, decodes W in registers or L1"
    PANELS = "panels", "computes row norms from library GEMMs, a panel of the weight at a time"

    def __new__(cls, value: str, description: str = "") -> Strategy:
        member = str.__new__(cls, value)
        member._value_, member.description = value, description
        return member

    __str__, __repr__ = str.__str__, str.__repr__


class Layout(NamedTuple):
    """The memory layout of a weight [N, K].

    Args:
        blocksize: of 4-bit codes; 0 for a dense weight.
        columns: whether the weight is stored as [K, N].
        unsupported_reason: why tensor core kernels do not support the layout, or None.
    """

    blocksize: int = 0
    columns: bool = False
    unsupported_reason: str | None = None


class Problem(NamedTuple):
    """The shape of a call.

    Args:
        device_type: of x.
        x_dtype, a_dtype, b_dtype: of x, lora_A and lora_B.
        dtype: of the base GEMM.
        rank: the largest of several adapters' ranks.
        rows: M.
        is_quantized: whether the weight is packed.
        columns, inner: N and K.
        extra: the names of the operands after `bias` that the call has, and of its `Codes`.
        device_index: of a GPU, or None.
        layout: of the weight; None for contiguous rows, and blocks of 64 codes.
        mixed: whether each row has its own adapter (`multi_lora_linear`).
    """

    device_type: str
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    dtype: torch.dtype
    rank: int
    rows: int = MANY_ROWS
    is_quantized: bool = False
    columns: int = MANY_ROWS
    inner: int = MANY_ROWS
    extra: tuple[str, ...] = ()
    device_index: int | None = None
    layout: Layout | None = None
    mixed: bool = False

    @property
    def itemsize(self) -> int:
        """The bytes per element of the widest operand."""
        return max(d.itemsize for d in (self.x_dtype, self.a_dtype, self.b_dtype, self.dtype))

    def unsupported_reason(self, backend: str) -> str | None:
        """Return why a backend's kernels do not run the dtypes, the rank or an operand, or None.

        >>> f32 = torch.float32
        >>> Problem("cpu", f32, f32, f32, f32, 8, extra=("row_scale",)).unsupported_reason("cpu")
        'its kernels take no row_scale'
        """
        return _unsupported_reason(backend, self[1:5], self.rank, self.extra)


@functools.cache  # called for every call of an op
def _unsupported_reason(
    backend: str, dtypes: tuple[torch.dtype, ...], rank: int, extra: tuple[str, ...]
) -> str | None:
    for name, dtype in zip(("x", "lora_A", "lora_B", "y"), dtypes, strict=True):
        if dtype not in KERNEL_DTYPES:
            got = str(dtype).removeprefix("torch.")
            return f"{name} is {got}; the kernels take float32, bfloat16, float16"
    if rank > MAX_KERNEL_RANK:
        return f"rank {rank} is above the kernels' {MAX_KERNEL_RANK}"
    for name in extra:
        if name not in EXTRA_OPERANDS[backend]:
            return _refusal(backend, name)
    return None


def _refusal(backend: str, operand: str) -> str:
    if operand in ("rng", "mask") and backend != "cpu":
        return NO_DROPOUT
    if operand == "mask":
        return "its kernels take no dropout_mask, but rng, its state: seed and offset, int64 [2]"
    return f"its kernels take no {operand}"


@dataclass(frozen=True)
class Choice:
    """The chosen backend and strategy, and the reason in words, which `explain` prints."""

    backend: str
    strategy: Strategy
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} {self.strategy}"

    @property
    def is_eager(self) -> bool:
        """Whether the eager backend runs the call."""
        return self.backend == "eager"


def require_supported(backend: str, reason: str | None) -> None:
    """Raise RuntimeError if a requested backend cannot run for `reason`."""
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was requested and cannot run here: {reason}")
