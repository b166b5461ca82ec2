"""y and every gradient against the float64 reference, for each strategy and kernel."""

import itertools
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cuda import COOPERATIVE, ORDINARY, OVERLAPPED, SPLIT, STRATEGIES, launch
from lora_kernels.measure.case import Case, fits_cuda, inputs, judge, run

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
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


def check(case: Case, strategy: str) -> set[str]:
    """The kernels that ran."""
    with lora_kernels.backend("cuda", strategy):
        verdicts = judge(case)
    wrong = [f"{name} {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    if wrong:
        pytest.fail("\n".join([str(case), *wrong]), pytrace=False)
    return {kernel for kernel, _ in launch.traffic}


def fitting(case: Case, strategies: tuple[str, ...] = STRATEGIES) -> list[str]:
    return [strategy for strategy in strategies if fits_cuda(case, strategy)]


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_any_sizes(dtypes: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert "linear" in check(Case(33, 65, 63, R, *dtypes, **options), ORDINARY)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_matrix_units(dtypes: tuple[Any, ...], options: dict[str, Any]) -> None:
    """One row and column more than whole tiles, two steps of K and a piece."""
    ran = check(Case(65, 136, 136, R, *dtypes, **options), SPLIT)
    assert "gemm" in ran and "linear" not in ran


@pytest.mark.parametrize("strategy", [COOPERATIVE, OVERLAPPED])
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_few_rows(dtypes: tuple[Any, ...], options: dict[str, Any], strategy: str) -> None:
    """Two publishers, more tiles than blocks, the last of one column."""
    ran = check(Case(9, 81, 320, R, *dtypes, **options), strategy)
    assert "decode" in ran and ("publish" in ran) == (strategy == OVERLAPPED)


@pytest.mark.parametrize("M", [0, 1, 2, 8, 16, 17])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_rows(quant: str, M: int) -> None:
    case = Case(M, 40, 192, R, bf16, quant=quant, bias=True)
    assert fits_cuda(case, COOPERATIVE) == (M <= 16)
    ran = check(case, COOPERATIVE if M <= 16 else SPLIT)
    assert ("decode" in ran) == (0 < M <= 16)


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
def test_options(options: dict[str, Any]) -> None:
    check(Case(33, 65, 63, R, bf16, **options), ORDINARY)
    check(Case(13, 72, 64, R, bf16, **options), COOPERATIVE)


@pytest.mark.parametrize("rank", [1, 2, 16, 17, 64, 65, 130, 256])
def test_ranks(rank: int) -> None:
    """Of the thin products' 16 or 64 at a time, and of the products' 16 or 32."""
    ran = check(Case(40, 65, 63, rank, f32, dropout_p=0.1), ORDINARY)
    assert ("pair" in ran) == (rank <= 64)
    check(Case(5, 40, 64, rank, bf16), COOPERATIVE)
    check(Case(40, 40, 64, rank, bf16), SPLIT)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_splits_of_the_sum(quant: str) -> None:
    """Three shares of K in the forward, and of N in dx, the last ones short."""
    ran = check(Case(20, 576, 576, R, bf16, quant=quant, **FULL), SPLIT)
    assert "finish" in ran


def test_shares_that_are_added() -> None:
    """Of K in P, of N in dS, of M in dA and dB: two at least, the last one short."""
    check(Case(5, 300, 600, R, f32, column_scale=True, bias=True), ORDINARY)
    check(Case(1100, 70, 65, R, f32, column_scale=True, bias=True), ORDINARY)


@pytest.mark.parametrize("layout", ["padded", "columns", "every_other", "expanded", "3d_swapped"])
def test_strides(layout: str) -> None:
    dy = layout if "d_" not in layout else "rows"
    options: dict[str, Any] = {"x_layout": layout, "dy_layout": dy, "dropout_p": 0.1}
    check(Case(30, 65, 63, R, f32, **options), ORDINARY)
    check(Case(30, 72, 64, R, bf16, **options), SPLIT)
    if "d_" not in layout:
        check(Case(10, 72, 64, R, bf16, **options), COOPERATIVE)


# K: whole runs of codes, two scales in a row of a tile; blocks that straddle rows; rows of whole
# words; rows that start within a byte.
@pytest.mark.parametrize(("M", "dtype"), [(3, f32), (70, bf16), (5, f16)], ids=str)
@pytest.mark.parametrize(
    ("K", "quant"),
    [
        (192, "nf4-64-nested"),
        (192, "nf4-64"),
        (128, "fp4-32"),
        (256, "fp4-256-nested"),
        (96, "nf4-64-nested"),
        (72, "fp4-128"),
        (63, "nf4-64-nested"),
    ],
    ids=str,
)
def test_4bit(dtype: torch.dtype, K: int, quant: str, M: int) -> None:
    case = Case(M, 96, K, R, dtype, quant=quant, values="nonnegative")
    for strategy in fitting(case, (COOPERATIVE, SPLIT)) or [ORDINARY]:
        check(case, strategy)


def test_4bit_options() -> None:
    for case in (
        Case(13, 65, 128, R, f16, quant="nf4-64-nested", **FULL),
        Case(9, 65, 96, R, f32, quant="nf4-64-nested", compute=bf16),
    ):
        for strategy in fitting(case):
            check(case, strategy)


def test_a_weight_stored_by_columns() -> None:
    """As GPT-2's: forward and dx are each other's product."""
    args = inputs(Case(33, 72, 64, R, bf16, gate=True, bias=True))
    stored = args["weight"].t().contiguous().t()
    results = []
    for weight in (args["weight"], stored):
        launch.traffic.clear()
        results.append(run(lora_kernels.lora_linear, {**args, "weight": weight}))
        assert {kernel for kernel, _ in launch.traffic} & {"gemm", "linear", "decode"} == {"gemm"}
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


def test_x_that_begins_between_two_loads() -> None:
    """It is copied, as rows of another stride are."""
    args = inputs(Case(33, 72, 64, R, bf16))
    x = args["x"].detach()
    off = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(33, 64).requires_grad_()
    assert off.data_ptr() % 16
    want, got = (run(lora_kernels.lora_linear, {**args, "x": x}) for x in (args["x"], off))
    assert {kernel for kernel, _ in launch.traffic} & {"gemm", "linear"} == {"gemm"}
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.proof
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "fp4-32"])
def test_cross_product(quant: str, dtypes: tuple[Any, ...]) -> None:
    if quant and dtypes[2] is not None:
        dtypes = (*dtypes[:2], None)
    options = itertools.cycle([{}, FULL, {"gate": True, "bias": True}, {"dropout_p": 0.5}])
    for M, (N, K) in zip((1, 65, 300), ((129, 64), (64, 72), (264, 192)), strict=True):
        case = Case(M, N, K, R, *dtypes, quant=quant, **next(options))
        for strategy in fitting(case):
            check(case, strategy)
