"""Kernels cut into many parts: tiles, ranks and splits of 16, so that small sizes have several of
each."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import triton
from lora_kernels.backends.eager import gated_mlp as eager_mlp
from lora_kernels.backends.triton import configs, elementwise, launch
from lora_kernels.backends.triton.configs import (
    GemmTiles,
    OuterTiles,
    ReduceTiles,
    RowTiles,
    ShrinkTiles,
)
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case
from lora_kernels.quantization import quantize_4bit
from tests.support import codec, exact
from tests.support.interpreter import (
    OUTPUTS,
    Order,
    programs_run_in,
    reversed_order,
    shuffled_order,
)
from tests.triton.device import DEVICE

f32 = torch.float32
SIZE, SPLIT = 16, 32
M, N = 36, 36  # several tiles, the last one short
WHOLE, WORDS, ODD = 64, 40, 35  # of K, whose rows are whole 4-bit blocks, whole words, and neither
RANKS = 13  # in one block


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every partition of every kernel is 16 elements, a split is two of them."""

    gemm, rows = GemmTiles(SIZE, SIZE, SIZE, 4, 1, group_m=2), RowTiles(SIZE, SIZE, 4, 1)
    shrink, outer = ShrinkTiles(SIZE, SIZE, SIZE, 4, 1), OuterTiles(SIZE, SIZE, SIZE, 4, 1)
    values: dict[str, Any] = {
        "REDUCE": ReduceTiles(SIZE, SIZE, 4, 1),
        "DEQUANTIZE": rows,
        "linear": lambda *args, **kwargs: gemm,
        "shrink": lambda *args: (shrink, SPLIT),
        "outer": lambda *args: (outer, SPLIT),
        "block_of_ranks": lambda rank: SIZE,
    }
    for name, value in values.items():
        monkeypatch.setattr(configs, name, value)
    # Sums and ranks in the loops of a program, and groups of rows, are several too.
    assert min(M, N, WHOLE, WORDS, ODD, SPLIT) > SIZE and gemm.group_m * SIZE < M


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
    ("K", "blocksize"), [(ODD, 0), (WHOLE, 32), (WORDS, 32), (ODD, 32)], ids=str
)
@pytest.mark.parametrize("frozen", [(), ("x",)], ids=str)
def test_lora_linear_in_small_tiles_is_exact(
    K: int, blocksize: int, frozen: Any, grids: dict[str, list[tuple[int, ...]]]
) -> None:
    options: Any = exact.OPTIONS | {"dropout_p": 0.0}
    case = Case(M, N, K, RANKS, f32, values="integers", frozen=frozen, device=DEVICE, **options)
    with lora_kernels.backend("triton"):
        exact.check(case, blocksize)
    for kernel in ("outer", "reduce", "fused", *(["shrink"] if frozen else [])):
        first, *rest = grids[kernel][0]
        if kernel in ("shrink", "outer", "reduce"):
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


Run = Callable[[], dict[str, Tensor]]
ORDERS: dict[str, Order] = {"ascending": range, "reversed": reversed_order}
ORDERS |= {f"shuffled {seed}": shuffled_order(seed) for seed in range(2)}


def linear(*sizes: int, quant: str = "", frozen: tuple[str, ...] = ()) -> Run:
    """sizes: M, N, K, R."""
    options: Any = exact.OPTIONS | {"dropout_p": 0.0}
    case = Case(*sizes, f32, quant=quant, frozen=frozen, device=DEVICE, **options)
    with lora_kernels.backend("cpu"):
        args = cases.inputs(case)

    def run() -> dict[str, Tensor]:
        with lora_kernels.backend("triton"):
            return cases.run(lora_kernels.lora_linear, args)

    return run


def codec_of_4_bits() -> dict[str, Tensor]:
    values = torch.randn(20, ODD, generator=torch.Generator().manual_seed(0))
    weight = quantize_4bit(values.to(DEVICE), "nf4", 32, False)
    return {"decoded": weight.dequantize(f32)}


