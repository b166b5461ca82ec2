"""y and every gradient against the float64 reference, for each strategy and kernel."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch

import lora_kernels
from lora_kernels.backends import cuda as cuda_backend
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES, TWO_PASS, launch
from lora_kernels.oracle.case import Case, fits_cuda, inputs, run
from tests.support import problems
from tests.support.engines import Pairs, check_strided_vectors, each, pair_cases
from tests.support.engines import check as check_results
from tests.support.exact import off
from tests.support.problems import RANK, UNDROPPED, bf16, f16, f32

BASE_KERNELS = {TWO_PASS: "gemm", COOPERATIVE: "decode"}
# K, weight: whole runs of codes, two scales in a row of a tile; blocks that straddle rows.
FORMATS = [(192, "nf4-64-nested"), (192, "nf4-64"), (128, "fp4-32"), (256, "fp4-256-nested")]
FORMATS += [(96, "nf4-64-nested"), (96, "mxfp4-32-nested"), (96, "nvfp4-16-nested")]
FORMATS += [(160, "nvfp4-16")]
CODES_4BIT = [
    case
    for M, dtype in ((3, bf16), (70, bf16), (5, f16))
    for case in problems.of_4bit(M, 96, dtype, FORMATS)
]
DTYPES = problems.DTYPES[1:]  # those of a 16-bit product


def cuda(strategy: str, *cases: Case) -> Pairs:
    return pair_cases("cuda", (strategy,), problems.without_dropout(cases))


def fitting(cases: Iterable[Case]) -> Pairs:
    """Each case by the strategies that take it."""
    return [
        pair
        for case in problems.without_dropout(cases)
        for s in STRATEGIES
        if fits_cuda(case, s)
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
    """Cases around the skinny GEMMs' 16 or 64 ranks at a time, and the GEMM's 16."""
    return [case(R) for R in problems.RANKS]


def options(*sizes: int) -> list[Case]:
    """Each option, of a call with a base GEMM."""
    return [case for case in problems.of_options(*sizes) if case.base]


PARTIAL_SUMS = [
    Case(M, N, K, RANK, bf16, column_scale=True, bias=True)
    for M, N, K in ((5, 304, 600), (1100, 72, 72))
]
SPLITS = [
    Case(20, 576, 576, RANK, bf16, column_scale=True, bias=True),
    Case(20, 576, 576, RANK, bf16, quant="nf4-64-nested", **UNDROPPED),
]
STRIDED = Case(40, 72, 64, 6, bf16, gate=True, column_scale=True, bias=True)
# Sums over rows so long that a float32 chain of a whole split would show in dA.
LONG_SUMS = Case(3000, 8, 24, 17, bf16, f32, values="nonnegative")
GROUPS = {
    # One row and column more than whole tiles, two steps of K and a piece.
    "tensor_cores": cuda(TWO_PASS, *problems.of_dtypes(65, 136, 136, dtypes=DTYPES)),
    # Two publishers, more tiles than blocks, the last of half a tile's columns.
    "few_rows": cuda(COOPERATIVE, *problems.of_dtypes(9, 88, 320, dtypes=DTYPES)),
    "rows": rows(),
    "options": [
        *cuda(TWO_PASS, *options(33, 72, 64)),
        *cuda(COOPERATIVE, *options(13, 72, 64)),
    ],
    "ranks": [
        *cuda(COOPERATIVE, *ranks(lambda R: Case(5, 40, 64, R, bf16))),
        *cuda(TWO_PASS, *ranks(lambda R: Case(40, 40, 64, R, bf16))),
    ],
    # More of x than a block keeps: of another dtype than the product's, and in unaligned rows.
    "staged_x": [
        *cuda(COOPERATIVE, Case(16, 72, 4096, 16, f32, autocast=bf16)),
        *cuda(COOPERATIVE, Case(16, 72, 8192, 16, bf16, x_layout="padded")),
    ],
    # Three splits of K in the forward, and of N in dx, the last ones short.
    "split_k": cuda(TWO_PASS, *SPLITS),
    # Of K in P, of N in dS, of M in dA and dB: two splits at least, the last one short.
    "partial_sums": cuda(TWO_PASS, *PARTIAL_SUMS),
    "long_sums": cuda(TWO_PASS, LONG_SUMS),
    "strides": [
        *cuda(TWO_PASS, *problems.of_layouts(30, 72, 64, dtype=bf16)),
        *cuda(COOPERATIVE, *problems.of_layouts(10, 72, 64, dtype=bf16)[:-1]),
    ],
    "4bit": [
        *fitting(CODES_4BIT),
        *fitting([Case(9, 72, 96, RANK, f32, quant="nf4-64-nested", compute=bf16)]),
        *fitting([Case(13, 72, 128, RANK, f16, quant="nf4-64-nested", **UNDROPPED)]),
    ],
}


def check(case: Case, engine: str) -> None:
    """The results, and that they were made by the strategy's kernels."""
    check_results(case)
    ran, strategy = {kernel for kernel, _ in launch.traffic}, engine.removeprefix("cuda ")
    if case.M:
        assert BASE_KERNELS[strategy] in ran
    if case.M and not case.frozen:
        assert "gemm" in ran and ("pair" in ran) == (case.R <= 64)
    if case in SPLITS:
        assert "finish" in ran


