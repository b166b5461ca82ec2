"""y and every gradient of `lora_linear` against the float64 reference, on every engine."""

import itertools
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.cpu import native
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import LAYOUTS, Case
from tests.ops.engines import (
    engines_in_turn,
    every_engine,
    every_native_engine,
    every_thread_count,
    every_tiled_engine,
    ways,
)
from tests.ops.shapes import NARROW, RANKS, ROWS, WIDE
from tests.support import problems
from tests.support.engines import check, check_strided_vectors
from tests.support.problems import FULL, NEEDS, RANK, UNDROPPED, bf16, f16, f32, with_rank
from tests.support.threads import check_interrupted_thread, check_late_threads

DTYPES = [*problems.DTYPES, (f16, f32, None), (f32, bf16, None), (f32, f32, f16)]
# The terms of the equation, alone and together, with a gradient and without.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gate": True},
    {"gate": True, "frozen": ("rank_gate",)},
    {"column_scale": True},
    {"column_scale": True, "frozen": ("column_scale",)},
    {"bias": True},
    {"bias": True, "frozen": ("bias",)},
    {"column_scale": True, "bias": True},
    {"dropout_p": 0.1},
    {"dropout_p": 0.5},
    {"dropout_p": 1.0},
    {"gate": True, "dropout_p": 0.1},
    {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.5},
    {"gate": True, "column_scale": True, "bias": True, "values": "nonnegative"},
    {"base": False},
    {"base": False, "gate": True, "dropout_p": 0.1},
]

# Work for several threads, in chunks that are no multiple of a tile; rows above those at which dB
# is the sum of partial sums, and few rows with many columns and ranks.
LARGE = [(130, 257, 100, RANK), (515, 261, 259, RANK), (33, 259, 257, 64), (70, 100, 259, 256)]


def some_cases() -> list[Case]:
    """One property at a time varied about M33-N65-K63-R5, which are no multiples of a tile.

    With a gate the rank is RANK, except in the last two.
    """
    shape = {"M": 33, "N": 65, "K": 63, "R": 5}
    chosen = [
        Case(**shape, dtype=dtype, adapter_dtype=adapter, autocast=autocast, **options)
        for (dtype, adapter, autocast), options in itertools.product(DTYPES, OPTIONS)
    ]
    for dtype in (f32, bf16):
        chosen += [Case(33, 65, 63, R, dtype) for R in RANKS]
        chosen += [Case(M, 65, 63, 5, dtype, **FULL) for M in ROWS]
        for M, (N, R) in itertools.product((1, 2), ((65, 5), (130, 20), (3, 1))):  # B unpacked
            chosen.append(Case(M, N, 63, R, dtype, f32, column_scale=True, bias=True))
            chosen.append(Case(M, N, 63, R, dtype))
        chosen += [Case(31, N, K, 5, dtype, dropout_p=0.1) for N, K in NARROW]
        chosen += [Case(7, N, K, 5, dtype, **FULL) for N, K in WIDE]
        chosen += [Case(**shape, dtype=dtype, frozen=frozen, **FULL) for frozen in NEEDS]
        for layout in LAYOUTS:
            # More rows than a block has, so that strides count for its first row as well.
            M = 1 if layout == "1d" else 150
            chosen.append(Case(M, 65, 63, 5, dtype, x_layout=layout, dropout_p=0.1))
            if "d" not in layout[:2]:  # dy takes its leading dimensions from x
                chosen.append(Case(70, 65, 63, 5, dtype, dy_layout=layout, bias=True))
                chosen.append(Case(70, 65, 63, 5, dtype, dy_layout=layout, column_scale=True))
        chosen.append(Case(30, 65, 63, 5, dtype, x_layout="4d", dy_layout="expanded"))
        # Up to as many rows as the weight is streamed for: passes of several, sums in several
        # chains, fewer rows of the weight than are dotted side by side, and one to three left over.
        chosen += [Case(M, N, K, 5, dtype, **FULL) for M in (3, 4, 8, 13, 16) for N, K in WIDE]
        chosen += [Case(M, 30, 2600, 5, dtype, values="nonnegative") for M in (1, 6)]
        chosen += [Case(5, N, 100, 5, dtype, f32) for N in (3, 7)]
        chosen.append(Case(3, 65, 63, 5, dtype, base=False))
    few = [Case(1, 65, 63, 5, f32, **FULL), Case(33, 65, 63, 5, bf16, **FULL)]
    return list(dict.fromkeys([*map(with_rank, chosen), *few]))


