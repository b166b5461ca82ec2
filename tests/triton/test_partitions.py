"""Kernels cut into many parts: tiles, ranks and splits of 16, so that small sizes have several of
each. `python -m tests.partitions` counts them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import triton
from lora_kernels.backends.triton import COOPERATIVE, FUSED, LIBRARY, TWO_PASS, configs, launch
from lora_kernels.backends.triton.configs import (
    ColumnTiles,
    GemmTiles,
    OuterTiles,
    RowTiles,
    ShrinkTiles,
)
from lora_kernels.bench import case as cases
from lora_kernels.bench.case import Case
from lora_kernels.quantization import quantize_4bit
from tests.support import codec, exact
from tests.support.engines import check_norm
from tests.support.experts import ExpertsCase, check_exact
from tests.support.interpreter import Order, programs_run_in, reversed_order, shuffled_order
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


Run = Callable[[], dict[str, Tensor]]
ORDERS: dict[str, Order] = {"ascending": range, "reversed": reversed_order}
ORDERS |= {f"shuffled {seed}": shuffled_order(seed) for seed in range(2)}


def linear(strategy: str, M: int) -> Run:
    case = Case(M, 20, 17, ONE_BLOCK, f32, device=DEVICE, **exact.OPTIONS)
    with lora_kernels.backend("cpu"):
        args = cases.inputs(case)

    def run() -> dict[str, Tensor]:
        with lora_kernels.backend("triton", strategy):
            return cases.run(lora_kernels.lora_linear, args)

    return run


def experts() -> dict[str, Tensor]:
    case = ExpertsCase((3, 17, 0, 1), 20, 17, ONE_BLOCK, tail=3, dropout_p=0.5, device=DEVICE)
    return cases.run(lora_kernels.lora_experts_linear, cases.inputs(case))


def norm() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (20, ODD), (ONE_BLOCK, ODD), (20, ONE_BLOCK)
    weight, A, B = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return {"norm": lora_kernels.dora_norm(weight, A, B)}


def codec_of_4_bits() -> dict[str, Tensor]:
    values = torch.randn(20, ODD, generator=torch.Generator().manual_seed(0))
    weight = quantize_4bit(values.to(DEVICE), "nf4", 32, False)
    return {"packed": weight.codes.packed, "decoded": weight.dequantize(f32)}


# A call, and the kernels that it launches.
RUNS: dict[str, tuple[Callable[[], Run], set[str]]] = {
    FUSED: (lambda: linear(FUSED, 20), {"fused", "outer", "reduce"}),
    TWO_PASS: (
        lambda: linear(TWO_PASS, 20),
        {"two_pass", "shrink", "shrink_outer", "outer", "reduce"},
    ),
    COOPERATIVE: (
        lambda: linear(COOPERATIVE, 13),
        {"cooperative", "shrink_outer", "outer", "reduce"},
    ),
    "experts": (lambda: experts, {"grouped_linear", "grouped_shrink", "grouped_outer"}),
    "norm": (lambda: norm, {"row_norm"}),
    "codec": (lambda: codec_of_4_bits, {"dequantize", "quantize"}),
}


@pytest.mark.skipif(not triton.is_interpreted(), reason="a GPU chooses the order of programs")
@pytest.mark.parametrize("name", RUNS)
def test_kernels_of_programs_in_any_order_have_the_same_bits(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, run = set(), launch.run

    def note(kernel: Any, *rest: Any, **meta: Any) -> None:
        launched.add(kernel.__name__.removesuffix("_kernel"))
        run(kernel, *rest, **meta)

    monkeypatch.setattr(launch, "run", note)
    build, kernels = RUNS[name]
    results, computed = {}, build()
    for order, by in ORDERS.items():
        with programs_run_in(by):
            results[order] = computed()
    want = results["ascending"]
    for order, got in results.items():
        assert got.keys() == want.keys()
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        assert not wrong, f"{order}: {wrong}"
    assert launched == kernels


def test_every_kernel_has_a_run_in_any_order() -> None:
    sources = Path(triton.__file__).parent.glob("*.py")
    kernels = {
        name
        for source in sources
        for name in re.findall(r"^def (\w+)_kernel\(", source.read_text(), re.MULTILINE)
    }
    assert set.union(*(kernels for _, kernels in RUNS.values())) == kernels