@each(GROUPS)
def test_lora_linear_of_each_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, engine)


FORMATS_AND_DTYPES = fitting(problems.cross_product([(1, 129, 64), (65, 64, 72), (300, 264, 192)]))


@pytest.mark.proof
@each({"": FORMATS_AND_DTYPES})
def test_lora_linear_of_formats_and_dtypes_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, engine)


# Products of a group, and bits of a sum beyond float32's: those of sm_80 and sm_89, of sm_90 and
# sm_100, and fewer than any of these has. See csrc/emulator/runtime.h.
TENSOR_CORES = {"8 products": (8, 1), "16 products": (16, 2), "4 products": (4, 0)}


@pytest.fixture(params=TENSOR_CORES)
def tensor_core(request: pytest.FixtureRequest) -> Iterator[None]:
    """mma truncates, and adds its products in an order drawn from the name of the test."""
    emulator = cuda_backend.module()
    emulator.set_mma(*TENSOR_CORES[request.param], zlib.crc32(request.node.name.encode()))
    yield
    emulator.set_mma(0, 0)


# Of both kernels, dense and of codes. No result is so small that several seeds must be pooled.
TRUNCATED_OPTIONS = {**UNDROPPED, "frozen": ("rank_gate", "column_scale", "bias")}
TRUNCATED_DTYPES = [(bf16, None), (f16, None), (bf16, f32)]
TRUNCATED = {
    "tensor_cores": cuda(
        TWO_PASS, *(Case(33, 72, 136, 17, *d, **TRUNCATED_OPTIONS) for d in TRUNCATED_DTYPES)
    ),
    "few_rows": cuda(
        COOPERATIVE, *(Case(9, 40, 320, 29, *d, **TRUNCATED_OPTIONS) for d in TRUNCATED_DTYPES)
    ),
    "4bit": fitting(
        Case(9, 40, 192, 29, dtype, quant="nf4-64-nested", values="nonnegative")
        for dtype in (bf16, f16)
    ),
    "split_k": cuda(TWO_PASS, Case(20, 72, 576, 13, f16, values="nonnegative")),
}


@pytest.mark.usefixtures("tensor_core")
@each(TRUNCATED)
def test_lora_linear_of_truncated_sums_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, engine)


@pytest.mark.proof
@pytest.mark.usefixtures("tensor_core")
@each({**GROUPS, "formats": FORMATS_AND_DTYPES})
def test_lora_linear_of_truncated_sums_of_each_case_is_within_tolerance(
    case: Case, engine: str
) -> None:
    check(case, engine)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_tensor_core_adds_to_other_bits_of_y(strategy: str) -> None:
    """float32 shows them, beside a product of bfloat16."""
    args = inputs(Case(9, 72, 192, 5, f32, quant="nf4-64", compute=bf16))
    args.pop("dy")
    emulator, found = cuda_backend.module(), []
    for mma in ((0, 0), *TENSOR_CORES.values()):
        emulator.set_mma(*mma)
        with lora_kernels.backend("cuda", strategy):
            found.append(lora_kernels.lora_linear(**args).detach().numpy().tobytes())
    emulator.set_mma(0, 0)
    assert len(set(found)) == len(found)


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
        assert {kernel for kernel, _ in launch.traffic} & {"gemm", "decode"} == {"gemm"}
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name
