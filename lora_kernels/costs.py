"""Predict the time of `lora_linear` on a GPU for each backend.

A strategy takes the longer of two times: the host's, to launch it from Python, and the device's.
On the device its GEMM takes the longest of memory traffic, FLOPs (with decoding, which does not
overlap in one block) and round trips to memory. The time of FLOPs and decoding is divided by the
share of multiprocessors that have a block. Further passes over x and y, and launches, are added.
Rates are shares of the data sheet's (`device.DeviceInfo`), times the factors in `Rates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .backends.triton import configs
from .core.problem import Problem, Strategy
from .device import DeviceInfo

Shapes = Sequence[tuple[int, int]]  # N and K
LAUNCH = 3e-6  # seconds of the smallest kernel, launched back to back
PYTHON_LAUNCH = 6e-6  # seconds of a call of torch, one after another in eager mode
# Host seconds of a forward, and of each kernel in it: 20 and 25 µs of the CUDA backend, 57 and 87
# of Triton's, with one and two kernels and a driver that launches nothing.
CUDA_CALL, CUDA_LAUNCH = 15e-6, 5e-6
TRITON_CALL, TRITON_LAUNCH = 27e-6, 30e-6
# Shares of the data sheet's peak, estimates.
BANDWIDTH_SHARE = 0.85  # of the bandwidth, that streams reach
LIBRARY_SHARE = 0.75  # of the tensor cores' peak, that a large cuBLAS GEMM reaches
# The share that mma.sync of the CUDA kernels reaches. From sm_90 on it cannot reach the peak, which
# wgmma and tcgen05 have; sm_120 has no other instruction.
MMA_SHARE = {80: 0.65, 86: 0.65, 89: 0.65, 90: 0.4, 100: 0.2, 103: 0.2, 120: 0.65}
TRITON_SHARE = 0.6  # Triton emits wgmma and tcgen05
FP32_SHARE = 0.8  # of the CUDA cores' peak, that float32 GEMMs of cuBLAS reach
SIMT_SHARE = 0.35  # that linear.cu reaches: it loads a step, then multiplies. An estimate.
# Of the tensor cores' peak in TF32, a sixth of that in 16 bits for 3×TF32, which Triton's float32
# reaches: it splits operands in registers and stores them again. An estimate.
TF32_SHARE = 0.35
# Codes that a multiprocessor decodes per clock in gemm.cu: 8192 in the 565 instructions of one
# iteration of a warp's main loop, four warps at a time: 64 mma.sync are 11 % of it (`loop` in
# tests/compile_only/budgets.json).
CODES_PER_CLOCK = 14.5
# The same of Triton's two_pass_kernel: 8192 in 1407 clocks on sm_80, 4096 in 504 on sm_90.
TRITON_CODES_PER_CLOCK = {80: 5.8, 86: 5.8, 89: 5.8, 90: 8.1, 100: 8.1, 103: 8.1, 120: 5.8}
# Seconds of a step in which one block of eight warps decodes and then multiplies: a load from
# shared memory, two barriers and the first products, which no second block hides. An estimate.
STEP = 0.15e-6
# The same of decode.cu, for up to 8 and up to 16 rows: `peak` of its loop in budgets.json.
DECODE_CODES_PER_CLOCK = (26.0, 19.0)
# Seconds of a load from memory and from the L2 cache, beside others. Idle, 470 to 540 and 260 to
# 275 clocks on A100, RTX 4090 and H100 (arXiv 2402.13499). Under load is an estimate.
LATENCY, L2_LATENCY = 0.6e-6, 0.3e-6
# Bytes a clock that the L2 cache gives a multiprocessor: 7.4 TB/s on H100, 5.2 on RTX 4090. An
# estimate within a quarter.
L2_BYTES = {80: 32, 90: 32, 100: 32, 103: 32, 86: 16, 89: 16, 120: 16}
DECODE_ROWS = 16
DECODE_TILE, DECODE_CHUNK, DECODE_WARPS = 16, 128, 8  # of decode.cu
DECODE_CODEBOOK_BYTES, DECODE_MAX_SHARED_BYTES = 32 << 10, 80 << 10  # the latter: most with x
TILE_M, TILE_N = 64, 128  # of gemm.cu
# Of its split-K, in backends/cuda/equation.py.
SPLIT_K_BLOCKS, MAX_SPLITS, MIN_SPLIT_K = 264, 8, 256
# Rows up to which bitsandbytes' fused 4-bit GEMM was measured faster than its decoding + cuBLAS, on
# ten cards, for weights of 4 Mi elements and more: with ⌈N / 64⌉ blocks at least 3, 2, 1 and 1/2 of
# the multiprocessors, and fewer. Smaller weights are predicted by the same table. From
# `_gemm_4bit_use_custom_cuda` of its 0.50.2, where the tiers for K / N are finer. Up to 4 rows its
# fused GEMM always runs.
BITSANDBYTES_LARGE = 4 << 20
WAVES = (3.0, 2.0, 1.0, 0.5, 0.0)
BITSANDBYTES_ROWS = {
    80: (128, 64, 64, 16, 16),
    86: (128, 128, 128, 64, 16),
    89: (256, 128, 64, 8, 8),
    90: (64, 48, 32, 16, 7),
    100: (32, 8, 8, 4, 4),
    103: (32, 8, 8, 4, 4),
    120: (256, 128, 64, 8, 8),
}


@dataclass(frozen=True)
class Rates:
    """Factors of the model's rates and times; 1 is the estimate from the data sheet.

    Attributes:
        bandwidth, library, cuda, triton, decoding: of the bandwidth, of the tensor cores' rate that
            cuBLAS, the CUDA and the Triton kernels reach, and of the codes decoded in a clock.
        latency, launch, host: of the seconds of a load, of a launch, and of the host's calls.
    """

    bandwidth: float = 1.0
    library: float = 1.0
    cuda: float = 1.0
    triton: float = 1.0
    decoding: float = 1.0
    latency: float = 1.0
    launch: float = 1.0
    host: float = 1.0


class Cost(NamedTuple):
    """A strategy's predicted seconds. bottleneck: the part that takes most of them."""

    backend: str
    strategy: Strategy
    seconds: float
    bottleneck: str


