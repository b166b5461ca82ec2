"""Traffic by hand, PEFT's layers on a CPU as a second opinion, and the table of `bench --count`."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from lora_kernels import lora_linear
from lora_kernels.backends.eager import products
from lora_kernels.bench import blocks, command, counter, memory
from lora_kernels.bench import traffic as bench_traffic
from lora_kernels.bench.blocks import Cell, build_layer
from lora_kernels.bench.counter import Kernel, Traffic, count, count_layer
from lora_kernels.bench.results import Row
from lora_kernels.bench.roofline import Sizes, moved
from lora_kernels.bench.table import count_calls, exceeded_measures
from lora_kernels.bench.traffic import CELLS, layer_entries
from lora_kernels.choice import choose as selection
from lora_kernels.ops import registry

pytest.importorskip("peft")
from lora_kernels.peft import swap
from lora_kernels.peft.heavier import heavier_reason

M, K, N = 8, 16, 32
BY_NAME = {cell.name: cell for cell in CELLS}
F32, BF16 = torch.float32, torch.bfloat16


def meta(*sizes: int, dtype: torch.dtype = F32, requires_grad: bool = False) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=requires_grad)


def count_step(
    layer: nn.Module, cell: Cell, M: int, K: int, log: list[Kernel] | None = None
) -> tuple[Traffic, Traffic]:
    """Forward and backward of a step."""
    call = bench_traffic.cell_call(layer, cell, M, K)
    return count_layer(call.forwards[0], call.leaves, log)


def layer_rows(*args: Any, **options: Any) -> list[Row]:
    return [row for entry in layer_entries(*args, **options) for row in count_calls(entry)]


def base_rows(*args: Any) -> list[Row]:
    return [row for entry in bench_traffic.base_entries(*args) for row in count_calls(entry)]


def read_written(call: Callable[[], object]) -> list[tuple[int, int]]:
    """Bytes that each kernel reads and writes."""
    log: list[Kernel] = []
    count(call, log)
    return [(kernel.read, kernel.written) for kernel in log]


X = 4 * M * K  # bytes of x [M, K] in float32
A, B = meta(M, K), meta(K, N)
Y = 4 * M * N
INDEX = meta(M, 3, dtype=torch.int64)

KERNELS: dict[str, tuple[Callable[[], object], list[tuple[int, int]]]] = {
    "add": (lambda: A + meta(M, K), [(2 * X, X)]),
    "add one tensor twice": (lambda: A + A, [(X, X)]),
    "add a number": (lambda: A + 1.0, [(X, X)]),
    "add in place": (lambda: meta(M, K).add_(A), [(2 * X, X)]),
    "add into out": (lambda: torch.add(A, 1.0, out=meta(M, K)), [(X, X)]),
    "multiply by an expanded column": (lambda: A * meta(M, 1).expand(M, K), [(X + 4 * M, X)]),
    "copy_ casts": (lambda: meta(M, K, dtype=BF16).copy_(A), [(X, X // 2)]),
    "to casts": (lambda: A.to(BF16), [(X, X // 2)]),
    "to the same dtype": (lambda: A.to(F32), []),
    "clone": (lambda: A.t().contiguous(), [(X, X)]),
    "zeros": (lambda: meta(M, K).zero_() + torch.zeros_like(A), [(0, X), (0, X), (2 * X, X)]),
    "mm": (lambda: A @ B, [(X + 4 * K * N, Y)]),
    "mm to float32": (
        lambda: torch.mm(meta(M, K, dtype=BF16), meta(K, N, dtype=BF16), out_dtype=F32),
        [((X + 4 * K * N) // 2, Y)],
    ),
    "addmm_": (lambda: meta(M, N).addmm_(A, B), [(X + 4 * K * N + Y, Y)]),
    "addmm": (lambda: torch.addmm(meta(M, N), A, B), [(Y, Y), (X + 4 * K * N + Y, Y)]),
    "addmm into out": (
        lambda: torch.addmm(meta(M, N), A, B, out=meta(M, N)),
        [(Y, Y), (X + 4 * K * N + Y, Y)],
    ),
    "addmm with beta 0": (
        lambda: torch.addmm(meta(M, N), A, B, beta=0, out=meta(M, N)),
        [(X + 4 * K * N, Y)],
    ),
    "addmm of a bias": (lambda: F.linear(A, B.t(), meta(N)), [(X + 4 * K * N + 4 * N, Y)]),
    "silu's backward, composite on meta": (
        lambda: torch.ops.aten.silu_backward(A, meta(M, K)),
        [(2 * X, X)],
    ),
    "index_select from a small table": (
        lambda: meta(4, K).index_select(0, meta(M, dtype=torch.int64)),
        [(4 * 4 * K + 8 * M, X)],
    ),
    "index_select from a large table": (
        lambda: meta(1000, K).index_select(0, meta(M, dtype=torch.int64)),
        [(X + 8 * M, X)],
    ),
    "scatter reads and writes what its indices name, of the table's size each": (
        lambda: meta(1000, K, dtype=BF16).scatter_(1, INDEX, meta(M, 3, dtype=BF16)),
        [(8 * M * 3 + 2 * 2 * M * 3, 2 * M * 3)],
    ),
    "scatter of a number": (
        lambda: meta(1000, K, dtype=BF16).scatter_(1, INDEX, 1.0),
        [(8 * M * 3 + 2 * M * 3, 2 * M * 3)],
    ),
    "scatter_add": (
        lambda: meta(1000, K).scatter_add_(1, INDEX, meta(M, 5)),
        [(8 * M * 3 + 4 * M * 3 + 4 * M * 5, 4 * M * 3)],
    ),
    "gather": (
        lambda: meta(1000, K, dtype=BF16).gather(1, INDEX),
        [(8 * M * 3 + 2 * M * 3, 2 * M * 3)],
    ),
    "embedding": (
        lambda: F.embedding(meta(M, 3, dtype=torch.int64), meta(1000, K, dtype=BF16)),
        [(8 * M * 3 + 2 * M * 3 * K, 2 * M * 3 * K)],
    ),
    "addmm of a stack": (
        lambda: torch.baddbmm(meta(3, M, N), meta(3, M, K), meta(3, K, N)),
        [(3 * Y, 3 * Y), (3 * (X + 4 * K * N + Y), 3 * Y)],
    ),
    "cross_entropy_ reads the logits twice": (
        lambda: torch.ops.lora_kernels.cross_entropy_(
            meta(M, N), meta(M, dtype=torch.int64), 1.0, 0.0, 1.0, 0.0, True
        ),
        [(2 * Y + 8 * M, Y + 4 * M)],
    ),
    "grouped_mm reads a matrix for each row, if it has fewer": (
        lambda: F.grouped_mm(meta(3, 8), meta(5, 8, 16), offs=meta(5, dtype=torch.int32)),
        [(4 * 3 * 8 + 4 * 3 * 8 * 16 + 4 * 5, 4 * 3 * 16)],
    ),
    "grouped_mm of as many rows as matrices": (
        lambda: F.grouped_mm(meta(5, 8), meta(5, 8, 16), offs=meta(5, dtype=torch.int32)),
        [(4 * 5 * 8 + 4 * 5 * 8 * 16 + 4 * 5, 4 * 5 * 16)],
    ),
    "grouped_mm of groups that are summed": (
        lambda: F.grouped_mm(meta(3, 8).t(), meta(3, 8), offs=meta(5, dtype=torch.int32)),
        [(2 * 4 * 3 * 8 + 4 * 5, 4 * 5 * 8 * 8)],
    ),
    "grouped_mm of groups that are summed, with fewer results than terms": (
        lambda: F.grouped_mm(meta(9, 4).t(), meta(9, 8), offs=meta(5, dtype=torch.int32)),
        [(4 * 9 * 4 + 4 * 9 * 8 + 4 * 5, 4 * 5 * 4 * 8)],
    ),
    "views": (lambda: A.t().view(K, 2, M // 2).unsqueeze(0).expand(3, K, 2, 4).detach(), []),
    "allocations": (lambda: (meta(M, K), torch.empty_like(A), A.new_empty(3)), []),
    "no elements": (lambda: A[:0] + 1.0, []),
}


@pytest.mark.parametrize(("call", "want"), KERNELS.values(), ids=KERNELS)
def test_count_one_call_matches_hand_count(
    call: Callable[[], object], want: list[tuple[int, int]]
) -> None:
    assert read_written(call) == want


def test_count_addmm_into_its_operand_copies_nothing() -> None:
    z = meta(M, N)
    want = [(X + 4 * K * N + Y, Y)]
    assert read_written(lambda: torch.addmm(z, A, B, out=z)) == want


def test_count_freed_temporary_is_in_peak_once() -> None:
    """(A + 1) is freed when its square is there; at most two of three results are alive."""
    found = count(lambda: (A + 1.0).square().neg())
    assert found == Traffic(3 * X, 3 * X, 3, 2 * X)
    assert found.bytes == 6 * X


def test_count_tensors_from_before_are_not_in_peak() -> None:
    z = meta(M, K)
    assert count(lambda: z.add_(A)).peak == 0


def test_count_log_has_one_entry_a_kernel() -> None:
    log: list[Kernel] = []
    found = count(lambda: (A @ B).relu(), log)
    assert [kernel.op for kernel in log] == ["aten.mm.default", "aten.relu.default"]
    assert found.read == sum(kernel.read for kernel in log)
    assert "aten.mm.default" in str(log[0])


def test_count_layer_dropout_is_one_native_kernel_a_direction() -> None:
    x, log = meta(M, K, requires_grad=True), list[Kernel]()
    forward, backward = count_layer(lambda: nn.Dropout(0.1)(x), [x], log)
    mask = M * K
    assert log == [
        Kernel("aten.native_dropout.default", X, X + mask),
        Kernel("aten.native_dropout_backward.default", X + mask, X),
    ]
    assert forward.peak == X + mask
    assert backward.peak == 2 * X + mask  # y, the mask and dx


def test_count_layer_dropout_in_eval_mode_is_free() -> None:
    x = meta(M, K, requires_grad=True)
    forward, _ = count_layer(lambda: nn.Dropout(0.1).eval()(x) * 1.0, [x])
    assert forward == Traffic(X, X, 1, X)


def test_count_layer_gradients_of_one_tensor_are_added_in_place() -> None:
    x, log = meta(M, K, requires_grad=True), list[Kernel]()
    _, backward = count_layer(lambda: F.linear(x, B.t()) + F.linear(x, B.t()), [x], log)
    assert log[-1] == Kernel("autograd, add_", 2 * X, X)
    assert backward.peak == Y + 2 * X  # y and two gradients of x


def test_count_layer_gradient_that_the_caller_owns_is_not_overwritten() -> None:
    """The first gradient of x that arrives is dy itself."""
    x, log = meta(M, K, requires_grad=True), list[Kernel]()
    _, backward = count_layer(lambda: x * 2.0 + x, [x], log)
    assert log[-1] == Kernel("aten.add.Tensor", 2 * X, X)
    assert backward.peak == 3 * X  # y, 2·dy and dx


def test_autocast_casts_trainable_leaves_once() -> None:
    x, w, log = meta(M, K), meta(N, K, requires_grad=True), list[Kernel]()
    before = torch.get_autocast_dtype("cuda")
    assert before is not BF16

    def forward() -> Tensor:
        with counter.autocast(BF16):
            assert torch.is_autocast_enabled()
            return F.linear(x, w) + F.linear(x, w)

    count(forward, log)
    cast = [kernel.written for kernel in log if kernel.op == "aten._to_copy.default"]
    assert sorted(cast) == sorted([X // 2, 4 * K * N // 2, X // 2])
    assert not torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda") is before
    with pytest.raises(RuntimeError):
        torch.is_autocast_enabled("meta")


@pytest.mark.parametrize("name", ["bf16, fp32 adapters, autocast", "fp16, fp32 adapters, autocast"])
def test_autocast_of_peft_layer_runs_the_ops_of_cpu_autocast(name: str) -> None:
    cell = BY_NAME[name]
    emulated: list[Kernel] = []
    count_step(build_layer(cell, K, N, 4), cell, M, K, emulated)
    log: list[Kernel] = []
    count_layer(*on_cpu(cell), log)
    assert sorted(emulated) == sorted(log)  # autocast casts the operands of a GEMM last to first


@pytest.mark.parametrize(
    "name",
    [
        c.name
        for c in CELLS
        if c.base == "dense" and (c.autocast or c.adapter_dtype != torch.float32)
    ],
)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_count_layer_peak_of_peft_layer_is_what_a_cpu_allocates(name: str) -> None:
    """Equal up to a few bytes of numbers. oneDNN, which takes scratch memory, is off. Only a CPU
    makes a temporary to add float32 to bfloat16, so cells that do are left out."""
    cell = BY_NAME[name]
    layer = build_layer(cell, K, N, 4)
    found = count_step(layer, cell, 64 * M, K)
    forward, wanted = on_cpu(cell, 64 * M)
    dy = torch.randn(64 * M, N).to(cell.dtype)

    def step() -> object:
        y = forward()
        return y, torch.autograd.grad(y, wanted, dy)

    with torch.backends.mkldnn.flags(enabled=False):
        memory.peak(step)
        want = memory.peak(step)
    assert max(each.peak for each in found) == pytest.approx(want, abs=64)


def on_cpu(cell: Cell, rows: int = M) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The forward of PEFT's layer of a cell on the CPU, and what its gradients are of."""
    layer = build_layer(cell, K, N, 4).to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(rows, K).to(cell.dtype).requires_grad_()

    def forward() -> Tensor:
        with torch.autocast("cpu", cell.dtype, enabled=cell.autocast):
            return layer(x)  # type: ignore[no-any-return]

    return forward, [x, *(p for p in layer.parameters() if p.requires_grad)]


