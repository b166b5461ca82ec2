"""The peers' Functions against PyTorch's gradients, and the blocks of `bench --count`."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from lora_kernels.bench import blocks, counter, peers, traffic
from lora_kernels.bench.blocks import BLOCKS, CELLS, Block, Cell, build_block
from lora_kernels.bench.command import has_failed
from lora_kernels.bench.counter import Kernel, Traffic, count
from lora_kernels.bench.peers import FUNCTIONS, INPLACE
from lora_kernels.bench.results import Row
from lora_kernels.bench.table import count_calls, exceeded_measures
from lora_kernels.bench.traffic import CHECKPOINTED
from lora_kernels.quantization.weight import quantize_4bit

pytest.importorskip("peft")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
M, K, H, R = 7, 24, 40, 3
OUT = {"layer": (H,), "qkv": (K, 8, 16), "mlp": (H, H)}  # out-features of the projections of x


def projections(block: str, dtype: torch.dtype = F64) -> list[peers.Projection]:
    """Random projections of a small block; each has a scaling of its own."""
    sizes = [(N, K) for N in OUT[block]] + [(K, H)] * (block == "mlp")
    return [
        peers.Projection(
            torch.randn(rows, columns, dtype=dtype),
            torch.randn(R, columns, dtype=dtype, requires_grad=True),
            torch.randn(rows, R, dtype=dtype, requires_grad=True),
            0.5 + i,
        )
        for i, (rows, columns) in enumerate(sizes)
    ]


def composed(block: str, projections: Sequence[peers.Projection], x: Tensor) -> tuple[Tensor, ...]:
    """The block as one writes it first."""

    def project(x: Tensor, p: peers.Projection) -> Tensor:
        assert isinstance(p.weight, Tensor)
        return x @ p.weight.t() + p.scaling * (x @ p.lora_A.t()) @ p.lora_B.t()

    if block != "mlp":
        return tuple(project(x, p) for p in projections)
    gate, up, down = projections
    return (project(F.silu(project(x, gate)) * project(x, up), down),)


def outputs_and_gradients(
    ys: Any, x: Tensor, projections: Sequence[peers.Projection]
) -> list[Tensor]:
    """y, then the gradients of x and of each A and B for one random dy of each y."""
    ys = (ys,) if isinstance(ys, Tensor) else ys
    generator = torch.Generator().manual_seed(0)
    dys = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in ys]
    wanted = [x, *(t for p in projections for t in (p.lora_A, p.lora_B))]
    copies = [y.detach().clone() for y in ys]
    return [*copies, *torch.autograd.grad(ys, wanted, dys)]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("block", OUT)
def test_function_of_peer_equals_pytorch_in_float64(block: str, name: str) -> None:
    torch.manual_seed(1)
    parts, x = projections(block), torch.randn(M, K, dtype=F64, requires_grad=True)
    want = outputs_and_gradients(composed(block, parts, x), x, parts)
    call = FUNCTIONS[name](block, parts)
    before = x.detach().clone()
    got = outputs_and_gradients(call(x), x, parts)
    for each, expected in zip(got, want, strict=True):
        # 40 terms of order 1 a GEMM; three GEMMs after another.
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before) == (name != INPLACE)
    if name == INPLACE:
        dx = got[len(got) - 1 - 2 * len(parts)]
        assert dx.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("block", OUT)
def test_function_of_peer_decodes_4bit_weights_in_both_directions(block: str) -> None:
    """bitsandbytes' CPU ops; the same GEMMs as over the decoded weights."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    dense, packed = [], []
    for p in projections(block, F32):
        assert isinstance(p.weight, Tensor)
        codes = quantize_4bit(p.weight, "nf4", blocksize=64).codes
        decoded = peers.bitsandbytes_dense(codes, p.weight.shape, F32)  # type: ignore[arg-type]
        assert 0 < (decoded - p.weight).abs().max() < 1
        dense.append(p._replace(weight=decoded))
        packed.append(p._replace(weight=codes))
    x = torch.randn(M, K, requires_grad=True)
    for name in ("unsloth", "axolotl", "addmm"):
        build = FUNCTIONS[name]
        got = outputs_and_gradients(build(block, packed)(x), x, packed)
        want = outputs_and_gradients(build(block, dense)(x), x, dense)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["unsloth", "axolotl", "addmm"])