def is_known(gpu: DeviceInfo) -> bool:
    """Return True if the model has the GPU's rates."""
    return gpu.kind == "cuda" and bool(gpu.clock and gpu.bandwidth and gpu.tensor_flops)


def unsupported_reason(gpu: DeviceInfo) -> str | None:
    """Return why our kernels do not run on the GPU, or None."""
    if gpu.capability < 80:
        return f"{gpu.name} is sm_{gpu.capability}; the kernels are for sm_80 and newer"
    return None


def predict(
    gpu: DeviceInfo, problem: Problem, bitsandbytes: bool = True, rates: Rates = Rates()
) -> list[Cost]:
    """Return every backend's strategies for a forward, the fastest first.

    x, W and y have `problem.dtype`, A and B their own. On a GPU that our kernels do not run on,
    eager's alone.

    bitsandbytes: whether it decodes 4-bit weights for the eager backend.

    >>> import torch
    >>> from lora_kernels.costs import DeviceInfo, Problem, predict
    >>> rates = dict(clock=1.755e9, bandwidth=3.35e12, tensor_flops=949e12, fp32_flops=59e12)
    >>> h100 = DeviceInfo("cuda", 90, 132, 227 << 10, "H100", **rates)
    >>> dtypes = [torch.bfloat16] * 4
    >>> token = Problem("cuda", *dtypes, rank=16, rows=1, four_bit=True, inner=14336)
    >>> predict(h100, token)[0].strategy
    'cooperative'
    """
    call = _Call(gpu, problem, rates)
    found = [_predict_eager(call, bitsandbytes)]
    if unsupported_reason(gpu) is None:
        found += [_predict_triton_library(call), _predict_triton_two_pass(call)]
        found.append(_predict_cuda_simt(call))
        if call.itemsize < 4:
            found.append(_predict_cuda_gemm(call))
            if call.M <= DECODE_ROWS:
                launched = Strategy.COOPERATIVE, Strategy.OVERLAPPED
                found += [_predict_cuda_decode(call, strategy) for strategy in launched]
    return sorted(found, key=lambda cost: cost.seconds)