def test_count_layer_peft_fp32_adapters_matches_known_figures() -> None:
    """Bytes by hand at M=8192, K=N=4096, r=16: MB of x or y in bfloat16, W, P and A or B."""
    cell = BY_NAME["bf16, fp32 adapters"]
    forward, backward = count_step(build_layer(cell, 4096, 4096, 16), cell, 8192, 4096)
    x, W = 2 * 8192 * 4096, 2 * 4096 * 4096
    p, a = 4 * 8192 * 16, 4 * 4096 * 16
    # x·Wᵀ, x to float32, the two GEMMs, times scaling, plus the base, to bfloat16.
    assert forward.bytes == (2 * x + W) + 3 * x + 2 * (2 * x + a + p) + 4 * x + 5 * x + 3 * x
    # dy to float32 and back, times scaling; dB, dP, dA and dx of the adapter, dx to bfloat16;
    # dy·W; the two dx added.
    small = 4 * (2 * x + a + p)
    assert backward.bytes == 3 * x + 3 * x + 4 * x + small + 3 * x + (2 * x + W) + 3 * x
    assert forward.bytes / 1e6 == pytest.approx(1444, abs=1)
    assert backward.bytes / 1e6 == pytest.approx(1782, abs=1)
    assert (forward.kernels, backward.kernels) == (7, 10)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_count_op_of_this_package_is_its_eager_implementation(dtype: torch.dtype) -> None:
    x, W = meta(M, K, dtype=BF16), meta(N, K, dtype=BF16)
    args = (x, W, meta(4, K, dtype=dtype), meta(N, 4, dtype=dtype))
    rest = (*[None] * 5, 2.0, 0.0, BF16, BF16, False)
    through: list[Kernel] = []
    direct: list[Kernel] = []
    count(lambda: torch.ops.lora_kernels.lora_linear(*args, *rest), through)
    with selection.backend("eager"), counter._set_meta_autocast(None):
        count(lambda: registry.IMPLEMENTATIONS["lora_linear"](*args, *rest), direct)
    assert through == direct
    assert sum(kernel.read for kernel in through) >= 2 * (M * K + N * K)