@engines_in_turn(some_cases())
def test_lora_linear_of_each_case_is_within_tolerance(case: Case, engine: str) -> None:
    check(case, ways(engine, case.M, case.compute_dtype, False))


@every_thread_count
@engines_in_turn([Case(*shape, dtype, **FULL) for dtype in (f32, bf16) for shape in LARGE])
def test_lora_linear_of_many_threads_is_within_tolerance(
    case: Case, engine: str, threads: int
) -> None:
    check(case)


# Whole tiles of 64 rows and 32 elements of the sum, taken where they lie, and a row and an element
# more; ranks of one tile, of two and of five; sums of several spans.
@every_tiled_engine
@every_thread_count
@pytest.mark.parametrize(
    ("sizes", "rank", "adapter", "options"),
    [
        ((192, 128, 1120), 61, None, {}),
        ((192, 128, 1120), 13, f32, {"gate": True, "bias": True}),
        ((193, 65, 63), 61, f32, FULL),
        ((193, 65, 63), 77, None, FULL),
        ((64, 193, 64), 61, f16, {"dropout_p": 0.1}),
        ((289, 320, 288), 61, f32, {"column_scale": True, "dropout_p": 0.1}),
    ],
    ids=str,
)
def test_lora_linear_in_tile_registers_is_within_tolerance(
    sizes: tuple[int, ...],
    rank: int,
    adapter: torch.dtype | None,
    options: dict[str, Any],
    threads: int,
    engine: str,
) -> None:
    check(Case(*sizes, rank, bf16, adapter, **options))


FROZEN_BIAS: dict[str, Any] = {"bias": True, "frozen": ("bias",)}  # of 8 elements 32 draws compare


# Rows in two blocks; sums that pause; both, of dx as well as of y; several slabs of W, of columns
# and of the sum; columns in two tasks; a group of rows that is half empty.
@every_tiled_engine
@every_thread_count
@pytest.mark.parametrize(
    ("sizes", "dtype", "options"),
    [
        ((530, 24, 1000), bf16, {}),
        ((470, 70, 1100), bf16, FULL),
        ((470, 1101, 24), bf16, FULL),
        ((850, 8, 1100), bf16, FROZEN_BIAS),
        ((40, 2100, 40), bf16, {}),
        ((40, 41, 2100), bf16, FULL),
        ((33, 4200, 40), bf16, {}),
        ((130, 70, 1100), f32, FULL),
        ((139, 1101, 70), f32, FULL),
        ((470, 8, 500), f32, FROZEN_BIAS),
        ((128, 300, 41), f32, {}),
    ],
    ids=str,
)
def test_lora_linear_of_a_cut_product_is_within_tolerance(
    sizes: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], threads: int, engine: str
) -> None:
    check(with_rank(Case(*sizes, 5, dtype, **options)))


@every_engine
@pytest.mark.parametrize("rows", [33, 3000])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_lora_linear_of_long_sums_is_within_tolerance(
    dtype: torch.dtype, rows: int, engine: str
) -> None:
    """Sums of x·Wᵀ, dY·W and dB with several panels, the last one short; sums over many rows."""
    if rows == 33:
        check(Case(rows, 1285, 1285, 5, dtype, values="nonnegative"))
    else:
        check(Case(rows, 40, 72, RANK, dtype, f32, values="nonnegative", **UNDROPPED))


