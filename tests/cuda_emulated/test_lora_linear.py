"""y and every gradient against the float64 reference, for each strategy and kernel."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cuda import (
    COOPERATIVE,
    OVERLAPPED,
    STRATEGIES,
    TWO_PASS,
    TWO_PASS_SIMT,
    launch,
)
from lora_kernels.bench.case import Case, fits_cuda, inputs, run
from tests.support import problems
from tests.support.engines import Pairs, check_strided_vectors, each, pair_cases
from tests.support.engines import check as check_results
from tests.support.exact import off
from tests.support.problems import FULL, RANK, bf16, f16, f32

FEW_ROWS = (COOPERATIVE, OVERLAPPED)
BASE_KERNELS = {
    TWO_PASS_SIMT: "linear",
    TWO_PASS: "gemm",
    COOPERATIVE: "decode",
    OVERLAPPED: "decode",
}
# K, weight: whole runs of codes, two scales in a row of a tile; blocks that straddle rows; rows of
# whole words; rows that start within a byte.
FORMATS = [(192, "nf4-64-nested"), (192, "nf4-64"), (128, "fp4-32"), (256, "fp4-256-nested")]
FORMATS += [(96, "nf4-64-nested"), (72, "fp4-128"), (63, "nf4-64-nested")]
CODES_4BIT = [
    case
    for M, dtype in ((3, f32), (70, bf16), (5, f16))
    for case in problems.of_4bit(M, 96, dtype, FORMATS)
]


def cuda(strategy: str, *cases: Case) -> Pairs:
    return pair_cases("cuda", (strategy,), cases)


def fitting(cases: list[Case], strategies: tuple[str, ...] = STRATEGIES) -> Pairs:
    """Each case by the strategies that take it; by the one that takes all where none does."""
    return [
        pair
        for case in cases
        for s in [s for s in strategies if fits_cuda(case, s)] or [TWO_PASS_SIMT]
        for pair in cuda(s, case)
    ]


def rows() -> Pairs:
    """Up to 16 they are few."""
    cases = [
        Case(M, 40, 192, RANK, bf16, quant=quant, bias=True)
        for M in (0, 1, 2, 8, 16, 17)
        for quant in ("", "nf4-64-nested")
    ]
    assert all(fits_cuda(case, COOPERATIVE) == (case.M <= 16) for case in cases)
    return [p for case in cases for p in cuda(COOPERATIVE if case.M <= 16 else TWO_PASS, case)]


def ranks(case: Callable[[int], Case]) -> list[Case]:
    """Cases around the skinny GEMMs' 16 or 64 ranks at a time, and the GEMMs' 16 or 32."""
    return [case(R) for R in problems.RANKS]


PARTIAL_SUMS = [
    Case(M, N, K, RANK, f32, column_scale=True, bias=True)
    for M, N, K in ((5, 300, 600), (1100, 70, 65))
]
SPLITS = [Case(20, 576, 576, RANK, bf16, quant=quant, **FULL) for quant in ("", "nf4-64-nested")]
STRIDED = Case(40, 72, 64, 6, bf16, gate=True, column_scale=True, bias=True)
GROUPS = {
    "any_sizes": cuda(TWO_PASS_SIMT, *problems.of_dtypes(33, 65, 63)),
    # One row and column more than whole tiles, two steps of K and a piece.
    "tensor_cores": cuda(TWO_PASS, *problems.of_dtypes(65, 136, 136, dtypes=problems.DTYPES[1:])),
    # Two publishers, more tiles than blocks, the last of one column.
    "few_rows": pair_cases(
        "cuda", FEW_ROWS, problems.of_dtypes(9, 81, 320, dtypes=problems.DTYPES[1:])
    ),
    "rows": rows(),
    "options": [
        *cuda(TWO_PASS_SIMT, *problems.of_options(33, 65, 63)),
        *cuda(COOPERATIVE, *problems.of_options(13, 72, 64)),
    ],
    "ranks": [
        *cuda(TWO_PASS_SIMT, *ranks(lambda R: Case(40, 65, 63, R, f32, dropout_p=0.1))),
        *cuda(COOPERATIVE, *ranks(lambda R: Case(5, 40, 64, R, bf16))),
        *cuda(TWO_PASS, *ranks(lambda R: Case(40, 40, 64, R, bf16))),
    ],
    # More of x than a block keeps: of another dtype than the product's, and in unaligned rows.
    "staged_x": [
        *cuda(OVERLAPPED, Case(16, 72, 4096, 4, f32, autocast=bf16)),
        *cuda(OVERLAPPED, Case(16, 72, 8192, 4, bf16, x_layout="padded")),
    ],
    # Three splits of K in the forward, and of N in dx, the last ones short.
    "split_k": cuda(TWO_PASS, *SPLITS),
    # Of K in P, of N in dS, of M in dA and dB: two splits at least, the last one short.
    "partial_sums": cuda(TWO_PASS_SIMT, *PARTIAL_SUMS),
    "strides": [
        *cuda(TWO_PASS_SIMT, *problems.of_layouts(30, 65, 63, dtype=f32)),
        *cuda(TWO_PASS, *problems.of_layouts(30, 72, 64, dtype=bf16)),
        *cuda(COOPERATIVE, *problems.of_layouts(10, 72, 64, dtype=bf16)[:-1]),
    ],
    "4bit": fitting(CODES_4BIT, (COOPERATIVE, TWO_PASS)) + fitting(problems.of_options_4bit(13)),
}


def check(case: Case, engine: str) -> None:
    """The results, and that they were made by the strategy's kernels."""
    check_results(case)
    ran, strategy = {kernel for kernel, _ in launch.traffic}, engine.removeprefix("cuda ")
    if case.M and case.base:
        assert BASE_KERNELS[strategy] in ran and ("publish" in ran) == (strategy == OVERLAPPED)
        assert strategy == TWO_PASS_SIMT or case.quant or case.N % 8 or "linear" not in ran
    if case.M and not case.frozen:
        assert ("pair" in ran) == (case.R <= 64)
    if case in SPLITS:
        assert "finish" in ran


@each(GROUPS)
def test_lora_linear_of_each_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, engine)


@pytest.mark.proof
@each({"": fitting(problems.cross_product([(1, 129, 64), (65, 64, 72), (300, 264, 192)]))})
def test_lora_linear_of_formats_and_dtypes_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, engine)


@each({"": fitting([replace(STRIDED, dtype=f32), STRIDED, replace(STRIDED, M=5)])})
def test_lora_linear_of_strided_vectors_and_a_transposed_B_is_as_of_contiguous_ones(
    case: Case, engine: str
) -> None:
    check_strided_vectors(case)


@pytest.mark.parametrize("moved", ["a weight stored by columns", "x between two loads"])
def test_lora_linear_of_a_moved_operand_has_the_same_bits(moved: str) -> None:
    """GPT-2 stores its weights so: forward and dx are each other's product. An x that begins
    between two loads is copied, as rows of another stride are."""
    args = inputs(Case(33, 72, 64, RANK, bf16, gate=True, bias=True))
    other = (
        {"x": off(args["x"])} if "x" in moved else {"weight": args["weight"].t().contiguous().t()}
    )
    results = []
    for given in (args, args | other):
        launch.traffic.clear()
        results.append(run(lora_kernels.lora_linear, given))
        assert {kernel for kernel, _ in launch.traffic} & {"gemm", "linear", "decode"} == {"gemm"}
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name