FUSED = {
    **dict.fromkeys([(1, 4096, 4096), (4, 4096, 4096), (16, 14336, 4096), (32, 14336, 4096)], True),
    **dict.fromkeys([(16, 4096, 4096), (33, 14336, 4096), (512, 14336, 4096)], False),
    **dict.fromkeys([(8192, 4096, 4096), (1, 4096, 4095)], False),
}


@pytest.mark.parametrize(("shape", "fused"), FUSED.items())
def test_gemm_4bit_on_h100_is_fused_for_few_rows(shape: tuple[int, int, int], fused: bool) -> None:
    pytest.importorskip("bitsandbytes")
    rows, n, k = shape
    assert counter._is_gemm_4bit_fused(meta(rows, k, dtype=BF16), [n, k], 64) is fused


def test_count_layer_nf4_falls_back_to_dense_weight_for_many_rows() -> None:
    pytest.importorskip("bitsandbytes")
    cell = BY_NAME["NF4 bf16, bf16 adapters"]
    layer, n, k = build_layer(cell, 256, 512, 4).base_layer, 512, 256
    codes, scales, nested = n * k // 2, n * k // 64, n * k // 64 // 256
    log: list[Kernel] = []
    found = count(lambda: layer(meta(600, k, dtype=BF16)), log)
    assert log == [
        Kernel(
            "bitsandbytes.dequantize_blockwise.default", scales + 4 * nested + 4 * 256, 4 * scales
        ),
        Kernel("aten.add.Tensor", 4 * scales + 4, 4 * scales),
        Kernel("bitsandbytes.dequantize_4bit.default", codes + 4 * scales, 2 * n * k),
        Kernel("aten.mm.default", 2 * (600 * k + n * k), 2 * 600 * n, 2 * 600 * n * k),
    ]
    # x, both scales, the dense weight and y.
    assert found.peak == 2 * 600 * k + 8 * scales + 2 * n * k + 2 * 600 * n

    few = count(lambda: layer(meta(1, k, dtype=BF16)))
    inputs = 2 * k + codes + scales + 4 * (nested + 256 + 1)
    assert few == Traffic(inputs, 2 * n, 1, 2 * k + 2 * n)