def gated_mlp() -> dict[str, Tensor]:
    """h, and dg, du and h in the memory of g, u and dh."""
    generator = torch.Generator().manual_seed(0)
    g, u, dh = (torch.randn(3, 3333, generator=generator).to(DEVICE) for _ in range(3))
    h = elementwise.gated(g, u, "silu")
    elementwise.gated_backward(g, u, dh, g, u, dh, "silu")
    return {"h": h, "dg": g, "du": u, "h again": dh}


def updated_gated_mlp() -> dict[str, Tensor]:
    """h, and dg and du in the memory of g and u, with the three gradients."""
    generator, (M, N, R) = torch.Generator().manual_seed(0), (110, 330, 5)

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    g, u, dh, s_gate, s_up, ds = (sample(M, n) for n in (N, N, N, R, R, R))
    b_gate, b_up, a = sample(N, R), sample(N, R), sample(R, N)
    updates = eager_mlp.Updates(s_gate, s_up, b_gate, b_up, 0.5, 0.25)
    h = eager_mlp.gated_update(g, u, updates, "silu")
    grads = eager_mlp.gated_update_backward(g, u, dh, updates, ds, a, True, True, "silu")
    assert grads.partials is not None
    sums = eager_mlp.sum_partials(grads.partials, (R, R, R), torch.float32)
    return {"h": h, "g": grads.g, "u": grads.u, **sums._asdict()}


def loss() -> dict[str, Tensor]:
    """The loss, and its gradient in the logits' memory."""
    generator = torch.Generator().manual_seed(0)
    y, labels = torch.randn(9, 3333, generator=generator).to(DEVICE), torch.arange(9).to(DEVICE)
    return {"loss": elementwise.cross_entropy(y, labels, 0.7, 0.0, 1.0, 0.1, True), "dy": y}


# A call, and the kernels that it launches.
BY_LINEAR = {"fused", "outer", "reduce"}
RUNS: dict[str, tuple[Callable[[], Run], set[str]]] = {
    "dense": (lambda: linear(20, 20, 17, RANKS), BY_LINEAR),
    "frozen x": (lambda: linear(20, 20, 17, RANKS, frozen=("x",)), BY_LINEAR | {"shrink"}),
    "4 bits": (lambda: linear(20, 20, 40, RANKS, quant="nf4-32"), BY_LINEAR),
    "codec": (lambda: codec_of_4_bits, {"dequantize"}),
    "gated": (lambda: gated_mlp, {"gated", "gated_backward"}),
    "gated update": (
        lambda: updated_gated_mlp,
        {"gated_update", "gated_update_backward", "gated_gradients"},
    ),
    "loss": (lambda: loss, {"cross_entropy"}),
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


def test_every_kernel_has_a_run_in_any_order_and_outputs() -> None:
    sources = Path(triton.__file__).parent.glob("*.py")
    kernels = {
        name
        for source in sources
        for name in re.findall(r"^def (\w+)_kernel\(", source.read_text(), re.MULTILINE)
    }
    assert set.union(*(kernels for _, kernels in RUNS.values())) == kernels == OUTPUTS.keys()


# Each element is stored once


SEAMS = (SIZE - 1, SIZE, SIZE + 1, SPLIT - 1, SPLIT, SPLIT + 1)


@pytest.mark.skipif(not triton.is_interpreted(), reason="a GPU does not say what it stores")
@pytest.mark.parametrize("first", range(len(SEAMS)))
def test_each_element_around_whole_tiles_is_stored_once(first: int) -> None:
    """The interpreter raises otherwise, in every test."""
    M, N, K, R = (SEAMS[(first + i) % len(SEAMS)] for i in range(4))
    linear(M, N, K, min(R, SIZE))()


@pytest.mark.parametrize("K", SEAMS)
def test_each_element_of_a_decoded_weight_is_stored_once(K: int, device: str) -> None:
    values = torch.randn(SEAMS[-1 - SEAMS.index(K)], K, generator=torch.Generator().manual_seed(K))
    codec.check_decode(quantize_4bit(values.to(device), "nf4", 32, False), f32)
