"""y and every gradient against the float64 reference, for every strategy."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import (
    COOPERATIVE,
    LIBRARY,
    SINGLE_PASS,
    SPLIT,
    configs,
    launch,
)
from lora_kernels.measure.case import Case, judge
from tests.triton.device import DEVICE

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
every_strategy = pytest.mark.parametrize("strategy", [SINGLE_PASS, SPLIT, LIBRARY])
FULL: dict[str, Any] = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.1}
# dtype, adapter_dtype, autocast
DTYPES = [
    (f32, None, None),
    (bf16, None, None),
    (f16, None, None),
    (bf16, f32, None),
    (f32, f32, bf16),
]
R = 61  # no power of two, and 5 draws are as many elements of dg as are compared


def check(case: Case, strategy: str) -> None:
    case = replace(case, device=DEVICE)
    with lora_kernels.backend("triton", strategy):
        verdicts = judge(case)
    wrong = [f"{name} {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    if wrong:
        pytest.fail("\n".join([str(case), *wrong]), pytrace=False)


@every_strategy
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes: tuple[Any, ...], options: dict[str, Any], strategy: str) -> None:
    check(Case(33, 65, 63, R, *dtypes, **options), strategy)


@pytest.mark.parametrize("strategy", [SINGLE_PASS, SPLIT])
@pytest.mark.parametrize(
    "options",
    [
        {"gate": True},
        {"column_scale": True},
        {"bias": True},
        {"dropout_p": 0.5},
        {"dropout_p": 1.0},
        {"base": False, "gate": True, "dropout_p": 0.1},
        {"frozen": ("x",), **FULL},
        {"frozen": ("x", "lora_A", "rank_gate"), **FULL},
        {"frozen": ("lora_B",), **FULL},
        {"frozen": ("lora_A", "lora_B"), **FULL},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], strategy: str) -> None:
    check(Case(33, 65, 63, R, bf16, **options), strategy)


@every_strategy
@pytest.mark.parametrize("M", [0, 1, 17, 65, 257])
def test_one_row_in_the_last_tile(M: int, strategy: str) -> None:
    """Of 16, 64 and 128 rows; one column in the last of 64, 128 and 256."""
    check(Case(M, 257 if M == 257 else 129, 65, R, bf16, column_scale=True), strategy)


@pytest.mark.parametrize("rank", [1, 2, 16, 17, 64, 65, 130, 256])
def test_ranks(rank: int) -> None:
    for strategy in (SPLIT, SINGLE_PASS) if rank <= 64 else (SPLIT,):
        check(Case(40, 65, 63, rank, f32, dropout_p=0.1), strategy)


@pytest.mark.parametrize("sizes", [(5, 65, 600), (300, 70, 65)], ids=str)
def test_shares_that_are_added(sizes: tuple[int, int, int]) -> None:
    """Of K in P, of M in dA and dB: two at least, the last one short."""
    M, N, K = sizes
    _, k_share = configs.shrink(configs.INTERPRETER, M, K, R, 4)
    _, m_share = configs.outer(configs.INTERPRETER, M, N, R)
    assert (k_share < K and K % k_share) or (m_share < M and M % m_share)
    check(Case(*sizes, R, f32, column_scale=True, bias=True), SPLIT)


@pytest.mark.parametrize(
    ("dtypes", "options", "strategy"),
    [
        ((f32, None), {}, SPLIT),
        ((bf16, None), {"column_scale": True, "bias": True}, SPLIT),
        ((bf16, f32), {"column_scale": True, "bias": True, "frozen": ("x", "bias")}, SPLIT),
        ((f16, None), {}, LIBRARY),
    ],
    ids=str,
)
def test_one_read_of_dy_for_ds_and_db(
    dtypes: tuple[Any, ...], options: dict[str, Any], strategy: str
) -> None:
    """Two slots of dS, and two parts of dB, the last of each short."""
    M, N, rank = 300, 260, 31
    widest = max(d.itemsize for d in dtypes if d)
    chosen = configs.shrink_outer(configs.INTERPRETER, M, N, rank, widest)
    assert chosen is not None
    config, share = chosen
    assert config.block_m < M and M % config.block_m and share < N and N % share
    check(Case(M, N, 65, rank, *dtypes, **options), strategy)


@pytest.mark.parametrize("M", [13, 17])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_publish_first_consume_last(quant: str, M: int) -> None:
    """Two programs publish and consume; with 17 rows it is split."""
    options = {"column_scale": True, "bias": True, "dropout_p": 0.1}
    check(Case(M, 130, 192, R, bf16, quant=quant, **options), COOPERATIVE)


@pytest.mark.parametrize(
    ("layout", "strategy"),
    [
        ("padded", SINGLE_PASS),
        ("columns", SINGLE_PASS),
        *((x, SPLIT) for x in ("padded", "columns", "every_other", "expanded", "3d_swapped")),
    ],
)
def test_strides(layout: str, strategy: str) -> None:
    dy = layout if "d_" not in layout else "rows"
    check(Case(30, 65, 63, R, f32, x_layout=layout, dy_layout=dy, dropout_p=0.1), strategy)


@pytest.mark.parametrize("strategy", [SINGLE_PASS, SPLIT])
def test_offsets_of_64_bits(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_wide", lambda t: True)
    check(Case(33, 65, 63, R, f32, **FULL), strategy)
    check(Case(33, 65, 128, R, f32, quant="nf4-64-nested"), strategy)


def test_wide_tensors_are_told() -> None:
    def wide(rows: int, stride: int) -> bool:
        return launch.is_wide(torch.empty_strided((rows, 5), (stride, 1), device="meta"))

    assert wide(3, 1 << 30)
    assert not wide(1 << 20, 0)
    assert not wide(2, (1 << 31) - 5)
    assert wide(2, (1 << 31) - 4)


# K: whole blocks, two scales in a row of a tile; blocks that straddle rows; rows of whole words;
# rows that start within a byte.
@pytest.mark.parametrize("strategy", [SINGLE_PASS, SPLIT])
@pytest.mark.parametrize(("M", "dtype"), [(3, f32), (70, bf16)], ids=str)
@pytest.mark.parametrize(
    ("K", "quant"),
    [
        (128, "nf4-64-nested"),
        (128, "fp4-32"),
        (96, "nf4-64-nested"),
        (72, "fp4-128"),
        (63, "nf4-64-nested"),
    ],
    ids=str,
)
def test_4bit(dtype: torch.dtype, K: int, quant: str, M: int, strategy: str) -> None:
    check(Case(M, 72, K, R, dtype, quant=quant, values="nonnegative"), strategy)


@every_strategy
def test_4bit_options(strategy: str) -> None:
    check(Case(33, 65, 128, R, f16, quant="nf4-64-nested", **FULL), strategy)
    check(Case(9, 65, 96, R, f32, quant="nf4-64-nested", compute=bf16), strategy)


@pytest.mark.proof
@every_strategy
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "fp4-32"])
def test_cross_product(quant: str, dtypes: tuple[Any, ...], strategy: str) -> None:
    if quant and dtypes[2] is not None:
        dtypes = (*dtypes[:2], None)
    options = itertools.cycle([{}, FULL, {"gate": True, "bias": True}, {"dropout_p": 0.5}])
    for M, (N, K) in zip((1, 65, 300), ((129, 64), (64, 72), (257, 191)), strict=True):
        check(Case(M, N, K, R, *dtypes, quant=quant, **next(options)), strategy)