PASSES = Traffic(100, 100, 7, 50)
BF16_CELL, FP32_CELL = BY_NAME["bf16, bf16 adapters"], BY_NAME["bf16, fp32 adapters"]
DORA, TWO = BY_NAME["DoRA bf16, fp32 adapter"], BY_NAME["bf16, two bf16 adapters"]
LOSSES: list[tuple[Cell, int, float, dict[str, int], list[str]]] = [
    (BF16_CELL, 512, 0.0, {}, []),
    (BF16_CELL, 512, 0.0, {"read": 101, "kernels": 6}, ["bytes"]),
    (BF16_CELL, 65, 0.0, {"read": 101, "kernels": 6}, ["bytes"]),
    (BF16_CELL, 64, 0.0, {"read": 101, "kernels": 6}, []),
    (BF16_CELL, 64, 0.0, {"read": 101}, ["kernels"]),
    (BF16_CELL, 64, 0.0, {"read": 6_000_101, "kernels": 6}, ["kernels"]),
    (BF16_CELL, 512, 0.0, {"peak": 50 + (2 << 20)}, []),
    (BF16_CELL, 512, 0.0, {"peak": 51 + (2 << 20)}, ["peak"]),
    (BF16_CELL, 512, 0.0, {"read": 10, "kernels": 8}, ["kernels"]),
    (BF16_CELL, 512, 0.1, {"read": 10, "kernels": 8}, ["kernels"]),
    (BF16_CELL, 512, 0.0, {"read": 100 - 12_000_000, "kernels": 9}, []),
    (BF16_CELL, 512, 0.0, {"read": 100 - 12_000_000, "kernels": 10}, ["kernels"]),
    (DORA, 16, 0.1, {"kernels": 15}, []),
    (TWO, 16, 0.1, {"kernels": 16}, ["kernels"]),
    (TWO, 16, 0.0, {"kernels": 8}, ["kernels"]),
]