class _Call:
    """The sizes of a call, and the GPU's rates for it.

    Attributes:
        weight, dense, x, y, adapter: bytes.
        launch, latency, l2_latency, memory_s, shrink_s: seconds.
    """

    def __init__(self, gpu: DeviceInfo, problem: Problem, rates: Rates) -> None:
        self.gpu, self.problem, self.rates = gpu, problem, rates
        self.launch = LAUNCH * rates.launch
        self.latency, self.l2_latency = LATENCY * rates.latency, L2_LATENCY * rates.latency
        self.M, self.N, self.K = problem.rows, problem.columns, problem.inner
        self.R, self.itemsize = problem.rank, problem.dtype.itemsize
        self.four_bit = problem.four_bit
        self.dense = self.N * self.K * self.itemsize
        self.weight = self.N * self.K * (0.5 + 1 / 64) if self.four_bit else self.dense
        self.x, self.y = self.M * self.K * self.itemsize, self.M * self.N * self.itemsize
        a_row, b_column = self.K * problem.a_dtype.itemsize, self.N * problem.b_dtype.itemsize
        self.adapter = self.R * (a_row + b_column)
        self.bandwidth = gpu.bandwidth * BANDWIDTH_SHARE * rates.bandwidth
        self.memory_s = (self.x + self.weight + self.y + self.adapter) / self.bandwidth
        # The seconds of the kernel that computes P: x is read once more.
        self.shrink_s = (self.x + self.adapter) / self.bandwidth + self.launch

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.N * (self.K + self.R)

    def sm_utilization(self, blocks: int) -> float:
        """Return the share of the multiprocessors' time that blocks of equal work fill."""
        count = self.gpu.multiprocessors
        return max(blocks, 1) / (max(_ceil_div(blocks, count), 1) * count)

    def decode_seconds(self, times: int, codes_per_clock: float) -> float:
        """Return the seconds of decoding the weight `times` times, once in each tile of rows."""
        codes = times * self.N * self.K if self.four_bit else 0
        codes_per_clock *= self.rates.decoding
        return codes / (codes_per_clock * self.gpu.clock * self.gpu.multiprocessors)

    def cost(
        self,
        backend: str,
        strategy: Strategy,
        parts: dict[str, float],
        others: float,
        host: float,
    ) -> Cost:
        """Return the predicted cost.

        Args:
            parts: seconds of what overlaps in the GEMM. The longest counts.
            others: seconds of the kernels beside the GEMM.
            host: seconds to launch all from Python.
        """
        longest = max(parts, key=lambda name: parts[name])
        device, host = parts[longest] + others, host * self.rates.host
        if host > device:
            return Cost(backend, strategy, host, "launches from Python")
        return Cost(backend, strategy, device, longest)


def _gemm_parts(
    gemm: float, decoding: float, moved: float, latency: float = 0.0
) -> dict[str, float]:
    """Return the parts of a GEMM whose blocks decode and multiply in turn: the times add up."""
    name = "decoding" if decoding > gemm else "the GEMM"
    return {name: gemm + decoding, "memory": moved, "latency": latency}


def _library(call: _Call, decode: float) -> dict[str, float]:
    """Return the parts of a cuBLAS GEMM. decode: seconds of decoding its weight before."""
    if call.itemsize < 4:
        rate = call.gpu.tensor_flops * LIBRARY_SHARE
    else:
        rate = call.gpu.fp32_flops * FP32_SHARE
    gemm = 2.0 * call.M * call.N * call.K / (rate * call.rates.library)
    moved = (call.x + call.dense + call.y) / call.bandwidth
    return {"the GEMM": gemm + decode, "memory": moved + decode}


