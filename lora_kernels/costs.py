"""What a call of `lora_linear` should take on a GPU, by each backend: a model, not a measurement.

A strategy's time is the longest of what it moves over the memory's bandwidth, what it multiplies
over the rate that its kind of product reaches, and, where codes are decoded in a kernel, the rate
at which its instructions are issued; then the passes over x and y that it makes besides, and
launches. All rates are shares of the data sheet's, which stand below. `selection` asks this where
nothing was measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .backends import cuda, triton
from .backends.cuda import fit
from .backends.cuda import heuristics as cuda_heuristics
from .backends.triton import configs
from .backends.triton import heuristics as triton_heuristics
from .core.problem import Choice, Problem

# For `multi_lora_linear`: P = D(x)·Aᵀ is complete before the base GEMM starts.
TWO_STEPS = {"triton": triton.TWO_STEPS, "cuda": cuda.TWO_STEPS}
LAUNCH = 3e-6  # seconds that a kernel takes at least, one after another
PYTHON_LAUNCH = 6e-6  # of a call of torch, which eager makes one after another
BANDWIDTH_SHARE = 0.85  # what streams reach
LIBRARY_SHARE = 0.75  # of the matrix units' peak, that a large product of the library reaches
# And the CUDA kernels' mma.sync: all of them before sm_90; from there on a part, since wgmma and
# tcgen05 are other units' instructions. sm_120 has no other.
MMA_SHARE = {80: 0.65, 86: 0.65, 89: 0.65, 90: 0.4, 100: 0.2, 103: 0.2, 120: 0.65}
# And Triton's, which takes those.
TRITON_SHARE = 0.6
FP32_SHARE = 0.6  # of the ordinary multipliers, that products in float32 reach
# Codes that a multiprocessor decodes a clock beside its products: 8192 in the 565 instructions of
# a warp's turn of gemm's loop, four warps at a time (benchmarks/KERNELS.md). Triton's likewise.
CODES_A_CLOCK = 14.5
DECODE_ROWS = 16
TILE_M = 64  # of gemm
TRITON_TILE_M = 128


@dataclass(frozen=True)
class Gpu:
    """The properties of a device that a cost depends on, by its data sheet."""

    name: str
    capability: int  # 90 for sm_90
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    matrix: float  # operations a second of 16-bit products summed in float32
    fp32: float  # operations a second of the ordinary multipliers


# Operations a clock and multiprocessor: 16-bit products, dense, summed in float32; float32.
_RATES = {
    80: (2048, 128), 86: (512, 256), 89: (512, 256), 90: (4096, 256), 100: (8192, 256),
    103: (8192, 256), 120: (512, 256),
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A strategy's predicted seconds, and what takes most of them."""

    backend: str
    strategy: str
    seconds: float
    because: str


@functools.cache
def here(device_index: int | None) -> Gpu | None:
    """A GPU of this machine; None where its properties are not known."""
    p = torch.cuda.get_device_properties(device_index)
    capability = 10 * p.major + p.minor
    bus, memory_clock = getattr(p, "memory_bus_width", 0), getattr(p, "memory_clock_rate", 0)
    clock = getattr(p, "clock_rate", 0) * 1e3
    if torch.version.hip or capability not in _RATES or not (bus and memory_clock and clock):
        return None
    matrix, fp32 = _RATES[capability]
    count = p.multi_processor_count
    return Gpu(
        p.name, capability, count, clock, 2 * memory_clock * 1e3 * bus / 8,
        matrix * clock * count, fp32 * clock * count,
    )  # fmt: skip


def obstacle(gpu: Gpu) -> str | None:
    """Why our kernels do not run there; None where they do."""
    if gpu.capability < 80:
        return f"{gpu.name} is sm_{gpu.capability}; the kernels are for sm_80 and newer"
    return None


