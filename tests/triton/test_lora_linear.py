"""y and every gradient against the float64 reference, for every strategy."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.backends.triton import FUSED, configs, launch
from lora_kernels.oracle.case import Case
from tests.support import problems
from tests.support.engines import Pairs, check, check_strided_vectors, each, pair_cases
from tests.support.problems import FULL, RANK, bf16, f32
from tests.triton.device import DEVICE

SHAPE = (33, 65, 63)
SCALED = {"column_scale": True, "bias": True}
# K, weight: whole blocks, two scales in a row of a tile; blocks that straddle rows; rows of whole
# words; rows that start within a byte.
FORMATS = [(128, "nf4-64-nested"), (128, "fp4-32"), (96, "nf4-64-nested"), (72, "fp4-128")]
FORMATS += [(63, "nf4-64-nested"), *problems.E2M1]
# One row in the last tile, of 16, 64 and 128 rows; one column in the last of 64, 128 and 256.
LAST_TILES = [(0, 129), (1, 129), (17, 129), (65, 129), (257, 257)]
# Splits of N in dS, of M in dA and dB: two at least, the last one short.
PARTIAL_SUMS = [Case(5, 600, 65, RANK, f32, frozen=("x",)), Case(300, 70, 65, RANK, f32, **SCALED)]
# Few rows: splits of P, tiles of 16 rows, and codes as the left operand.
FEW_ROWS = [
    Case(13, 130, 192, RANK, bf16, quant=quant, **SCALED) for quant in ("", "nf4-64-nested")
]


def triton(*cases: Case) -> Pairs:
    return pair_cases("triton", (FUSED,), problems.without_dropout(cases))


def ranks() -> Pairs:
    cases = [Case(40, 65, 63, R, f32) for R in problems.RANKS if R <= configs.MAX_RANK]
    return triton(*cases)


MANY = {
    "dtypes": triton(*problems.of_dtypes(*SHAPE)),
    "options": triton(*problems.of_options(*SHAPE)),
    "last_tile": triton(*(Case(M, N, 65, RANK, bf16, column_scale=True) for M, N in LAST_TILES)),
    "4bit": triton(
        *problems.of_4bit(3, 72, f32, FORMATS),
        *problems.of_4bit(70, 72, bf16, FORMATS),
        *problems.of_options_4bit(33),
    ),
}
GROUPS = {
    **MANY,
    "ranks": ranks(),
    # The sums of dy are in a program of reduce_kernel without ranks.
    "sums": triton(Case(9, 65, 63, configs.REDUCE.block_r, f32, bias=True)),
    "partial_sums": triton(*PARTIAL_SUMS),
    "few_rows": triton(*FEW_ROWS),
    "strides": triton(*problems.of_layouts(30, 65, 63, dtype=f32)),
}


@each(GROUPS, DEVICE)
def test_lora_linear_of_each_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case)


@pytest.mark.proof
@each(
    {
        **MANY,
        "": triton(*problems.cross_product([(1, 129, 64), (65, 64, 72), (300, 257, 191)])),
    },
    DEVICE,
)
def test_lora_linear_of_formats_and_dtypes_is_within_tolerance(case: Case, engine: str) -> None:
    check(case)


def test_cases_of_partial_sums_are_split_where_they_should_be() -> None:
    for case in PARTIAL_SUMS:
        _, n_per_split = configs.shrink(configs.INTERPRETER, case.M, case.N, case.R, 4)
        _, m_per_split = configs.outer(configs.INTERPRETER, case.M, case.N, case.R, 4)
        assert (n_per_split < case.N and case.N % n_per_split) or (
            m_per_split < case.M and case.M % m_per_split
        )


STRIDED = Case(40, 72, 64, 6, f32, gate=True, column_scale=True, bias=True)
FEW_STRIDED = replace(STRIDED, M=5, dtype=bf16)
WIDE = [Case(*SHAPE, RANK, f32, **FULL), Case(33, 65, 128, RANK, f32, quant="nf4-64-nested")]


@each({"": triton(*WIDE)}, DEVICE)
def test_lora_linear_of_64_bit_offsets_is_within_tolerance(
    case: Case, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_wide", lambda t: True)
    check(case)


@each({"": triton(STRIDED, FEW_STRIDED)}, DEVICE)
def test_lora_linear_of_strided_vectors_and_a_transposed_B_is_as_of_contiguous_ones(
    case: Case, engine: str
) -> None:
    check_strided_vectors(case)


def test_is_wide_from_31_bits_on() -> None:
    def wide(rows: int, stride: int) -> bool:
        return launch.is_wide(torch.empty_strided((rows, 5), (stride, 1), device="meta"))

    assert wide(3, 1 << 30)
    assert not wide(1 << 20, 0)
    assert not wide(2, (1 << 31) - 5)
    assert wide(2, (1 << 31) - 4)