def _predict_eager(call: _Call, bitsandbytes: bool) -> Cost:
    # x·Aᵀ reads x again, and the update is written. One kernel reads x and writes D(x) and the
    # mask, a byte an element.
    dropout = call.problem.dropout
    dropped = 2 * call.x + call.M * call.K if dropout else 0
    passes = (call.x + call.y + call.adapter + dropped) / call.bandwidth
    launches, decode = 5 if dropout else 4, 0.0
    if call.four_bit:
        # bitsandbytes reads codes and writes weights. Three kernels of PyTorch write int32 indices,
        # float32 pairs and weights, and read the first two again.
        elements, kernels = call.N * call.K, 1 if bitsandbytes else 3
        between = 0 if bitsandbytes else elements * (2 * 2 + 2 * 4)
        decode = (call.weight + elements * call.itemsize + between) / call.bandwidth
        launches += kernels
    parts = _library(call, decode)
    parts["memory"] += call.y / call.bandwidth  # the base GEMM's epilogue reads the update
    rows = bitsandbytes_rows(call.gpu, call.problem) if call.four_bit and bitsandbytes else 0
    if 0 < call.M <= rows:
        # Its fused GEMM: the bytes at one row, as long as decoding + GEMM at its last row. A line
        # joins both. It saves the launch of the decoding.
        launches -= 1
        slow = max(parts.values())
        parts = {"decoding": call.memory_s + max(0.0, slow - call.memory_s) * call.M / rows}
    others = passes + launches * call.launch
    return call.cost("eager", Strategy.LIBRARY, parts, others, launches * PYTHON_LAUNCH)


def bitsandbytes_rows(gpu: DeviceInfo, problem: Problem) -> int:
    """Return the most rows for which bitsandbytes' `gemm_4bit` decodes inside of its GEMM."""
    if problem.dtype is torch.float32 or gpu.capability not in BITSANDBYTES_ROWS:
        return 7 if gpu.capability < 100 else 4
    waves = _ceil_div(problem.columns, 64) / gpu.multiprocessors
    tiers = zip(WAVES, BITSANDBYTES_ROWS[gpu.capability], strict=True)
    return next(rows for least, rows in tiers if waves >= least)


def _predict_triton_library(call: _Call) -> Cost:
    decode = 0.0
    if call.four_bit:
        decode = (call.weight + call.N * call.K * call.itemsize) / call.bandwidth + call.launch
    passes = (call.x + 2 * call.y + call.adapter) / call.bandwidth
    kernels = 3 if call.four_bit else 2
    host = TRITON_CALL + kernels * TRITON_LAUNCH
    others = passes + 3 * call.launch
    return call.cost("triton", Strategy.LIBRARY, _library(call, decode), others, host)