@pytest.mark.parametrize(("cell", "rows", "dropout_p", "ours", "want"), LOSSES)
def test_losses_against_peft_names_each_measure(
    cell: Cell, rows: int, dropout_p: float, ours: dict[str, int], want: list[str]
) -> None:
    counts = {"ours": PASSES._replace(**ours), "peft": PASSES}
    limits = bench_traffic.layer_limits(cell, rows, dropout_p, counts, "forward")
    assert exceeded_measures(counts["ours"], limits) == want


def test_losses_of_a_backward_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward saves two bytes; the backward moves one more, then three more."""
    less, more, most = (PASSES._replace(read=n) for n in (98, 101, 103))
    assert less.then(more) == Traffic(199, 200, 14, 50)
    assert less.then(PASSES._replace(peak=60)).peak == 60
    for backward, want in ((more, []), (most, ["bytes", "kernels"])):
        counts = iter([(less, backward), (PASSES, PASSES)])
        monkeypatch.setattr(counter, "count_layer", lambda *args, counts=counts: next(counts))
        forward_row, row = layer_rows(BF16_CELL, 64, 64, 8, Ms=[512])
        assert forward_row.misses == {}
        assert row.misses == ({"ours": ", ".join(want)} if want else {})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers, which take a second, no blocks, a small head, and no experts."""
    monkeypatch.setattr(bench_traffic, "BLOCKS", ())
    monkeypatch.setattr(bench_traffic, "HEAD", (64, 128, 512))
    monkeypatch.setattr(bench_traffic, "EXPERTS", ())
    monkeypatch.setattr(bench_traffic, "SHAPES", ((128, 256),))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_count_cell_every_cell_is_fused_and_counted(cell: Cell, small: None) -> None:
    if cell.base == "nf4":
        pytest.importorskip("bitsandbytes")
    K, N, R, p = 128, 256, 16, 0.05
    layers = {"ours": build_layer(cell, K, N, R, p)}
    layers["peft"] = build_layer(cell, K, N, R, p)
    with mock.patch.object(swap, "heavier_reason", lambda layer: None):
        swap.fuse(nn.Sequential(layers["ours"]))
    found = layer_rows(cell, K, N, R, p, by_rule=False)
    steps = [(rows, i) for rows in bench_traffic.ROWS for i in range(2)]
    assert [(row.M, row.mode) for row in found] == [
        (rows, ("forward", "backward")[i]) for rows, i in steps
    ]
    sizes = Sizes(0, N, K, R * cell.adapters, cell.dtype, cell.adapter_dtype.itemsize)
    for row, (rows, i) in zip(found, steps, strict=True):
        assert row.strategy is None
        for name, layer in layers.items():
            step = count_step(layer, cell, rows, K)
            counts = (row.moved[name], row.kernels[name], row.peak_bytes[name])
            assert counts == (step[i].bytes, step[i].kernels, step[i].peak)
            # No fewer than each operand once, of 4-bit weights their codes.
            least = replace(sizes, M=rows, four_bit=cell.base == "nf4")
            directions = moved(least), moved(least, step=True) - moved(least)
            assert counts[0] >= directions[i]
            # y, or dx and the gradients of the adapters, and y still.
            results = rows * N * 2, rows * (N + K) * 2 + R * (N + K) * sizes.adapter_itemsize
            assert counts[2] >= results[i]
        # Ours is not PEFT's under another name.
        assert row.moved["ours"] != row.moved["peft"]


