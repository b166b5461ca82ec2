"""The predicted time of `lora_linear` on a GPU, for each backend: a model, not a measurement.

A strategy's time is the longest of three: bytes moved over the memory bandwidth, FLOPs over the
rate that its kind of GEMM reaches, and, if a kernel decodes codes, its instructions over the issue
rate. To that come further passes over x and y, and launches. All rates are shares of the data
sheet's (`device.DeviceInfo`). `selection` asks this if nothing was measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .backends import cuda, triton
from .backends.cuda import constraints
from .backends.cuda import heuristics as cuda_heuristics
from .backends.triton import heuristics as triton_heuristics
from .core.problem import Choice, Problem, Strategy
from .device import DeviceInfo

# For `multi_lora_linear`: P = D(x)·Aᵀ is complete before the base GEMM starts.
TWO_STEPS = {"triton": triton.TWO_STEPS, "cuda": cuda.TWO_STEPS}
LAUNCH = 3e-6  # seconds of the smallest kernel, launched back to back
PYTHON_LAUNCH = 6e-6  # seconds of a call of torch, one after another in eager mode
BANDWIDTH_SHARE = 0.85  # of the bandwidth, that streams reach
LIBRARY_SHARE = 0.75  # of the tensor cores' peak, that a large cuBLAS GEMM reaches
# The share that mma.sync of the CUDA kernels reaches. From sm_90 on it is a part, since wgmma and
# tcgen05 run on other units; sm_120 has no other instruction.
MMA_SHARE = {80: 0.65, 86: 0.65, 89: 0.65, 90: 0.4, 100: 0.2, 103: 0.2, 120: 0.65}
TRITON_SHARE = 0.6  # Triton emits wgmma and tcgen05
FP32_SHARE = 0.6  # of the CUDA cores' peak, that float32 GEMMs reach
# Codes that a multiprocessor decodes per clock beside its GEMM: 8192 in the 565 instructions of one
# iteration of a warp's main loop, four warps at a time: 64 mma.sync are 11 % of it (`loop` in
# tests/compile_only/budgets.json). Triton's likewise.
CODES_A_CLOCK = 14.5
DECODE_ROWS = 16
TILE_M = 64  # of gemm.cu
TRITON_TILE_M = 128


@dataclass(frozen=True)
class Cost:
    """A strategy's predicted seconds, and what takes most of them."""

    backend: str
    strategy: Strategy
    seconds: float
    because: str


def check_two_steps(backend: str | None, strategy: str | None) -> None:
    """Raise RuntimeError if a requested strategy cannot run `multi_lora_linear`."""
    allowed = TWO_STEPS.get(backend or "")
    if strategy and allowed and strategy not in allowed:
        want = " or ".join(map(repr, allowed))
        raise RuntimeError(
            f"strategy {strategy!r} was requested and cannot run here: for rows with adapters of "
            f"their own (multi_lora_linear) want {want}"
        )


def is_known(gpu: DeviceInfo) -> bool:
    """Return True if the model has the GPU's rates."""
    return gpu.kind == "cuda" and bool(gpu.clock and gpu.bandwidth and gpu.tensor_flops)


def unsupported_reason(gpu: DeviceInfo) -> str | None:
    """Return why our kernels do not run on the GPU, or None."""
    if gpu.capability < 80:
        return f"{gpu.name} is sm_{gpu.capability}; the kernels are for sm_80 and newer"
    return None


