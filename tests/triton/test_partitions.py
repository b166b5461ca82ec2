"""Kernels cut into many parts: tiles, ranks and splits of 16, so that small sizes have several of
each."""

from collections import defaultdict
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import FUSED, TWO_PASS, configs, launch
from lora_kernels.backends.triton.configs import (
    ColumnTiles,
    GemmTiles,
    OuterTiles,
    RowTiles,
    ShrinkTiles,
)
from lora_kernels.bench.case import Case
from lora_kernels.quantization import quantize_4bit
from tests.support import codec, exact
from tests.triton.device import DEVICE

f32 = torch.float32
SIZE, SPLIT = 16, 32
M, N = 36, 36  # several tiles, the last one short
WHOLE, WORDS, ODD = 64, 40, 35  # of K, whose rows are whole 4-bit blocks, whole words, and neither
ONE_BLOCK, BLOCKS = 13, 20  # ranks


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every partition of every kernel is 16 elements, a split is two of them."""

    def shrink_outer(target: Any, M: int, N: int, R: int, itemsize: int) -> Any:
        return (outer, SPLIT) if SIZE >= R else None

    gemm, rows = GemmTiles(SIZE, SIZE, SIZE, 4, 1, group_m=2), RowTiles(SIZE, SIZE, 4, 1)
    shrink, outer = ShrinkTiles(SIZE, SIZE, SIZE, 4, 1), OuterTiles(SIZE, SIZE, SIZE, 4, 1)
    values: dict[str, Any] = {
        "UPDATE": gemm,
        "REDUCE": ColumnTiles(SIZE, 4, 1),
        "DEQUANTIZE": rows,
        "linear": lambda *args, **kwargs: gemm,
        "shrink": lambda *args: (shrink, SPLIT),
        "outer": lambda *args: (outer, SPLIT),
        "shrink_outer": shrink_outer,
        "block_of_ranks": lambda rank: SIZE,
    }
    for name, value in values.items():
        monkeypatch.setattr(configs, name, value)
    # Sums and ranks in the loops of a program, and groups of rows, are several too.
    assert min(M, N, WHOLE, WORDS, ODD, SPLIT, BLOCKS) > SIZE and gemm.group_m * SIZE < M


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """The grids in which the test launches each kernel."""
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    run = launch.run

    def recorded(kernel: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        found[kernel.__name__.removesuffix("_kernel")].append(grid)
        run(kernel, *args, grid=grid, **kwargs)

    monkeypatch.setattr(launch, "run", recorded)
    return found


@pytest.mark.parametrize(
    ("strategy", "rank", "K", "blocksize"),
    [
        (FUSED, ONE_BLOCK, ODD, 0),
        (FUSED, ONE_BLOCK, WHOLE, 32),
        (TWO_PASS, BLOCKS, ODD, 0),
        (TWO_PASS, BLOCKS, WORDS, 32),
        (TWO_PASS, ONE_BLOCK, ODD, 32),
    ],
    ids=str,
)
def test_lora_linear_in_small_tiles_is_exact(
    strategy: str, rank: int, K: int, blocksize: int, grids: dict[str, list[tuple[int, ...]]]
) -> None:
    options: Any = exact.OPTIONS | {"dropout_p": 0.0}
    case = Case(M, N, K, rank, f32, values="integers", device=DEVICE, **options)
    with lora_kernels.backend("triton", strategy):
        exact.check(case, blocksize)
    kernels = ["outer", "reduce", *(["fused"] if strategy == FUSED else ["shrink", "two_pass"])]
    if strategy == TWO_PASS and rank == ONE_BLOCK:
        kernels.append("shrink_outer")
    for kernel in kernels:
        first, *rest = grids[kernel][0]
        if rank == ONE_BLOCK and kernel in ("shrink", "outer"):
            del rest[0]  # of ranks
        assert min([first, *rest]) > 1, (kernel, grids[kernel])


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_in_small_tiles_is_bitwise(
    nested: bool, device: str, grids: dict[str, list[tuple[int, ...]]]
) -> None:
    for K in (WHOLE, WORDS, ODD):
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(K))
        codec.check_decode(quantize_4bit(values.to(device), "nf4", 32, nested), f32)
    assert min(min(grid) for grid in grids["dequantize"]) > 1
