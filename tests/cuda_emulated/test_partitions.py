"""Kernels cut into many parts: splits of a few steps, so that small sizes have several of each."""

import pytest

import lora_kernels
from lora_kernels.backends.cuda import COOPERATIVE, TWO_PASS, launch
from lora_kernels.backends.cuda import linear as equation
from tests.support import exact
from tests.support.problems import UNDROPPED, bf16

MULTIPROCESSORS = 4  # of the emulator, with one block at a time each


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that the test launches."""
    found, run = set[str](), launch.emulate
    monkeypatch.setattr(launch, "emulate", lambda name, *args: (found.add(name), run(name, *args)))
    return found


@pytest.fixture
def every_sum_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    split = equation._split

    def checked(size: int, least: int, most: int) -> tuple[int, int]:
        per_split, splits = split(size, least, most)
        assert splits > 1, (size, least, most)
        return per_split, splits

    monkeypatch.setattr(equation, "_split", checked)


@pytest.mark.parametrize("most", [0, 1, 2, 7, 264])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 640, 20_000])
def test_splits_cover_a_sum_and_are_at_most_so_many(size: int, most: int) -> None:
    """A call with more tiles than blocks asks for 0."""
    per_split, splits = equation._split(size, 64, most)
    assert per_split % 64 == 0 and (splits - 1) * per_split < size <= splits * per_split
    assert 1 <= splits <= max(1, most)


# Two tiles of 64 rows and of 128 columns, the last ones short; of 128 elements of K and one more
# step; of ranks, 16 at a time. Skinny GEMMs: ranks in two tiles, dS and dB in one kernel or two.
@pytest.mark.usefixtures("every_sum_is_split")
@pytest.mark.parametrize(
    ("sizes", "blocksize"),
    [((70, 136, 200, 18), 0), ((70, 136, 160, 18), 64), ((140, 136, 136, 70), 0)],
    ids=str,
)
def test_lora_linear_in_small_splits_is_exact(
    sizes: tuple[int, int, int, int], blocksize: int, launched: set[str]
) -> None:
    (M, N, K, R), tile_of_ranks = sizes, 64
    assert M > 64 and min(N, K) > 128 and R > 16
    with lora_kernels.backend("cuda", TWO_PASS):
        exact.check(exact.integers(*sizes, dtype=bf16, **UNDROPPED), blocksize)
    both = {"thin"} if tile_of_ranks < R else {"pair"}
    assert launched >= {"gemm", "column_sums", "reduce", *both}


@pytest.mark.usefixtures("long_splits")
@pytest.mark.parametrize("blocksize", [0, 64])
def test_few_rows_in_several_turns_are_exact(blocksize: int, launched: set[str]) -> None:
    """More tiles than blocks, more of K than the warps of a block take at once, three splits."""
    M, N, K, R = 13, 72, 1088, 5
    assert M > 8 and -(-N // 16) > MULTIPROCESSORS and max(8 * 128, 2 * equation._SPLIT) < K
    with lora_kernels.backend("cuda", COOPERATIVE):
        exact.check(exact.integers(M, N, K, R, dtype=bf16, **UNDROPPED), blocksize)
    assert "decode" in launched
