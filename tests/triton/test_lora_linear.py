"""y and every gradient against the float64 reference, for every strategy."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.backends.triton import FUSED, TWO_PASS, configs, launch
from lora_kernels.oracle.case import Case
from tests.support import problems
from tests.support.engines import Pairs, check, check_strided_vectors, each, pair_cases
from tests.support.problems import FULL, RANK, bf16, f16, f32
from tests.triton.device import DEVICE

ALL = (FUSED, TWO_PASS)
SHAPE = (33, 65, 63)
SCALED = {"column_scale": True, "bias": True}
# K, weight: whole blocks, two scales in a row of a tile; blocks that straddle rows; rows of whole
# words; rows that start within a byte.
FORMATS = [(128, "nf4-64-nested"), (128, "fp4-32"), (96, "nf4-64-nested"), (72, "fp4-128")]
FORMATS += [(63, "nf4-64-nested")]
# One row in the last tile, of 16, 64 and 128 rows; one column in the last of 64, 128 and 256.
LAST_TILES = [(0, 129), (1, 129), (17, 129), (65, 129), (257, 257)]
# Splits of K in P, of M in dA and dB: two at least, the last one short.
PARTIAL_SUMS = [Case(5, 65, 600, RANK, f32), Case(300, 70, 65, RANK, f32, **SCALED)]
# dS and dB by one read of dy: two partial sums of each, the last over a shorter split.
ONE_READ = (300, 260, 65, 31)
# Few rows: splits of P, tiles of 16 rows, and codes as the left operand.
FEW_ROWS = [
    Case(13, 130, 192, RANK, bf16, quant=quant, **SCALED) for quant in ("", "nf4-64-nested")
]


def triton(strategies: tuple[str, ...], *cases: Case) -> Pairs:
    return pair_cases("triton", strategies, problems.without_dropout(cases))


def ranks() -> Pairs:
    cases = [Case(40, 65, 63, R, f32) for R in problems.RANKS]
    few = [case for case in cases if case.R <= configs.MAX_FUSED_RANK]
    return triton((TWO_PASS,), *cases) + triton((FUSED,), *few)


def in_turn(pairs: Pairs) -> Pairs:
    """Leave the first case with both strategies, and each other with one.

    The number of ones in a case's index decides, so that what alternates meets both.
    """
    return [pair for i, pair in enumerate(pairs) if i < 2 or ((i // 2).bit_count() + i) % 2 == 0]


BY_BOTH = {
    "dtypes": triton(ALL, *problems.of_dtypes(*SHAPE)),
    "options": triton(ALL, *problems.of_options(*SHAPE)),
    "last_tile": triton(
        ALL, *(Case(M, N, 65, RANK, bf16, column_scale=True) for M, N in LAST_TILES)
    ),
    "4bit": triton(
        ALL,
        *problems.of_4bit(3, 72, f32, FORMATS),
        *problems.of_4bit(70, 72, bf16, FORMATS),
        *problems.of_options_4bit(33),
    ),
}
GROUPS = {
    **{name: in_turn(pairs) for name, pairs in BY_BOTH.items()},
    "ranks": ranks(),
    # The sums of dy are in a program of reduce_kernel without ranks.
    "sums": triton((TWO_PASS,), Case(9, 65, 63, configs.REDUCE.block_r, f32, bias=True)),
    "partial_sums": triton((TWO_PASS,), *PARTIAL_SUMS),
    "one_read": [
        *triton((TWO_PASS,), Case(*ONE_READ, f32), Case(*ONE_READ, bf16, **SCALED)),
        *triton((TWO_PASS,), Case(*ONE_READ, bf16, f32, **SCALED, frozen=("x", "bias"))),
        *triton((TWO_PASS,), Case(*ONE_READ, f16)),
    ],
    "few_rows": triton(ALL, *FEW_ROWS),
    "strides": [
        *triton((TWO_PASS,), *problems.of_layouts(30, 65, 63, dtype=f32)),
        *triton((FUSED,), *problems.of_layouts(30, 65, 63, dtype=f32)[:2]),
    ],
}


@each(GROUPS, DEVICE)
def test_lora_linear_of_each_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case)


@pytest.mark.proof
@each(
    {
        **BY_BOTH,
        "": triton(ALL, *problems.cross_product([(1, 129, 64), (65, 64, 72), (300, 257, 191)])),
    },
    DEVICE,
)
def test_lora_linear_of_formats_and_dtypes_is_within_tolerance(case: Case, engine: str) -> None:
    check(case)


def test_cases_of_partial_sums_are_split_where_they_should_be() -> None:
    for case in PARTIAL_SUMS:
        _, k_per_split = configs.shrink(configs.INTERPRETER, case.M, case.K, case.R, 4)
        _, m_per_split = configs.outer(configs.INTERPRETER, case.M, case.N, case.R, 4)
        assert (k_per_split < case.K and case.K % k_per_split) or (
            m_per_split < case.M and case.M % m_per_split
        )
    M, N, _, R = ONE_READ
    for itemsize in (2, 4):
        chosen = configs.shrink_outer(configs.INTERPRETER, M, N, R, itemsize)
        assert chosen is not None
        config, per_split = chosen
        assert config.block_m < M and M % config.block_m and per_split < N and N % per_split


STRIDED = Case(40, 72, 64, 6, f32, gate=True, column_scale=True, bias=True)
FEW_STRIDED = replace(STRIDED, M=5, dtype=bf16)
WIDE = [Case(*SHAPE, RANK, f32, **FULL), Case(33, 65, 128, RANK, f32, quant="nf4-64-nested")]


@each({"": triton(ALL, *WIDE)}, DEVICE)
def test_lora_linear_of_64_bit_offsets_is_within_tolerance(
    case: Case, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_wide", lambda t: True)
    check(case)


@each({"": triton(ALL, STRIDED, FEW_STRIDED)}, DEVICE)
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
