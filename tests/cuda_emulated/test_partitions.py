"""Kernels cut into many parts: splits of a few steps, so that small sizes have several of each.
`python -m tests.partitions` counts them."""

import pytest

import lora_kernels
from lora_kernels.backends.cuda import COOPERATIVE, TWO_PASS, equation
from tests.support import exact
from tests.support.problems import UNDROPPED, bf16


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


# Two tiles of 64 rows and of 128 columns, the last ones short; of 128 elements of K and one more
# step; of ranks, 16 at a time. Skinny GEMMs: ranks in two tiles, dS and dB in one kernel or two.
@pytest.mark.parametrize(
    ("sizes", "blocksize"),
    [((70, 136, 200, 18), 0), ((70, 136, 160, 18), 64), ((140, 136, 72, 70), 0)],
    ids=str,
)
def test_lora_linear_in_small_splits_is_exact(sizes: tuple[int, ...], blocksize: int) -> None:
    with lora_kernels.backend("cuda", TWO_PASS):
        exact.check(exact.integers(*sizes, dtype=bf16, **UNDROPPED), blocksize)


@pytest.mark.usefixtures("long_splits")
@pytest.mark.parametrize("blocksize", [0, 64])
def test_few_rows_in_several_turns_are_exact(blocksize: int) -> None:
    """More tiles than blocks, more of K than the warps of a block take at once, three splits."""
    case = exact.integers(13, 72, 1088, 5, dtype=bf16, **UNDROPPED)
    with lora_kernels.backend("cuda", COOPERATIVE):
        exact.check(case, blocksize)