@pytest.mark.proof
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_lora_linear_of_ranks_rows_and_dtypes_is_within_tolerance(
    dtypes: tuple[torch.dtype, ...], rank: int
) -> None:
    """Every rank × dtypes × M; N × K and the options take turns, so that each meets each.

    Of six rows on: with fewer PyTorch's own error depends on which of its products (of matrices,
    of vectors) a form comes to, by a factor of two, and one element of dc may decide its rms error.
    test_exact.py has all shapes.
    """
    dtype, adapter, autocast = dtypes
    turn = RANKS.index(rank) + DTYPES.index(dtypes)
    N, K = WIDE[turn % len(WIDE)]
    options = itertools.islice(itertools.cycle(OPTIONS), 5 * turn, None)
    for M in ROWS[4:]:
        for chosen in itertools.islice(options, 2):
            case = Case(M, N, K, rank, dtype, adapter, autocast, **chosen)
            for engine in cases.engines():
                with cases.engine(engine):
                    check(case, ways(engine, case.M, case.compute_dtype, False))


@every_engine
@pytest.mark.parametrize(
    ("options", "quant"),
    [(o, q) for o in OPTIONS for q in ("", "nf4-64-nested") if not q or o.get("base", True)],
    ids=str,
)
def test_lora_linear_without_gradients_has_the_same_bits(
    options: dict[str, Any], quant: str, engine: str
) -> None:
    """They bypass the autograd Function, and nothing is saved."""
    for autocast in (None, bf16):
        case = Case(3, 33, 64, 5, f32, quant=quant, autocast=autocast, **options)
        args = cases.give_mask(cases.inputs(case))
        args.pop("dy")
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            want = lora_kernels.lora_linear(**args)
            for guard in (torch.no_grad, torch.inference_mode):
                with guard():
                    got = lora_kernels.lora_linear(**args)
                assert want.requires_grad and not got.requires_grad and torch.equal(got, want)
                assert got.dtype is want.dtype


def test_autocast_on_a_cpu_keeps_the_adapters_bits() -> None:
    """There the kernels take float32 adapters beside 16 bits; a GPU rounds them as PyTorch does."""
    args = cases.inputs(Case(70, 33, 64, 5, f32, autocast=bf16))
    args.pop("dy")
    rounded = args | {n: args[n].detach().to(bf16).float() for n in ("lora_A", "lora_B")}
    with torch.autocast("cpu", bf16), torch.no_grad():
        a, b = (lora_kernels.lora_linear(**each) for each in (args, rounded))
    assert a.dtype is b.dtype is bf16 and not torch.equal(a, b)


@pytest.mark.parametrize("M", [1, 5, 40])
@every_engine
def test_lora_linear_of_strided_vectors_and_a_transposed_B_is_as_of_contiguous_ones(
    M: int, engine: str
) -> None:
    check_strided_vectors(Case(M, 40, 64, 6, f32, gate=True, column_scale=True, bias=True))


@every_native_engine
@pytest.mark.parametrize("threads", [5], indirect=True)
@pytest.mark.parametrize(("M", "dropout_p"), [(1, 0.0), (4, 0.0), (1, 0.5), (4, 0.5)])
def test_lora_linear_of_late_threads_has_the_bits_of_one(
    threads: int, engine: str, M: int, dropout_p: float
) -> None:
    check_late_threads(torch.randn(2003, 128), M, cpu.GEMV, threads, dropout_p)


@every_native_engine
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_lora_linear_of_interrupted_threads_has_the_bits_of_one(
    engine: str, dropout_p: float
) -> None:
    check_interrupted_thread(torch.randn(512, 1 << 14), cpu.GEMV, dropout_p)


@pytest.mark.skipif(native.module is None, reason="the native kernels were not built")
@pytest.mark.parametrize("strategy", [cpu.LIBRARY, None], ids=["library", "chosen"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_lora_linear_of_rows_apart_under_autocast_has_the_bits_of_rows_together(
    rows: int, strategy: str | None
) -> None:
    torch.manual_seed(0)
    apart = torch.randn(rows, 20)[:, :10]
    rest = torch.randn(7, 10), torch.randn(3, 10), torch.randn(7, 3)
    with lora_kernels.backend("cpu", strategy), torch.autocast("cpu", bf16):
        y = lora_kernels.lora_linear(apart, *rest, 2.0)
        assert torch.equal(y, lora_kernels.lora_linear(apart.contiguous(), *rest, 2.0))