def _predict_triton_two_pass(call: _Call) -> Cost:
    tile = configs.linear(call.gpu, call.M, call.itemsize, call.four_bit, 0)
    rows, columns = _ceil_div(call.M, tile.block_m), _ceil_div(call.N, tile.block_n)
    busy = call.sm_utilization(rows * columns)
    if call.itemsize < 4:
        rate = call.gpu.tensor_flops * TRITON_SHARE
    else:
        rate = call.gpu.tensor_flops / 6 * TF32_SHARE
    gemm = call.flops(rows * tile.block_m) / (rate * call.rates.triton) / busy
    # A program waits for memory once for the steps that its other stages hold.
    together = call.gpu.multiprocessors * (8 // tile.warps)
    steps = _ceil_div(rows * columns, together) * _ceil_div(call.K, tile.block_k)
    latency = steps / max(1, tile.stages - 1) * call.latency
    decoding = call.decode_seconds(rows, TRITON_CODES_PER_CLOCK[call.gpu.capability]) / busy
    if call.four_bit and tile.warps == 8:
        decoding += steps * STEP
    parts = _gemm_parts(gemm, decoding, call.memory_s, latency)
    host = TRITON_CALL + 2 * TRITON_LAUNCH
    return call.cost("triton", Strategy.TWO_PASS, parts, call.shrink_s + call.launch, host)


def _predict_cuda_gemm(call: _Call) -> Cost:
    rows, columns = _ceil_div(call.M, TILE_M), _ceil_div(call.N, TILE_N)
    most = min(SPLIT_K_BLOCKS // max(1, rows * columns), _ceil_div(call.K, MIN_SPLIT_K))
    splits = max(1, min(MAX_SPLITS, most))
    busy = call.sm_utilization(rows * columns * splits)
    gpu = call.gpu
    # A step along K reads this from the L2 cache for 2 · TILE_M · TILE_N operations.
    step = TILE_M * 2 + TILE_N * (0.5 + 1 / 64 if call.four_bit else 2)
    l2 = L2_BYTES[gpu.capability] * gpu.clock * gpu.multiprocessors
    rate = min(gpu.tensor_flops * MMA_SHARE[gpu.capability], l2 * 2 * TILE_M * TILE_N / step)
    gemm = call.flops(rows * TILE_M) / (rate * call.rates.cuda) / busy
    decoding = call.decode_seconds(rows, CODES_PER_CLOCK) / busy
    parts = _gemm_parts(gemm, decoding, call.memory_s)
    sums = 8 * call.M * call.N * splits / call.bandwidth + call.launch if splits > 1 else 0.0
    host = CUDA_CALL + 2 * CUDA_LAUNCH
    others = _cuda_shrink_seconds(call) + 2 * call.launch + sums
    return call.cost("cuda", Strategy.TWO_PASS, parts, others, host)


def _predict_cuda_simt(call: _Call) -> Cost:
    rows = _ceil_div(call.M, TILE_M) * TILE_M  # whole tiles are multiplied
    busy = call.sm_utilization(_ceil_div(call.M, TILE_M) * _ceil_div(call.N, 64))
    gemm = call.flops(rows) / (call.gpu.fp32_flops * SIMT_SHARE * call.rates.cuda) / busy
    decoding = call.decode_seconds(rows // TILE_M, CODES_PER_CLOCK) / busy
    parts = _gemm_parts(gemm, decoding, call.memory_s)
    host = CUDA_CALL + 2 * CUDA_LAUNCH
    others = _cuda_shrink_seconds(call) + 2 * call.launch
    return call.cost("cuda", Strategy.TWO_PASS_SIMT, parts, others, host)


def _cuda_shrink_seconds(call: _Call) -> float:
    """Return the seconds of thin.cu, which computes P on CUDA cores."""
    flops = 2.0 * call.M * call.R * call.K / (call.gpu.fp32_flops * FP32_SHARE)
    return max(call.shrink_s, flops + call.launch)


def _predict_cuda_decode(call: _Call, strategy: Strategy) -> Cost:
    """Predict decode.cu: it reads W once, and the first blocks compute P before their part of W."""
    gpu, M, R = call.gpu, call.M, call.R
    width = 8 if M <= 8 else 16
    # Codes are multiplied as a high and a low part.
    gemm = 2.0 * (2 if call.four_bit else 1) * width * call.N * call.K
    gemm /= gpu.tensor_flops * MMA_SHARE[gpu.capability] * call.rates.cuda
    decoding = call.decode_seconds(1, DECODE_CODES_PER_CLOCK[M > 8])
    chunks, tiles = _ceil_div(call.K, DECODE_CHUNK), _ceil_div(call.N, DECODE_TILE)
    shared = DECODE_WARPS * DECODE_TILE * width * 4 + _ceil_div(M * R * 4, 16) * 16  # sums and P
    shared += DECODE_CODEBOOK_BYTES if call.four_bit else 0
    x = chunks * DECODE_CHUNK * 2 * M
    shared += x if shared + x <= DECODE_MAX_SHARED_BYTES else 0
    blocks = min(tiles, gpu.multiprocessors * max(1, min(2, gpu.shared_memory // shared)))
    turns = _ceil_div(tiles, blocks)
    # A warp waits for each chunk of W before it asks for the next.
    latency = turns * _ceil_div(chunks, DECODE_WARPS) * call.latency
    # Before W: the first loads of x and A. Warps then write the R·M elements of P, 8 at a time, and
    # the other blocks wait for the flag. After each tile: B and the partial sums, two trips.
    loads = _ceil_div(R * M, DECODE_WARPS) * _ceil_div(_ceil_div(call.K, 16), MIN_SPLIT_K)
    p_seconds = loads * call.l2_latency
    trips = 2 * call.latency + p_seconds + turns * 2 * call.l2_latency
    parts = {"memory": call.memory_s, "latency": latency, "decoding": decoding, "the GEMM": gemm}
    launches = 1 if strategy == Strategy.COOPERATIVE else 2
    others = (1 + launches) / 2 * call.launch + trips
    host = CUDA_CALL + launches * CUDA_LAUNCH
    return call.cost("cuda", strategy, parts, others, host)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