@pytest.mark.parametrize("block", OUT)
def test_function_of_peer_casts_float32_adapters_and_their_gradients(block: str, name: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(M, K).to(BF16).requires_grad_()
    narrow = projections(block, BF16)
    wide = [
        p._replace(
            lora_A=p.lora_A.detach().float().requires_grad_(),
            lora_B=p.lora_B.detach().float().requires_grad_(),
        )
        for p in narrow
    ]
    got, want = (
        outputs_and_gradients(FUNCTIONS[name](block, parts)(x), x, parts)
        for parts in (wide, narrow)
    )
    assert [t.dtype for t in got[-2 * len(wide) :]] == [F32] * 2 * len(wide)
    assert all(torch.equal(a.to(BF16), b) for a, b in zip(got, want, strict=True))


def test_functions_that_overwrite_refuse_a_second_backward() -> None:
    torch.manual_seed(4)
    parts, x = projections("mlp"), torch.randn(M, K, dtype=F64, requires_grad=True)
    y = FUNCTIONS["axolotl"]("mlp", parts)(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_silu_mul_and_its_backward_are_one_kernel_each() -> None:
    g, u, dh = (torch.empty(M, K, device="meta") for _ in range(3))
    log: list[Kernel] = []
    found = count(lambda: (peers.silu_mul(g, u), peers.silu_mul_backward_(dh, g, u)), log)
    a_pass = 4 * M * K
    assert [(kernel.read, kernel.written) for kernel in log] == [
        (2 * a_pass, a_pass),
        (3 * a_pass, 3 * a_pass),
    ]
    assert found.peak == a_pass


def block_rows(*args: Any) -> list[Row]:
    return [row for entry in traffic.block_entries(*args) for row in count_calls(entry)]


# ---- The rule ----

PEERS = {"peft": Traffic(900, 100, 9, 50), "axolotl": Traffic(1000, 1000, 7, 40)}
OVERWRITING = {INPLACE: Traffic(10, 10, 1, 10)}
MIB2 = 2 << 20
RULE: list[tuple[Traffic, list[str]]] = [
    (Traffic(1010, 0, 99, 40), []),
    (Traffic(1011, 0, 9, 40), ["bytes"]),
    (Traffic(1000, 0, 9, 40 + MIB2), []),
    (Traffic(1000, 0, 9, 41 + MIB2), ["peak"]),
    (Traffic(1000, 11, 9, 51 + MIB2), ["bytes", "peak"]),
]


@pytest.mark.parametrize(("ours", "want"), RULE)
def test_losses_against_the_best_peer_of_each_measure(ours: Traffic, want: list[str]) -> None:
    counts = {"ours": ours, **PEERS, **OVERWRITING}
    assert exceeded_measures(ours, traffic.block_limits(counts, "backward")) == want
    assert "peak" not in traffic.block_limits(counts, "forward")


def test_losses_of_a_backward_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours saves 1 % in the forward, and moves 3 % more in one backward, 4 % more in the other."""
    peer = Traffic(1000, 0, 7, 0)
    for read, want in ((1030, []), (1040, ["bytes"])):
        ours = peer._replace(read=990), peer._replace(read=read)
        counts = itertools.chain([ours], itertools.repeat((peer, peer)))
        monkeypatch.setattr(counter, "count_layer", lambda *args, counts=counts: next(counts))
        entry = next(traffic.block_entries(Block("layer", 64, (64,)), CELLS[0], 4, [512]))
        forward, backward = count_calls(entry)
        assert forward.misses == {}
        assert backward.misses == ({"ours": ", ".join(want)} if want else {})


ROW = Row(
    what="qkv 2→3+3",
    dtype="bf16, bf16 adapters",
    **dict(zip("MKNR", (9, 2, 6, 4), strict=True)),
    mode="backward",
    moved={"ours": 3_000_000, "peft": 2_000_000},
    kernels={"ours": 9, "peft": 7},
    peak_bytes={"ours": 1 << 20, "peft": 5 << 18},
    misses={"ours": "bytes"},
)


def test_row_of_a_loss_is_marked_and_fails() -> None:
    assert str(ROW).splitlines() == [
        "qkv 2→3+3 bf16, bf16 adapters 9×2×6 r=4 backward, over peft",
        "        ratio MB moved kernels MiB peak",
        "ours  1.500 ✗     3.00       9        1",
        "peft    1.000     2.00       7     1.25",
        "✗ ours: bytes",
    ]
    left = str(replace(ROW, strategy=traffic.LEFT, misses={})).splitlines()
    assert left[1] == "ours: left to PEFT" and "✗" not in left[3]
    assert has_failed([ROW])
    assert not has_failed([replace(ROW, misses={})])


# ---- Small sizes ----

SMALL = (
    Block("layer", 128, (64,)),
    Block("qkv", 128, (128, 64, 64)),
    Block("mlp", 128, (256,) * 2),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("block", SMALL, ids=lambda block: block.name)
def test_count_block_every_cell_is_counted(block: Block, cell: Cell) -> None:
    if cell.base == "nf4":
        pytest.importorskip("bitsandbytes")
    rows = block_rows(block, cell, 4, [96])
    assert [(row.M, row.mode) for row in rows] == [(96, "forward"), (96, "backward")] * 2
    assert [row.what for row in rows] == [block.title] * 2 + [block.title + CHECKPOINTED] * 2
    names = {"ours", "peft"}
    if cell.x_dtype is None:
        names |= FUNCTIONS.keys() - ({INPLACE} if block.name == "layer" else set())
    for row in rows:
        assert row.moved.keys() == row.kernels.keys() == row.peak_bytes.keys() == names
        assert min(row.moved.values()) > 2 * row.M * block.K
        assert row.moved["ours"] != row.moved["peft"]  # not PEFT's under another name
    first, again = (rows[i + 1].moved for i in (0, 2))
    assert all(again[name] > first[name] for name in names)  # a backward with a forward


def test_block_is_what_fuse_sees_in_a_model() -> None:
    """transformers' LlamaMLP with PEFT's layers; q, k and v under one parent, called with one x."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp, qkv = (build_block(block, CELLS[0], 4) for block in SMALL[:0:-1])
    assert isinstance(mlp, LlamaMLP) and mlp.training
    assert [name for name, _ in qkv.named_children()] == ["q_proj", "k_proj", "v_proj"]
    for module in (mlp, qkv):
        found = peers.projections_of(module)
        assert len(found) == 3 and all(p.scaling == 2.0 and p.lora_A.requires_grad for p in found)
        own = {id(p) for p in module.parameters()}
        assert all(id(t) in own for p in found for t in (p.weight, p.lora_A, p.lora_B))


def test_bench_count_has_rows_of_blocks_and_heads(
    monkeypatch: pytest.MonkeyPatch, run: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(traffic, "SHAPES", ((128, 256),))
    monkeypatch.setattr(traffic, "CELLS", traffic.CELLS[:1])
    monkeypatch.setattr(traffic, "BLOCKS", SMALL)
    monkeypatch.setattr(blocks, "CELLS", CELLS[:1])
    monkeypatch.setattr(traffic, "EXPERTS", traffic.EXPERTS[6:7])
    monkeypatch.setattr(traffic, "TOKENS", (1,))
    monkeypatch.setattr(traffic, "HEAD", (64, 128, 512))
    ran = run("--count")
    *found, narrow, wide, forward, backward, _, again = (r for r in ran.rows if "what" in r)
    assert forward["what"] == backward["what"] == "qwen3_moe, 8 experts 2048→768, top 2"
    assert again["what"] == f"{forward['what']}, checkpointed"
    bases = [row for row in found if row["what"].startswith("base ")]
    tiled = [row for row in found if row["what"].startswith(traffic.TILED)]
    found = found[len(bases) : -len(tiled)]
    assert {row["what"].removeprefix("base ") for row in bases} == {
        "MXFP4",
        "NVFP4",
        *traffic.FORMS,
    }
    assert len(found) == 2 * len(SMALL) * (len(traffic.BLOCK_ROWS) + 1)
    assert len(tiled) == 2 * 2 * len(traffic.TILED_ROWS)
    assert narrow["what"] == wide["what"] == "head and loss" and narrow["moved"] != wide["moved"]
    assert ran.status == any(row["misses"] for row in ran.rows)
    assert "\nmlp 128→256→128: 8 rows, ours loses " in ran.out
    table = report.table(report.block_head(), report.block_rows(found))
    lines = table.splitlines()
    assert len(lines) == 2 + 2 * len(SMALL) and lines[2].endswith(" | – |")
    assert lines[6].startswith("| gated MLP, 128→256→128 | bf16, bf16 adapters | ")
    file = tmp_path / "traffic.json"
    file.write_text(json.dumps({"count": ran.data}))
    monkeypatch.setattr(report, "JSON_TRAFFIC", file)
    page = report.render("RESULTS.md.j2", report.runs())
    assert table in page and "| qwen3_moe, 8 experts 2048→768, top 2, checkpointed | 1 | " in page


# ---- Full size: M = 8192, bf16 ----


@functools.cache
def step(block: str, cell: str) -> dict[str, Traffic]:
    """Forward and backward together, of ours and each peer."""
    sizes = next(each for each in BLOCKS if each.name == block)
    kind = next(each for each in CELLS if each.name == cell)
    forward, backward = count_calls(next(traffic.block_entries(sizes, kind, Ms=[8192])))
    return {
        name: Traffic(
            forward.moved[name] + backward.moved[name],
            0,
            forward.kernels[name] + backward.kernels[name],
            max(forward.peak_bytes[name], backward.peak_bytes[name]),
        )
        for name in forward.moved
    }


# Passes over x, dx or the MLP's y (4096 columns), over all y of q/k/v or one of the MLP's wide
# tensors, and over the weights; kernels; of the peak, passes over the two.
# A projection: x·Wᵀ, P and addmm_ take 2 passes over x and 3 over y. Its gradients: dS, dA, P, dB
# take 2 over x and 2 over dY; dx takes 1 or 2 over dx, 1 over dY, 2 more over dx, and 1 over dY for
# a second dS. The MLP: 3 for h, 6 for the backward of that, and dh instead of the last dx. addmm:
# without P in the backward, with 2 sums of dx (3 each); 5 for h and 9 for its backward, dh's 3
# among those of `down`.
DERIVED: dict[tuple[str, str], tuple[tuple[int, int, int], int, tuple[int, int]]] = {
    ("layer", "unsloth"): ((7, 7, 2), 10, (1, 1)),
    ("layer", "axolotl"): ((7, 6, 2), 9, (1, 1)),
    ("layer", "addmm"): ((6, 6, 2), 8, (1, 1)),
    ("layer", "ours"): ((6, 6, 2), 8, (1, 1)),
    ("layer", "peft"): ((8, 12, 2), 12, (1, 2)),
    ("qkv", "unsloth"): ((23, 7, 2), 30, (1, 1)),
    ("qkv", INPLACE): ((23, 7, 2), 30, (0, 1)),
    ("qkv", "axolotl"): ((23, 6, 2), 27, (1, 1)),
    ("qkv", "addmm"): ((24, 6, 2), 26, (2, 1)),
    ("mlp", "unsloth"): ((22, 30, 2), 32, (2, 3)),
    ("mlp", INPLACE): ((22, 30, 2), 32, (1, 3)),
    ("mlp", "axolotl"): ((22, 28, 2), 30, (2, 3)),
    ("mlp", "addmm"): ((21, 32, 2), 30, (1, 6)),
}
X = 2 * 8192 * 4096
WIDE = {"layer": X, "qkv": 2 * 8192 * 6144, "mlp": 2 * 8192 * 14336}
WEIGHTS = {"layer": 2 * 4096 * 4096, "qkv": 2 * 4096 * 6144, "mlp": 6 * 4096 * 14336}


@pytest.mark.parametrize(("at", "want"), DERIVED.items(), ids=lambda at: "-".join(map(str, at)))
def test_count_block_at_full_size_is_what_was_derived(
    at: tuple[str, str], want: tuple[tuple[int, int, int], int, tuple[int, int]]
) -> None:
    """The rest, adapters and [M, R], is at most a quarter of a pass over x."""
    block, name = at
    (x, wide, weights), kernels, (x_peak, wide_peak) = want
    found = step(block, CELLS[0].name)[name]
    derived = x * X + wide * WIDE[block] + weights * WEIGHTS[block]
    assert found.kernels == kernels
    assert 0 < found.bytes - derived < 0.25 * X
    assert 0 < found.peak - (x_peak * X + wide_peak * WIDE[block]) < 0.05 * X


def test_count_block_at_full_size_4bit_adds_two_decodes_of_each_weight() -> None:
    """A decode reads half a byte and writes two; a 64th of the codes has a scale, which 3 kernels
    read and write in 1 + 4, 4 + 4 and 4 bytes, and Unsloth's one reads in 1."""
    pytest.importorskip("bitsandbytes")
    for block, projections in (("layer", 1), ("qkv", 3), ("mlp", 3)):
        dense, packed = (step(block, CELLS[i].name) for i in (0, 3))
        for name in ("unsloth", "axolotl", "addmm"):
            kernels, of_scales = (1, 1) if name == "unsloth" else (3, 17)
            assert packed[name].kernels - dense[name].kernels == 2 * kernels * projections
            extra = packed[name].bytes - dense[name].bytes
            want = 2 * WEIGHTS[block] / 2 * (2.5 + of_scales / 64)
            assert extra == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_fuse_at_full_size_loses_no_row(block: Block, cell: Cell) -> None:
    if cell.base == "nf4":
        pytest.importorskip("bitsandbytes")
    for row in block_rows(block, cell):
        assert not row.misses, str(row)
