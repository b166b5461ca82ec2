"""The choices of the cost model on GPUs by their data sheets, as a table.

`python -m tests.ops.test_choices` prints the current table. decode is `cooperative` of the CUDA
kernels, gemm their `two_pass`; triton is its `two_pass`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_kernels import costs
from lora_kernels.core.problem import Problem, Strategy
from lora_kernels.device import DeviceInfo
from tests.support.gpus import A100, B200, H100, RTX4090, RTX5090

GPUS = [A100, RTX4090, H100, B200, RTX5090]
SHAPES = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]  # N, K
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
NAMES = {
    ("eager", Strategy.LIBRARY): "eager",
    ("cuda", Strategy.COOPERATIVE): "decode",
    ("cuda", Strategy.TWO_PASS): "gemm",
    ("triton", Strategy.TWO_PASS): "triton",
}
TABLE = """\
                   N × K     1      8      16     32     64     128    256    512    1024   4096
A100     dense  1024 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
A100     dense  4096 × 4096  decode decode eager  eager  eager  eager  eager  eager  eager  eager
A100     dense  4096 × 14336 decode eager  eager  eager  eager  eager  eager  eager  eager  eager
A100     dense 14336 × 4096  decode eager  eager  eager  eager  eager  eager  eager  eager  eager
RTX 4090 dense  1024 × 4096  decode decode eager  eager  eager  eager  eager  eager  eager  eager
RTX 4090 dense  4096 × 4096  decode eager  eager  eager  eager  eager  eager  eager  eager  eager
RTX 4090 dense  4096 × 14336 eager  eager  eager  eager  eager  eager  eager  eager  eager  eager
RTX 4090 dense 14336 × 4096  eager  eager  eager  eager  triton eager  eager  eager  eager  eager
H100     dense  1024 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
H100     dense  4096 × 4096  decode decode eager  eager  eager  eager  eager  eager  eager  eager
H100     dense  4096 × 14336 decode eager  eager  eager  eager  eager  eager  eager  eager  eager
H100     dense 14336 × 4096  decode eager  eager  eager  eager  eager  eager  eager  eager  eager
B200     dense  1024 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
B200     dense  4096 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
B200     dense  4096 × 14336 decode eager  eager  eager  eager  eager  eager  eager  eager  eager
B200     dense 14336 × 4096  decode eager  eager  eager  eager  eager  eager  eager  eager  eager
RTX 5090 dense  1024 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
RTX 5090 dense  4096 × 4096  decode decode eager  eager  eager  eager  eager  eager  eager  eager
RTX 5090 dense  4096 × 14336 decode eager  eager  eager  eager  eager  eager  eager  eager  eager
RTX 5090 dense 14336 × 4096  decode eager  eager  eager  eager  eager  eager  eager  eager  eager
A100     NF4    1024 × 4096  decode decode decode gemm   gemm   eager  eager  eager  eager  eager
A100     NF4    4096 × 4096  decode decode decode gemm   gemm   eager  eager  eager  eager  eager
A100     NF4    4096 × 14336 decode decode decode gemm   gemm   eager  eager  eager  eager  eager
A100     NF4   14336 × 4096  decode decode decode eager  gemm   eager  eager  eager  eager  eager
RTX 4090 NF4    1024 × 4096  decode decode decode gemm   gemm   gemm   eager  eager  eager  eager
RTX 4090 NF4    4096 × 4096  decode decode decode gemm   gemm   gemm   triton eager  eager  eager
RTX 4090 NF4    4096 × 14336 decode decode decode gemm   gemm   gemm   gemm   eager  eager  eager
RTX 4090 NF4   14336 × 4096  decode decode decode gemm   gemm   gemm   gemm   eager  eager  eager
H100     NF4    1024 × 4096  decode decode decode gemm   gemm   gemm   eager  eager  eager  eager
H100     NF4    4096 × 4096  decode decode decode gemm   gemm   gemm   eager  eager  eager  eager
H100     NF4    4096 × 14336 decode decode gemm   gemm   gemm   gemm   eager  eager  eager  eager
H100     NF4   14336 × 4096  decode decode decode gemm   gemm   triton eager  eager  eager  eager
B200     NF4    1024 × 4096  decode decode decode gemm   gemm   gemm   eager  eager  eager  eager
B200     NF4    4096 × 4096  decode decode decode gemm   gemm   eager  eager  eager  eager  eager
B200     NF4    4096 × 14336 decode decode gemm   gemm   gemm   eager  eager  eager  eager  eager
B200     NF4   14336 × 4096  decode decode decode eager  eager  eager  eager  eager  eager  eager
RTX 5090 NF4    1024 × 4096  decode decode decode gemm   gemm   eager  eager  eager  eager  eager
RTX 5090 NF4    4096 × 4096  decode decode decode gemm   gemm   eager  eager  eager  eager  eager
RTX 5090 NF4    4096 × 14336 decode decode decode gemm   gemm   gemm   eager  eager  eager  eager
RTX 5090 NF4   14336 × 4096  decode decode decode eager  gemm   eager  eager  eager  eager  eager
"""


def problem(N: int, K: int, M: int, four_bit: bool, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem("cuda", *(dtype,) * 4, 16, M, four_bit, N, K)


def choose(gpu: DeviceInfo, call: Problem) -> str:
    choice = costs.choose_fastest(call, gpu, {"triton": None, "cuda": None})
    assert choice is not None
    return NAMES[choice.backend, choice.strategy]


def table() -> str:
    lines = [f"{'':14} {'N':>5} × {'K':<5} " + " ".join(f"{M:<6}" for M in ROWS)]
    for four_bit, gpu, (N, K) in itertools.product((False, True), GPUS, SHAPES):
        weight = "NF4" if four_bit else "dense"
        cells = " ".join(f"{choose(gpu, problem(N, K, M, four_bit)):6}" for M in ROWS)
        lines.append(f"{gpu.name:8} {weight:5} {N:5} × {K:<5} {cells}")
    return "".join(line.rstrip() + "\n" for line in lines)


def test_choices_are_those_of_the_table() -> None:
    assert table() == TABLE


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_fused_4bit_gemm_ends_where_bitsandbytes_measured(gpu: DeviceInfo) -> None:
    """For weights of 4 Mi elements and more its `_gemm_4bit_use_custom_cuda` (0.50.2) fuses up to
    512 rows at most, and above 128 on Ada and RTX Blackwell alone."""
    most, shapes = 512 if gpu in (RTX4090, RTX5090) else 128, [*SHAPES, (28672, 8192), (2048, 2048)]
    for (N, K), M in itertools.product(shapes, range(most + 1, 8200, 61)):
        assert choose(gpu, problem(N, K, M, True)) == "eager", (N, K, M)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_model_alone_agrees_with_bitsandbytes(gpu: DeviceInfo) -> None:
    """Without the rule of `decoding_rows`, unless Python's launches decide."""
    for (N, K), M in itertools.product([*SHAPES, (28672, 8192)], (129, 192, 256, 512, 513, 1024)):
        if costs.decoding_rows(gpu, N, K) >= M:
            continue
        found = costs.predict(gpu, problem(N, K, M, True))
        eager = next(cost for cost in found if cost.backend == "eager")
        if eager.bottleneck == "launches from Python":
            continue
        for cost in found:
            if costs._decodes_in_tiles(cost, problem(N, K, M, True)):
                assert cost.seconds > costs.KEEP_EAGER * eager.seconds, (N, K, M, cost)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_float32_is_not_cuda(gpu: DeviceInfo) -> None:
    """No kernel takes it."""
    for (N, K), M in itertools.product(SHAPES, ROWS):
        call = problem(N, K, M, False, torch.float32)
        choice = costs.choose_fastest(call, gpu, {"triton": None, "cuda": None})
        assert choice is not None and choice.backend != "cuda", (N, K, M)


def test_group_is_checked_if_it_may_be_faster_somewhere() -> None:
    small, large = (1024, 4096), (14336, 4096)

    def is_checked(
        kernel: str, rows: tuple[int, ...], *shapes: Any, gpu: DeviceInfo = H100
    ) -> bool:
        strategy, weight = kernel.split()
        group = costs.Group("cuda", strategy, "bfloat16", "bfloat16", weight)
        return costs.is_contender(group, gpu, rows, shapes)

    assert is_checked("cooperative dense", (8,), large)  # in 0.99 of eager's time
    assert not is_checked("cooperative dense", (16,), large)
    assert is_checked("cooperative dense", (16,), large, gpu=replace(H100, clock=0.0))
    assert is_checked("cooperative dense", (16,), large, small)
    assert is_checked("cooperative dense", (16, 1), large)
    assert not is_checked("two_pass 4bit", (192,), small)  # faster, but decodes more than once


if __name__ == "__main__":
    print(table(), end="")