def test_bench_count_prints_and_writes_every_row(small: None, run: Any) -> None:
    ran = run("--count", "--ranks", "16")
    counted = [c for c in CELLS if c.base != "nf4" or find_spec("bitsandbytes") is not None]
    layers = [row for row in ran.rows if "what" not in row]  # not the heads and bases
    assert len(layers) == 2 * len(counted) * len(bench_traffic.DROPOUTS) * len(bench_traffic.ROWS)
    names = {"version", "torch", "peft", "bitsandbytes", "commit", "date", "sources"}
    assert set(ran.data["provenance"]) == names
    lost = [row["misses"]["ours"] for row in ran.rows if row["misses"]]
    assert ran.status == bool(lost)
    lines = ran.out.splitlines()
    assert [line for line in lines if line.startswith("✗")] == [f"✗ ours: {each}" for each in lost]
    assert any(line.startswith(f"{len(layers)} rows, ours loses ") for line in lines)
    text = report.table("||", report.traffic_rows(layers))
    assert "| bf16, fp32 adapters | 0.05 | 8192×128×256 | " in text and "16×128×256" not in text


def test_report_without_traffic_json_has_no_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "JSON_TRAFFIC", tmp_path / "none.json")
    assert "## Memory traffic on a GPU, counted" not in report.render(
        "RESULTS.md.j2", report.runs()
    )


def full_size(cell: Cell, R: int, rows: Sequence[int]) -> list[Row]:
    return layer_rows(cell, 4096, 4096, R, 0.0, rows)


EVERY_SIZE = [
    pytest.param(
        K,
        N,
        R,
        marks=[pytest.mark.proof] if R != 16 or 4096 not in (K, N) or max(K, N) > 4096 else [],
    )
    for (K, N), R in itertools.product(bench_traffic.SHAPES, command.RANKS)
]