def predict(
    gpu: Gpu,
    M: int,
    N: int,
    K: int,
    R: int,
    itemsize: int = 2,
    four_bit: bool = False,
    dropout: bool = False,
) -> list[Cost]:
    """Every backend's strategies for a forward, the fastest first.

    itemsize: bytes of an element of x, W and y. A GPU that our kernels do not run on has eager's
    alone.

    >>> from lora_kernels.costs import Gpu, predict
    >>> h100 = Gpu("H100", 90, 132, 1.755e9, 3.35e12, 949e12, 59e12)
    >>> predict(h100, 1, 4096, 14336, 16, four_bit=True)[0].strategy
    'publish first, consume last'
    """
    weight = N * K * (0.5 + 1 / 64 if four_bit else itemsize)
    x, y, adapter = M * K * itemsize, M * N * itemsize, (N + K) * R * itemsize
    peak = gpu.matrix if itemsize < 4 else gpu.fp32
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    work, thin = 2.0 * M * N * K, 2.0 * M * R * (N + K)
    # A decoded weight is written once, and read by the product.
    decoded = (weight + 2 * N * K * itemsize) / bandwidth + LAUNCH if four_bit else 0.0
    dense = N * K * itemsize
    found: list[Cost] = []

    def add(backend: str, strategy: str, parts: dict[str, float], others: float) -> None:
        longest = max(parts, key=lambda name: parts[name])
        found.append(Cost(backend, strategy, parts[longest] + others, longest))

    def library(others: float) -> tuple[dict[str, float], float]:
        share = LIBRARY_SHARE if itemsize < 4 else FP32_SHARE
        moved = (x + dense + y) / bandwidth
        return {"the product": work / (peak * share), "memory": moved}, decoded + others

    # x·Aᵀ reads x again, and the update is written; the base GEMM reads it in its epilogue. One
    # kernel reads x and writes D(x) and the mask, a byte an element.
    dropped = 2 * x + M * K if dropout else 0
    passes = (x + y + adapter + dropped) / bandwidth
    add(
        "eager",
        "library product + rank update",
        *library(passes + (5 if dropout else 4) * PYTHON_LAUNCH),
    )
    if obstacle(gpu) is not None:
        return found
    add(
        "triton",
        "library product + rank update",
        *library((x + 2 * y + adapter) / bandwidth + 3 * LAUNCH),
    )
    shrink = (x + adapter) / bandwidth + LAUNCH
    codes = -(-M // TRITON_TILE_M) * N * K / (CODES_A_CLOCK * gpu.clock * gpu.multiprocessors)
    moved = (x + weight + y + adapter) / bandwidth
    share = TRITON_SHARE if itemsize < 4 else FP32_SHARE
    padded = max(M, DECODE_ROWS) / M if M else 1.0  # to rows of a matrix instruction
    parts = {"the product": (padded * work + thin) / (peak * share), "memory": moved}
    add("triton", "split", parts | ({"decoding": codes} if four_bit else {}), shrink + LAUNCH)
    if M <= DECODE_ROWS and itemsize < 4:
        # W once, nothing waits; codes are multiplied as a high and a low part.
        multiplied = 2 * (2 if four_bit else 1) * (8 if M <= 8 else 16) * N * K
        parts = {"memory": moved, "the product": multiplied / (peak * MMA_SHARE[gpu.capability])}
        add("cuda", "publish first, consume last", parts, LAUNCH)
        add("cuda", "publish, then consume", parts, 1.5 * LAUNCH)
    rows = -(-M // TILE_M) * TILE_M  # whole tiles are multiplied
    codes = rows // TILE_M * N * K / (CODES_A_CLOCK * gpu.clock * gpu.multiprocessors)
    rates = {"split, ordinary multipliers": gpu.fp32 * FP32_SHARE}
    if itemsize < 4:
        rates["split"] = peak * MMA_SHARE[gpu.capability]
    for strategy, rate in rates.items():
        parts = {"the product": 2.0 * rows * N * (K + R) / rate, "memory": moved}
        add(
            "cuda", strategy, parts | ({"decoding": codes} if four_bit else {}), shrink + 2 * LAUNCH
        )
    return sorted(found, key=lambda cost: cost.seconds)


def choose(problem: Problem, gpu: Gpu | None) -> Choice | None:
    """Choose for a GPU: what `lora-kernels tune` has measured, or the cost model's fastest.

    None if our kernels cannot run the call or the cost model does not know the GPU.
    """
    missing = (
        ("triton", triton.absence()),
        ("cuda", cuda.obstacle(problem.device_type, problem.device_index)),
    )
    found = cheapest(problem, gpu, missing)
    if found is None:
        return None
    target = configs.target(problem.device_index)
    return triton_heuristics.tuned(problem, target, reason=None) or found


@functools.lru_cache(maxsize=4096)
def cheapest(
    problem: Problem, gpu: Gpu | None, missing: tuple[tuple[str, str | None], ...]
) -> Choice | None:
    """missing: pairs of a backend and why it cannot run, or None."""
    if gpu is None or obstacle(gpu) is not None or problem.unsupported_reason():
        return None
    unknown, layout = cuda_heuristics.UNKNOWN, cuda_heuristics.layout_of(problem)
    M, N, K = (size or unknown for size in (problem.rows, problem.columns, problem.inner))
    dtype = problem.dtype
    predicted = predict(
        gpu, M, N, K, problem.rank, dtype.itemsize, problem.four_bit, problem.dropout
    )
    fitting = (
        cost for cost in predicted
        if cost.backend != "cuda" or fit.forward(cost.strategy, dtype, layout, M, N, K) is None
    )  # fmt: skip
    best = next(cost for cost in fitting if dict(missing).get(cost.backend) is None)
    eagers = next(cost for cost in predicted if cost.backend == "eager")
    share = f"{best.seconds / eagers.seconds:.2f} of eager's {eagers.seconds * 1e6:.0f} µs"
    why = f"the model of costs expects {share}, most of it {best.because}"
    if best.backend == "cuda":
        why += cuda_heuristics.dx_note(best.strategy, dtype, layout, N, K)
    if problem.mixed and best.strategy not in TWO_STEPS.get(best.backend, [best.strategy]):
        if best.backend == "triton":
            return Choice("triton", triton.SPLIT, why)
        strategy, why = cuda_heuristics.strategy_for(dtype, None, N, K, layout, why)
        return Choice("cuda", strategy, why)
    return Choice(best.backend, best.strategy, why)
