"""Predict the time of a `lora_linear` call on a CPU: a model, not a measurement.

A part's time is the longer of what it moves over the memory's bandwidth and what it multiplies over
the rate that the largest library GEMM reaches: both of the machine at hand, measured
(`timing.cpu_machine`). The shares and the two costs of a call below were fitted to
benchmarks/results on AMD family 26; RESULTS.md says how far the model is from those rows. Caches
are not in it, nor the making of dropout's mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backends import cpu
from .timing import Machine

THIN_SHARE = 0.5  # of the peak, that products with R columns or rows reach
LIBRARY_ROWS = 24  # a library GEMM of more than one row takes as long as if it had these besides
DECODE = 2.2  # multiply-adds of float32 at the peak that decoding one code takes
CODE_BYTES = 0.5 + 1 / 64  # a code, and its share of a scale of 8 bits
FORWARD_CALL, BACKWARD_CALL = 28e-6, 200e-6  # seconds of Python and autograd


@dataclass(frozen=True)
class Sizes:
    """A call: y [M, N] of x [M, K] and R ranks. base=False: the adapter's part alone."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype  # of the product
    adapter_itemsize: int = 4
    four_bit: bool = False
    base: bool = True

    @property
    def weight_bytes(self) -> float:
        each = CODE_BYTES if self.four_bit else self.dtype.itemsize
        return self.N * self.K * each * self.base

    @property
    def adapter_bytes(self) -> int:
        return (self.N + self.K) * self.R * self.adapter_itemsize

    @property
    def base_flops(self) -> float:
        """The FLOPs of y's base GEMM, and of dx's."""
        return 2.0 * self.M * self.N * self.K * self.base

    @property
    def thin_flops(self) -> float:
        """The FLOPs of a forward's skinny GEMMs; a backward's (dS, dB, dXA·A and dA) are twice."""
        return 2.0 * self.M * self.R * (self.N + self.K)


def flops(sizes: Sizes, step: bool = False) -> float:
    """Operations of a forward, or of forward and backward with x's gradient.

    >>> flops(Sizes(M=1, N=10, K=20, R=2, dtype=torch.float32))
    520.0
    """
    return (1 + step) * sizes.base_flops + (1 + 2 * step) * sizes.thin_flops


def moved(sizes: Sizes, step: bool = False) -> float:
    """Bytes that must move: each operand once a direction, nothing between.

    Forward: x, W, y and the adapter. Backward: dY, W, dx, x again, the adapter and its gradients.
    """
    x = sizes.M * sizes.K * sizes.dtype.itemsize
    y = sizes.M * sizes.N * sizes.dtype.itemsize
    forward = x + y + sizes.weight_bytes + sizes.adapter_bytes
    return forward + step * (2 * x + y + sizes.weight_bytes + 2 * sizes.adapter_bytes)


def predict(machine: Machine, sizes: Sizes, strategy: str, backward: bool = False) -> float:
    """Seconds of the forward or, `backward` alone, of what follows it where x, A and B train.

    strategy: one of the cpu backend's; any other counts as the library GEMM with the rank
    update after it. A dtype whose peak the machine does not say has float32's.

    >>> from lora_kernels.timing import Machine
    >>> machine = Machine("slow", 1e9, {torch.float32: 1e9})
    >>> sizes = Sizes(M=1, N=1000, K=1000, R=1, dtype=torch.float32)
    >>> round(predict(machine, sizes, "fused"), 4)  # 4 MB of weights at 1 GB/s
    0.004
    """
    fp32 = machine.peaks[torch.float32]
    peak = machine.peaks.get(sizes.dtype, fp32)
    product = sizes.base_flops / peak
    thin = (1 + backward) * sizes.thin_flops / THIN_SHARE
    codes = sizes.N * sizes.K * sizes.base * sizes.four_bit
    decode = codes * 2 * DECODE / fp32
    call = BACKWARD_CALL if backward else FORWARD_CALL
    if strategy in (cpu.FUSED, *cpu.GEMVS):
        once = moved(sizes, step=True) - moved(sizes) if backward else moved(sizes)
        return call + max(once / machine.bandwidth, product + thin / peak + decode)
    dense = sizes.N * sizes.K * sizes.base * sizes.dtype.itemsize
    x, y = (sizes.M * n * sizes.dtype.itemsize for n in (sizes.K, sizes.N))
    if sizes.M > 1:
        product *= 1 + LIBRARY_ROWS / sizes.M
    seconds = call + max((dense + (x + y) * sizes.base) / machine.bandwidth, product)
    if codes:  # are written out first
        seconds += max((sizes.weight_bytes + dense) / machine.bandwidth, decode)
    if sizes.R:
        # Then y (or dx) is read and written once more and x (or dY) read; float32 adapters beside
        # 16-bit rows are multiplied in float32, for which those are written out wide.
        wide = strategy != cpu.LIBRARY and sizes.adapter_itemsize > sizes.dtype.itemsize
        out, read = (x, y) if backward else (y, x)
        passes = 2 * out + (1 + backward) * (read + sizes.adapter_bytes)
        passes += (2 * (out + (1 + backward) * read)) * wide
        seconds += max(passes / machine.bandwidth, thin / (fp32 if wide else peak))
    return seconds