@pytest.mark.parametrize(("K", "N", "R"), EVERY_SIZE)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_fuse_at_full_size_loses_no_row_and_leaves_what_moves_more(
    cell: Cell, K: int, N: int, R: int
) -> None:
    if cell.base == "nf4":
        pytest.importorskip("bitsandbytes")
    for p in bench_traffic.DROPOUTS:
        rows = layer_rows(cell, K, N, R, p, by_rule=False)
        said = heavier_reason(build_layer(cell, K, N, R, p))
        if said is None:
            for row in rows:
                assert not row.misses, str(row)
        else:  # ours would lose a row, or save next to nothing with many rows
            ours, peft = (sum(row.moved[who] for row in rows[-2:]) for who in ("ours", "peft"))
            assert any(row.misses for row in rows) or ours > 0.98 * peft, said


@pytest.mark.parametrize(("base", "most"), [("dense", 3.65e9), ("nf4", 3.75e9)])
def test_tiles_of_an_mlp_at_131072_rows_have_the_peak_that_was_wanted(
    base: str, most: float
) -> None:
    """With x or dy, 1.07 GB, beside what the step allocates."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    cell = next(each for each in blocks.CELLS if each.base == base)
    for entry in bench_traffic.tile_entries(cell, Ms=[131072]):
        entry.calls.pop("untiled")
        forward, backward = count_calls(entry)
        assert not backward.misses, str(backward)
        peak = max(forward.peak_bytes["ours"], backward.peak_bytes["ours"])
        assert peak + 131072 * 4096 * 2 <= most


def test_fused_layer_with_float32_adapters_moves_what_was_derived() -> None:
    """Passes over x and y [8192, 4096] in 16 bits: 2 and 3 forward, 4 and 3 backward, and W once.

    The rest, the adapter and [M, R] in float32 and in parts, is at most a quarter of a pass of x.
    """
    forward, backward = (row.moved["ours"] for row in full_size(FP32_CELL, 16, [8192])[:2])
    a_pass, weight = 2 * 8192 * 4096, 2 * 4096 * 4096
    assert 0 < forward - (5 * a_pass + weight) < 0.15 * a_pass
    assert 0 < backward - (7 * a_pass + weight) < 0.25 * a_pass
    assert forward < 420e6 and backward < 560e6


@pytest.mark.parametrize("name", ["expand", "add_base", "shrink", "adapter_gradient"])
def test_fused_layer_with_one_float32_copy_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is of the first operand, as large as x or y in 16 bits."""
    clean = [row.moved["ours"] for row in full_size(FP32_CELL, 16, [8192])[:2]]
    original = getattr(products, name)

    def copying(first: Tensor, *rest: Any, **options: Any) -> Any:
        large = rest[0] if name == "add_base" else rest[1] if name == "expand" else first
        large.float()
        return original(first, *rest, **options)

    monkeypatch.setattr(products, name, copying)
    copied = [row.moved["ours"] for row in full_size(FP32_CELL, 16, [8192])[:2]]
    a_copy = 6 * 8192 * 4096
    extra = [more - less for more, less in zip(copied, clean, strict=True)]
    assert max(extra) >= a_copy and all(each % a_copy == 0 for each in extra)
    assert clean[0] + a_copy > 420e6 and clean[1] + a_copy > 560e6


def test_autocast_casts_a_float32_weight_once() -> None:
    """Its 16-bit copy serves both directions: no kernel of the backward reads 4·N·K bytes."""
    M, K, N, R = 64, 512, 1024, 4
    x, W = meta(M, K, requires_grad=True), meta(N, K)
    A, B = meta(R, K, requires_grad=True), meta(N, R, requires_grad=True)
    log: list[Kernel] = []

    def forward() -> Tensor:
        with counter.autocast(BF16):
            return lora_linear(x, W, A, B)

    _, backward = count_layer(forward, [x, A, B], log)
    of_weight = [kernel for kernel in log if kernel.read >= 4 * N * K]
    assert [kernel.op for kernel in of_weight] == ["aten._to_copy.default"]
    assert backward.read < 4 * N * K


