"""Kernels cut into many parts: tiles, ranks and splits of 16, so that small sizes have several of
each. `python -m tests.partitions` counts them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import COOPERATIVE, FUSED, LIBRARY, TWO_PASS, configs
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
from tests.support.engines import check_norm
from tests.support.experts import ExpertsCase, check_exact
from tests.triton.device import DEVICE

f32 = torch.float32
SIZE, SPLIT = 16, 32
M, N = 36, 36  # several tiles, the last one short
WHOLE, WORDS, ODD = 64, 40, 35  # of K, whose rows are whole 4-bit blocks, whole words, and neither
ONE_BLOCK, BLOCKS = 13, 20  # ranks


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every partition of every kernel is 16 elements, a split is two of them."""

    def cooperative(M: int, N: int, K: int, R: int, config: GemmTiles) -> int:
        return SPLIT if M <= configs.FEW_ROWS and SIZE >= R else 0

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
        "row_norm": lambda *args: (rows, SPLIT),
        "shrink_outer": shrink_outer,
        "cooperative": cooperative,
        "quantize": lambda blocksize: RowTiles(2, blocksize, 4, 1),
        "block_of_ranks": lambda rank: SIZE,
    }
    for name, value in values.items():
        monkeypatch.setattr(configs, name, value)


@pytest.mark.parametrize(
    ("strategy", "rows", "rank", "K", "blocksize"),
    [
        (FUSED, M, ONE_BLOCK, ODD, 0),
        (FUSED, M, ONE_BLOCK, WHOLE, 32),
        (TWO_PASS, M, BLOCKS, ODD, 0),
        (TWO_PASS, M, BLOCKS, WORDS, 32),
        (TWO_PASS, M, ONE_BLOCK, ODD, 32),
        (LIBRARY, M, BLOCKS, ODD, 0),
        (COOPERATIVE, 13, ONE_BLOCK, ODD, 0),
        (COOPERATIVE, 13, ONE_BLOCK, WHOLE, 32),
    ],
    ids=str,
)
def test_lora_linear_in_small_tiles_is_exact(
    strategy: str, rows: int, rank: int, K: int, blocksize: int
) -> None:
    case = Case(rows, N, K, rank, f32, values="integers", device=DEVICE, **exact.OPTIONS)
    with lora_kernels.backend("triton", strategy):
        exact.check(case, blocksize)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("K", "blocksize"), [(ODD, 0), (WHOLE, 32), (ODD, 32)])
def test_lora_experts_linear_in_small_tiles_is_exact(
    K: int, blocksize: int, is_transposed: bool, device: str
) -> None:
    """Experts of several row tiles, of one, of one row, and without rows; rows of no expert."""
    rows, options = (0, M, 1, 0, 16), {"transposed": is_transposed, "dropout_p": 0.5}
    case = ExpertsCase(rows, N, K, BLOCKS, values="integers", device=DEVICE)
    check_exact(replace(case, peft_layout=True, tail=20, **options), blocksize)


@pytest.mark.parametrize("experts", range(1, 9))
def test_lora_experts_linear_of_any_offsets_in_small_tiles_is_exact(
    experts: int, device: str
) -> None:
    """Experts of whole tiles, of parts of one, and without rows, in any order."""
    generator = torch.Generator().manual_seed(experts)
    sizes = torch.tensor([0, 1, 15, 16, 17, 33])
    rows = sizes[torch.randint(0, len(sizes), (experts,), generator=generator)].tolist()
    case = ExpertsCase(tuple(rows), 16, 16, 1, values="integers", device=DEVICE)
    check_exact(replace(case, tail=17 * (experts % 3)))


@pytest.mark.parametrize("quant", ["", "nf4-32", "nf4-64-nested"])
def test_dora_norm_in_small_tiles_is_close(quant: str, device: str) -> None:
    check_norm(Case(0, 256, WORDS, BLOCKS, f32, quant=quant, gate=True, device=device))


@pytest.mark.parametrize("last", codec.LAST_BLOCKS)
def test_quantize_in_small_tiles_is_bitwise(last: str, device: str) -> None:
    codec.check_quantize(codec.weight_of_blocks(7, last), device=device)


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_in_small_tiles_is_bitwise(nested: bool, device: str) -> None:
    for K in (WHOLE, WORDS, ODD):
        values = torch.randn(N, K, generator=torch.Generator().manual_seed(K))
        codec.check_decode(quantize_4bit(values.to(device), "nf4", 32, nested), f32)