def predict(gpu: DeviceInfo, problem: Problem) -> list[Cost]:
    """Return every backend's strategies for a forward, the fastest first.

    x, W and y have `problem.dtype`. On a GPU that our kernels do not run on, eager's alone.

    >>> import torch
    >>> from lora_kernels.costs import DeviceInfo, Problem, predict
    >>> rates = dict(clock=1.755e9, bandwidth=3.35e12, tensor_flops=949e12, fp32_flops=59e12)
    >>> h100 = DeviceInfo("cuda", 90, 132, 227 << 10, "H100", **rates)
    >>> dtypes = [torch.bfloat16] * 4
    >>> token = Problem("cuda", *dtypes, rank=16, rows=1, four_bit=True, inner=14336)
    >>> predict(h100, token)[0].strategy
    'cooperative'
    """
    M, N, K, R = problem.rows, problem.columns, problem.inner, problem.rank
    itemsize, four_bit = problem.dtype.itemsize, problem.four_bit
    weight = N * K * (0.5 + 1 / 64 if four_bit else itemsize)
    x, y, adapter = M * K * itemsize, M * N * itemsize, (N + K) * R * itemsize
    peak = gpu.tensor_flops if itemsize < 4 else gpu.fp32_flops
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    work, thin = 2.0 * M * N * K, 2.0 * M * R * (N + K)
    # A decoded weight is written once, and read by the GEMM.
    decoded = (weight + 2 * N * K * itemsize) / bandwidth + LAUNCH if four_bit else 0.0
    dense = N * K * itemsize
    found: list[Cost] = []

    def add(backend: str, strategy: Strategy, parts: dict[str, float], others: float) -> None:
        longest = max(parts, key=lambda name: parts[name])
        found.append(Cost(backend, strategy, parts[longest] + others, longest))

    def library(others: float) -> tuple[dict[str, float], float]:
        share = LIBRARY_SHARE if itemsize < 4 else FP32_SHARE
        moved = (x + dense + y) / bandwidth
        return {"the GEMM": work / (peak * share), "memory": moved}, decoded + others

    # x·Aᵀ reads x again, and the update is written; the base GEMM reads it in its epilogue. One
    # kernel reads x and writes D(x) and the mask, a byte an element.
    dropped = 2 * x + M * K if problem.dropout else 0
    passes = (x + y + adapter + dropped) / bandwidth
    launches = 5 if problem.dropout else 4
    add("eager", Strategy.LIBRARY, *library(passes + launches * PYTHON_LAUNCH))
    if unsupported_reason(gpu) is not None:
        return found
    passes = (x + 2 * y + adapter) / bandwidth
    add("triton", Strategy.LIBRARY, *library(passes + 3 * LAUNCH))
    shrink = (x + adapter) / bandwidth + LAUNCH
    codes_a_second = CODES_A_CLOCK * gpu.clock * gpu.multiprocessors
    codes = -(-M // TRITON_TILE_M) * N * K / codes_a_second
    moved = (x + weight + y + adapter) / bandwidth
    share = TRITON_SHARE if itemsize < 4 else FP32_SHARE
    padded = max(M, DECODE_ROWS) / M if M else 1.0  # to rows of a tensor core instruction
    parts = {"the GEMM": (padded * work + thin) / (peak * share), "memory": moved}
    decoding = {"decoding": codes} if four_bit else {}
    add("triton", Strategy.TWO_PASS, parts | decoding, shrink + LAUNCH)
    if M <= DECODE_ROWS and itemsize < 4:
        # W once, nothing waits; codes are multiplied as a high and a low part.
        multiplied = 2 * (2 if four_bit else 1) * (8 if M <= 8 else 16) * N * K
        parts = {"memory": moved, "the GEMM": multiplied / (peak * MMA_SHARE[gpu.capability])}
        add("cuda", Strategy.COOPERATIVE, parts, LAUNCH)
        add("cuda", Strategy.OVERLAPPED, parts, 1.5 * LAUNCH)
    rows = -(-M // TILE_M) * TILE_M  # whole tiles are multiplied
    decoding = {"decoding": rows // TILE_M * N * K / codes_a_second} if four_bit else {}
    rates = {Strategy.TWO_PASS_SIMT: gpu.fp32_flops * FP32_SHARE}
    if itemsize < 4:
        rates[Strategy.TWO_PASS] = peak * MMA_SHARE[gpu.capability]
    for strategy, rate in rates.items():
        parts = {"the GEMM": 2.0 * rows * N * (K + R) / rate, "memory": moved}
        add("cuda", strategy, parts | decoding, shrink + 2 * LAUNCH)
    return sorted(found, key=lambda cost: cost.seconds)


def choose(problem: Problem, gpu: DeviceInfo) -> Choice | None:
    """Choose for a GPU: what `lora-kernels tune` has measured, or the cost model's fastest.

    None if our kernels cannot run the call or the cost model does not know the GPU.
    """
    missing = (
        ("triton", triton.unavailable_reason()),
        ("cuda", cuda.unsupported_device_reason(problem.device_type, problem.device_index)),
    )
    found = cheapest(problem, gpu, missing)
    return (
        None
        if found is None
        else triton_heuristics.choose_tuned(problem, gpu, reason=None) or found
    )


@functools.lru_cache(maxsize=4096)
def cheapest(
    problem: Problem, gpu: DeviceInfo, missing: tuple[tuple[str, str | None], ...]
) -> Choice | None:
    """Choose the fastest strategy by the cost model, or None.

    missing: pairs of a backend and why it cannot run, or None.
    """
    if not is_known(gpu) or unsupported_reason(gpu) or problem.unsupported_reason():
        return None
    layout = cuda_heuristics.layout_of(problem)
    (M, N, K), dtype = (problem.rows, problem.columns, problem.inner), problem.dtype
    predicted = predict(gpu, problem)
    best = next(
        cost
        for cost in predicted
        if dict(missing).get(cost.backend) is None
        and (
            cost.backend != "cuda"
            or constraints.forward_unsupported_reason(cost.strategy, dtype, layout, M, N, K) is None
        )
    )
    eagers = next(cost for cost in predicted if cost.backend == "eager")
    share = f"{best.seconds / eagers.seconds:.2f} of eager's {eagers.seconds * 1e6:.0f} µs"
    why = f"the cost model expects {share}, most of it {best.because}"
    if best.backend == "cuda":
        why += cuda_heuristics.dx_note(best.strategy, dtype, layout, N, K)
    if problem.mixed and best.strategy not in TWO_STEPS.get(best.backend, [best.strategy]):
        if best.backend == "triton":
            return Choice("triton", Strategy.TWO_PASS, why)
        strategy, why = cuda_heuristics.strategy_for(dtype, None, N, K, layout, why)
        return Choice("cuda", strategy, why)
    return Choice(best.backend, best.strategy, why)