PASSES_OF = {  # benchmarks/KERNELS.md: 16-bit adapters of PEFT, float32 ones, ours
    "forward, passes over x": (2, 6, 2),
    "forward, passes over y": (7, 15, 3),
    "backward, passes over dY": (5, 15, 3),
    "backward, passes over dx (and x for dA)": (6, 11, 4),
}


def test_passes_in_the_docs_are_those_counted() -> None:
    """A pass over x is 2·M·K bytes and one over y 2·M·N, so two K and two N tell them apart."""
    from lora_kernels.peft import fuse

    M, R, sides = 8192, 16, (2048, 4096)

    def counted(cell: Cell, ours: bool, K: int, N: int) -> list[float]:
        layer = build_layer(cell, K, N, R)
        if ours:
            fuse(nn.Sequential(layer))
        both = count_step(layer, cell, M, K)
        without = count_step(layer, cell, M // 2, K)
        # W and the adapter, which do not grow with the rows, cancel.
        return [2 * (a.bytes - b.bytes) for a, b in zip(both, without, strict=True)]

    columns = [(BF16_CELL, False), (FP32_CELL, False), (BF16_CELL, True), (FP32_CELL, True)]
    found = []
    for cell, ours in columns:
        small = counted(cell, ours, sides[0], sides[0])
        wide = counted(cell, ours, sides[1], sides[0])
        tall = counted(cell, ours, sides[0], sides[1])
        a_pass = 2 * M * (sides[1] - sides[0])
        over_x = [(a - b) / a_pass for a, b in zip(wide, small, strict=True)]
        over_y = [(a - b) / a_pass for a, b in zip(tall, small, strict=True)]
        found.append([over_x[0], over_y[0], over_y[1], over_x[1]])
    assert found[2] == found[3]
    assert dict(zip(PASSES_OF, zip(*found[:3], strict=True), strict=True)) == PASSES_OF
    table = Path(bench_traffic.__file__).parents[2].joinpath("benchmarks/KERNELS.md").read_text()
    for name, row in PASSES_OF.items():
        assert f"| {name} | {' | '.join(map(str, row))} |" in table


@pytest.mark.parametrize("form", bench_traffic.FORMS)
def test_count_of_a_form_is_nested_nf4s_and_its_bytes(form: str) -> None:
    """A shift and 8 bits add no kernel, and at 8192 rows no bytes but those of the weight."""
    pytest.importorskip("bitsandbytes")
    elements = 4096 * 1024
    want = {
        "int4-128-half-shift": elements // 2 + elements // 128 * 4 + 4 * 16,
        "int8-32-half": elements + elements // 32 * 2 + 4 * 256,
    }[form]
    nf4 = elements // 2 + elements // 64 + elements // 64 // 256 * 4 + 4 + 4 * (16 + 256)
    for row in base_rows(form, 4096, 1024, 16):
        assert not row.misses
        if row.M == 8192:
            assert row.moved["ours"] - row.moved["ours, NF4"] == want - nf4
            assert row.kernels["ours"] == row.kernels["ours, NF4"]
            assert row.peak_bytes["ours"] == row.peak_bytes["ours, NF4"]


@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4"])
def test_count_of_a_base_is_nested_nf4s_and_its_scales(
    quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8192 rows the bytes differ by those of the scales alone, and no kernel is added."""
    pytest.importorskip("bitsandbytes")
    rows = [row for row in base_rows(quant_type, 4096, 1024, 16) if row.M == 8192]
    elements, block = 4096 * 1024, {"mxfp4": 32, "nvfp4": 16}[quant_type]
    nested = elements // 64 + elements // 64 // 256 * 4 + 4
    for row in rows:
        assert not row.misses
        more = row.moved["ours"] - row.moved["ours, NF4"]
        assert more == elements // block - nested
        assert row.kernels["ours"] == row.kernels["ours, NF4"]
        assert row.peak_bytes["ours"] == row.peak_bytes["ours, NF4"]
    monkeypatch.setattr(bench_traffic, "_decoded_bytes", lambda weight: 0)
    lost = [row.misses for row in base_rows(quant_type, 4096, 1024, 16)]
    assert lost == [{}] * 4 + [{"ours": "bytes"}] * 4  # of 512 and 8192 rows
