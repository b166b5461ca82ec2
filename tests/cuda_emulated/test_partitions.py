"""Kernels cut into many parts: splits of a few steps, so that small sizes have several of each.
`python -m tests.partitions` counts them."""

import pytest
import torch

import lora_kernels
from lora_kernels.backends.cuda import COOPERATIVE, OVERLAPPED, TWO_PASS, TWO_PASS_SIMT, equation
from lora_kernels.bench.case import Case
from tests.support import codec, exact
from tests.support.engines import check_norm

f32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split is what a kernel takes in two steps."""
    lengths = {"_SPLIT": 128, "_THIN_SPLIT": 64, "_SUMS_SPLIT": 32, "_GEMM_SPLIT": 128}
    for name, length in lengths.items():
        monkeypatch.setattr(equation, name, length)


@pytest.fixture
def long_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split is what the kernels whose steps are 256 long take in two."""
    monkeypatch.setattr(equation, "_SPLIT", 512)


# Two tiles of 64 rows and of 64 or 128 columns, the last ones short; of 128 elements of K and one
# more step; of ranks, 16 or 32 at a time.
@pytest.mark.parametrize(
    ("strategy", "sizes", "dtype", "blocksize"),
    [
        (TWO_PASS_SIMT, (70, 70, 163, 35), f32, 0),
        (TWO_PASS_SIMT, (70, 163, 163, 35), f32, 32),
        (TWO_PASS, (70, 136, 200, 18), bf16, 0),
        (TWO_PASS, (70, 136, 160, 18), bf16, 64),
    ],
    ids=str,
)
def test_lora_linear_in_small_splits_is_exact(
    strategy: str, sizes: tuple[int, ...], dtype: torch.dtype, blocksize: int
) -> None:
    with lora_kernels.backend("cuda", strategy):
        exact.check(exact.integers(*sizes, dtype=dtype, **exact.OPTIONS), blocksize)


@pytest.mark.usefixtures("long_splits")
@pytest.mark.parametrize(
    ("strategy", "blocksize"), [(COOPERATIVE, 0), (COOPERATIVE, 64), (OVERLAPPED, 64)], ids=str
)
def test_few_rows_in_several_turns_are_exact(strategy: str, blocksize: int) -> None:
    """More tiles than blocks, more of K than the warps of a block take at once, three splits."""
    case = exact.integers(13, 72, 1088, 5, dtype=bf16, **exact.OPTIONS)
    with lora_kernels.backend("cuda", strategy):
        exact.check(case, blocksize)


@pytest.mark.parametrize("rank", [70, 18])
def test_thin_products_in_small_splits_are_exact(rank: int) -> None:
    """Ranks in two tiles, and dS and dB in one kernel or two."""
    case = exact.integers(140, 136, 70, rank, **exact.OPTIONS)
    with lora_kernels.backend("cuda", TWO_PASS_SIMT):
        exact.check(case)


@pytest.mark.usefixtures("long_splits")
@pytest.mark.parametrize("quant", ["", "nf4-32", "nf4-64-nested"])
def test_dora_norm_in_small_splits_is_close(quant: str) -> None:
    check_norm(Case(0, 256, 600, 3, f32, quant=quant, gate=True))


@pytest.mark.parametrize("last", codec.LAST_BLOCKS)
def test_quantize_in_small_splits_is_bitwise(last: str) -> None:
    codec.check_quantize(codec.weight_of_blocks(7, last))
