"""`lora-kernels bench --count`: memory traffic of LoRA on a GPU, ours beside PEFT's and others'.

Counted on meta tensors by `counter`, without a GPU: bytes, kernels, peak memory and FLOPs, no
timings. A case is one training step: a layer, a layer over a 4-bit base, a block of layers, a
language model's head, or the experts of a mixture. x and the adapters need gradients. Ours of
layers and blocks is what `fuse` makes of PEFT's modules; a layer that `fuse` leaves to PEFT is the
same in both calls. `peers` and `expert_peers` have the sequences of GEMMs of others. PEFT under
torch.compile is left out: its generated kernels fuse in ways that meta tensors do not show.

A row is one direction; a head's is the whole step. Ours loses a row if it exceeds a limit of the
case: `layer_limits`, `base_limits`, `block_limits` or `expert_limits`. A head has no limit. A
backward is judged with its forward (`table.count_calls`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends.decoder import FUSED_ROWS
from ..backends.eager import head
from ..layers import QLoRALinear
from ..ops.head import lora_linear_cross_entropy
from ..oracle import forms
from ..quantization import QuantizedWeight
from ..quantization.codebooks import E2M1_TYPES
from . import blocks, counter, expert_peers, peers
from .blocks import BLOCKS, RANK, Block, Cell, build_block, build_layer
from .experts import Shape
from .results import NESTED_NF4, Facts, Row, versions
from .table import Call, Counts, Entry, Limits, Suite, count_calls

ROWS = (1, 16, 512, 8192)  # M of layers
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # K, N
DROPOUTS = (0.0, 0.05)
BLOCK_ROWS = (1, 512, 8192)
TILED_ROWS, TILE_ROWS = (8192, 32768, 131072), 4096
HEAD = (8192, 4096, 128256)  # rows of a step, hidden size and vocabulary of Llama 3
EXPERTS = (
    Shape("mixtral", 8, 2, 4096, 14336),  # 8x7B
    Shape("qwen3_moe", 128, 8, 2048, 768),  # 30B-A3B
    Shape("gpt_oss", 32, 4, 2880, 2880),  # 20b
    Shape("olmoe", 64, 8, 2048, 1024),  # 1B-7B
    Shape("deepseek_v3", 256, 8, 7168, 2048),
    Shape("qwen3_moe", 8, 8, 2048, 768),  # smaller stacks; in the first, each token takes all
    Shape("qwen3_moe", 8, 2, 2048, 768),
    Shape("qwen3_moe", 32, 8, 2048, 768),
)
TOKENS = (512, 8192)
LAUNCH_BOUND_ROWS = 64  # up to here a layer is bound by launches, not by bandwidth
# CUDA's caching allocator reserves memory in blocks of 2 MiB at least: what differs by less takes
# the same memory of a card. Ours saves P, vectors of N and DoRA's norm in float32.
PEAK_UNIT = 2 << 20
KERNEL_BYTES = 6_000_000  # moved by an H100 in the 2 µs that a small kernel takes (estimate)
MASK_KERNELS = 8  # more for several dropout masks, see `allowed_kernels`
MOST_BYTES = 1.01  # the limit of ours, in bytes of a peer
# Forms of `oracle.forms` that are counted as bases: asymmetric W4A16, and 8 bits.
FORMS = "int4-128-half-shift", "int8-32-half"
LEFT = "left to PEFT"  # the strategy of a layer that `fuse` does not take
TILED = "tiled "  # before a title: rows of `mlp_tile_rows`
CHECKPOINTED = ", checkpointed"  # after a title: rows whose backward runs the forward again
EXPERTS_WORD = " experts "  # in each title of experts

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
CELLS = (
    Cell("bf16, bf16 adapters", _BF16, _BF16),
    Cell("bf16, fp32 adapters", _BF16, _F32),
    Cell("bf16, fp32 adapters, autocast", _BF16, _F32, autocast=True),
    Cell("fp16, fp16 adapters", _F16, _F16),
    Cell("fp16, fp32 adapters, autocast", _F16, _F32, autocast=True),
    Cell("NF4 bf16, bf16 adapters", _BF16, _BF16, "nf4"),
    Cell("NF4 bf16, fp32 adapters", _BF16, _F32, "nf4"),
    Cell("DoRA bf16, bf16 adapter", _BF16, _BF16, dora=True),
    Cell("DoRA bf16, fp32 adapter", _BF16, _F32, dora=True),
    Cell("NF4 DoRA bf16, bf16 adapter", _BF16, _BF16, "nf4", dora=True),
    Cell("NF4 DoRA bf16, fp32 adapter", _BF16, _F32, "nf4", dora=True),
    Cell("bf16, two bf16 adapters", _BF16, _BF16, adapters=2),
    Cell("bf16, two fp32 adapters", _BF16, _F32, adapters=2),
)

# ---- Calls ----


def step_call(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    module: nn.Module,
    is_checkpointed: bool = False,
) -> Call:
    """Return the call of a training step on meta.

    Args:
        function: computes y of the inputs.
        inputs: tensors whose gradients the step computes, beside those of the module's parameters.
        is_checkpointed: whether the backward computes the forward again, and nothing but the inputs
            is saved.
    """

    def forward() -> Any:
        if is_checkpointed:
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)

    adapters = [p for p in module.parameters() if p.requires_grad]
    return Call(forwards=[forward], leaves=[*inputs, *adapters])


def cell_call(
    module: nn.Module,
    cell: Cell,
    M: int,
    K: int,
    function: Callable[[Tensor], Any] | None = None,
    is_checkpointed: bool = False,
) -> Call:
    """Return the call of a training step with x [M, K].

    Args:
        module: a layer of `build_layer`, fused or not, or a module of such layers.
        cell: that of the layers.
        function: computes y in place of the module, from the module's parameters.
        is_checkpointed: as in `step_call`.
    """
    x = torch.empty(M, K, dtype=cell.x_dtype or cell.dtype, device="meta").requires_grad_()

    def run(x: Tensor) -> Any:
        with counter.autocast(cell.dtype) if cell.autocast else contextlib.nullcontext():
            return (function or module)(x)

    return step_call(run, [x], module, is_checkpointed)


def _entry(
    calls: dict[str, Call], limits: Limits, *, sizes: tuple[int, int, int, int], **key: Any
) -> Entry:
    """Return the entry of both directions of a step. sizes: M, K, N, R."""
    M, K, N, R = sizes
    modes = [("forward", None), ("backward", None)]
    return Entry(key=Row(**key, M=M, K=K, N=N, R=R), calls=calls, modes=modes, limits=limits)


# ---- Layers ----


def allowed_kernels(cell: Cell, dropout_p: float, counts: Counts) -> int:
    """Return the most kernels that ours may launch: PEFT's, and one for each KERNEL_BYTES saved.

    Several dropout masks allow MASK_KERNELS more: those of several adapters, or of a DoRA, whose
    base GEMM has a mask too.

    >>> from .counter import Traffic
    >>> ours, peft = Traffic(60_000_000, 0, 9, 0), Traffic(100_000_000, 0, 7, 0)
    >>> allowed_kernels(CELLS[0], 0.0, {"ours": ours, "peft": peft})
    13
    """
    ours, peft = counts["ours"], counts["peft"]
    has_several_masks = dropout_p > 0 and (cell.dora or cell.adapters > 1)
    allowed = peft.kernels + (peft.bytes - ours.bytes) // KERNEL_BYTES
    return allowed + MASK_KERNELS * has_several_masks


def layer_limits(
    cell: Cell, M: int, dropout_p: float, counts: Counts, mode: str
) -> dict[str, float]:
    """Return the most bytes, kernels and peak of ours: `allowed_kernels`, and PEFT's bytes and
    peak. Bytes are limited above LAUNCH_BOUND_ROWS rows of x."""
    peft = counts["peft"]
    return {
        "bytes": peft.bytes if M > LAUNCH_BOUND_ROWS else math.inf,
        "kernels": allowed_kernels(cell, dropout_p, counts),
        "peak": peft.peak + PEAK_UNIT,
    }


def layer_entries(
    cell: Cell,
    K: int,
    N: int,
    R: int,
    dropout_p: float = 0.0,
    Ms: Sequence[int] = ROWS,
    by_rule: bool = True,
) -> Iterator[Entry]:
    """Yield the entries of a cell at one shape and rank, one for each M.

    by_rule: whether `fuse` leaves the layer to PEFT if its rule says so.
    """
    from ..peft import fuse, heavier, swap
    from ..peft.linear import Fused

    layers = {name: build_layer(cell, K, N, R, dropout_p) for name in ("ours", "peft")}
    rule = heavier.heavier_reason if by_rule else lambda layer: None
    with mock.patch.object(swap, "heavier_reason", rule):
        fuse(nn.Sequential(layers["ours"]))
    for M in Ms:
        yield _entry(
            {name: cell_call(layer, cell, M, K) for name, layer in layers.items()},
            partial(layer_limits, cell, M, dropout_p),
            sizes=(M, K, N, R),
            dtype=cell.name,
            dropout_p=dropout_p,
            strategy=None if isinstance(layers["ours"], Fused) else LEFT,
        )


# ---- Other bases than NF4 ----


def base_limits(M: int, more: int, counts: Counts, mode: str) -> dict[str, float]:
    """Return what the layer over nested NF4 takes, and the bytes by which our weight is larger.

    Up to `FUSED_ROWS` rows of x there is no limit: bitsandbytes' GEMM of NF4 decodes inside.

    more: the bytes of our weight less those of nested NF4's. Each decoding reads it: one in a
        forward, two in a step.
    """
    if M <= FUSED_ROWS:
        return {}
    nf4, decodings = counts[NESTED_NF4], 1 if mode == "forward" else 2
    return {
        "bytes": nf4.bytes + decodings * max(0, more),
        "kernels": nf4.kernels,
        "peak": nf4.peak + PEAK_UNIT,
    }


def base_entries(quant_type: str, K: int, N: int, R: int) -> Iterator[Entry]:
    """Yield the entries of a `QLoRALinear` over MXFP4, NVFP4 or a form, one for each of `ROWS`.

    Beside it are the same over nested NF4, and PEFT's layer over the decoded weight.

    >>> last = [*base_entries("mxfp4", 64, 64, 8)][-1]
    >>> [row.moved["ours"] for row in count_calls(last)]
    [5526720, 7888064]
    """
    cell = Cell("bf16, bf16 adapters", _BF16, _BF16)
    kwargs: Any = {"dtype": _BF16, "lora_dtype": _BF16, "device": "meta"}
    is_form = forms.is_form(quant_type)
    if is_form:
        weight = forms.on_meta(N, K, quant_type, _BF16)
        ours = QLoRALinear.from_quantized(weight, R, lora_dtype=_BF16)
    else:
        ours = QLoRALinear(K, N, R, quant_type=quant_type, **kwargs)
    layers = {"ours": ours, NESTED_NF4: QLoRALinear(K, N, R, quant_type="nf4", **kwargs)}
    ours_bytes, nf4_bytes = (_decoded_bytes(layer.quantized) for layer in layers.values())
    layers |= {"peft": build_layer(cell, K, N, R)}
    for M in ROWS:
        yield _entry(
            {name: cell_call(layer, cell, M, K) for name, layer in layers.items()},
            partial(base_limits, M, ours_bytes - nf4_bytes),
            sizes=(M, K, N, R),
            what=f"base {quant_type if is_form else quant_type.upper()}",
            dtype=cell.name,
        )


def _decoded_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of the codes, scales and tables, which a decoding reads."""
    scales = weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset
    return sum(t.nbytes for t in (weight.packed, weight.code, *scales) if t is not None)


# ---- Blocks ----


def block_limits(counts: Counts, mode: str) -> dict[str, float]:
    """Return MOST_BYTES times the bytes of the best peer, and PEAK_UNIT above the lowest peak.

    Peers that overwrite x do not count. The peak is limited in the backward's row alone, which is
    judged as the whole step.
    """
    others = [traffic for name, traffic in counts.items() if name not in ("ours", peers.INPLACE)]
    limits = {"bytes": MOST_BYTES * min(traffic.bytes for traffic in others)}
    if mode == "backward":
        limits["peak"] = min(traffic.peak for traffic in others) + PEAK_UNIT
    return limits


def block_entries(
    block: Block, cell: Cell, R: int = RANK, Ms: Sequence[int] = BLOCK_ROWS
) -> Iterator[Entry]:
    """Yield the entries of a block of such layers: one for each M, and the last M checkpointed.

    Every call casts adapters of another dtype, ours by `cast_adapters`.

    >>> first = next(block_entries(Block("layer", 64, (64,)), CELLS[0], 8, [9]))
    >>> [row.kernels["axolotl"] for row in count_calls(first)]
    [3, 6]
    """
    from ..peft import fuse

    modules = {name: build_block(block, cell, R) for name in ("ours", "peft")}
    fuse(nn.Sequential(modules["ours"]), cast_adapters=True)
    projections = peers.projections_of(modules["peft"])
    functions: dict[str, Callable[[Tensor], Any] | None] = {"ours": None, "peft": None}
    # The peers' Functions want x in the base's dtype.
    for name, build in peers.FUNCTIONS.items() if cell.x_dtype is None else ():
        if name != peers.INPLACE or block.name != "layer":  # Unsloth's layer overwrites nothing
            functions[name] = build(block.name, projections)
    for M, is_checkpointed in [(M, False) for M in Ms] + [(Ms[-1], True)]:
        yield _entry(
            {
                name: cell_call(
                    modules.get(name, modules["peft"]), cell, M, block.K, function, is_checkpointed
                )
                for name, function in functions.items()
            },
            block_limits,
            sizes=(M, block.K, sum(block.Ns), R),
            what=block.title + CHECKPOINTED * is_checkpointed,
            dtype=cell.name,
        )


def tile_entries(
    cell: Cell, block: Block = BLOCKS[-1], Ms: Sequence[int] = TILED_ROWS, rows: int = TILE_ROWS
) -> Iterator[Entry]:
    """Yield the entries of a gated MLP in tiles of rows: each M, checkpointed and not.

    "ours" has `mlp_tile_rows`, "untiled" has none; "tiles" are `peers.Tiles` over PEFT's layers.
    """
    from ..peft import fuse

    modules = {name: build_block(block, cell) for name in ("ours", "untiled", "tiles")}
    fuse(nn.Sequential(modules["ours"]), cast_adapters=True, mlp_tile_rows=rows)
    fuse(nn.Sequential(modules["untiled"]), cast_adapters=True)
    functions = {"tiles": peers.tiled(modules["tiles"], rows)}
    for M, is_checkpointed in itertools.product(Ms, (False, True)):
        yield _entry(
            {
                name: cell_call(module, cell, M, block.K, functions.get(name), is_checkpointed)
                for name, module in modules.items()
            },
            _tile_limits,
            sizes=(M, block.K, sum(block.Ns), RANK),
            what=f"{TILED}{block.title}{CHECKPOINTED * is_checkpointed}",
            dtype=cell.name,
        )


def _tile_limits(counts: Counts, mode: str) -> dict[str, float]:
    """Return the other tiles' bytes and peak."""
    limits: dict[str, float] = {"bytes": counts["tiles"].bytes}
    if mode == "backward":
        limits["peak"] = counts["tiles"].peak
    return limits


# ---- A head with its loss ----


def head_entry(adapter_dtype: torch.dtype, R: int = RANK) -> Entry:
    """Return a training step of a head with its loss, in bfloat16: ours, PyTorch's ops, PEFT's.

    PyTorch computes the loss of PEFT's logits [M, V] in float32. "ours by PyTorch's ops" is ours on
    a device that does not run the Triton kernel.

    >>> list(head_entry(torch.bfloat16).calls)
    ['ours', "ours by PyTorch's ops", 'peft']
    """
    M, K, V = HEAD
    layer = build_layer(Cell("head", _BF16, adapter_dtype), K, V, R)
    A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    labels = torch.zeros(M, dtype=torch.int64, device="meta")

    def ours(reason: str | None, x: Tensor) -> Tensor:
        weight, scaling = layer.base_layer.weight, layer.scaling["default"]
        with mock.patch.dict(head.kernel_reasons, {("meta", None): reason}):
            return lora_linear_cross_entropy(x, weight, A, B, labels, scaling)

    def peft(x: Tensor) -> Tensor:
        return F.cross_entropy(layer(x).float(), labels)

    x = torch.empty(M, K, dtype=_BF16, device="meta", requires_grad=True)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": partial(ours, None),
        "ours by PyTorch's ops": partial(ours, "PyTorch's ops are counted"),
        "peft": peft,
    }
    dtype = f"bf16, {'bf16' if adapter_dtype == _BF16 else 'fp32'} adapter"
    return Entry(
        key=Row(what="head and loss", dtype=dtype, M=M, K=K, N=V, R=R),
        calls={name: step_call(function, [x], layer) for name, function in functions.items()},
        modes=[("step", None)],
    )


# ---- Experts of a mixture ----


def expert_limits(counts: Counts, mode: str) -> dict[str, float]:
    """Return MOST_BYTES times the fewest bytes of a peer that takes no more FLOPs than ours over
    the dense stack."""
    flops = counts["ours"].flops
    others = (traffic for name, traffic in counts.items() if not name.startswith("ours"))
    fewest = min((t.bytes for t in others if t.flops <= flops), default=math.inf)
    return {"bytes": MOST_BYTES * fewest}


def expert_call(
    name: str, shape: Shape, tokens: int, is_checkpointed: bool = False, layer: Any = None
) -> Call:
    """Return the call of a training step of experts, everything in bfloat16.

    Args:
        name: of `expert_peers.CALLS`.
        is_checkpointed: as in `step_call`.
        layer: of `expert_peers.build`; None to build it.
    """
    layer = expert_peers.build(name, shape) if layer is None else layer
    forward = expert_peers.forward_of(name, layer)
    x = torch.empty(tokens, shape.hidden, dtype=_BF16, device="meta", requires_grad=True)
    index = torch.empty(tokens, shape.top_k, dtype=torch.int64, device="meta")
    # The router takes the model's x, so its weights need a gradient.
    weights = torch.empty(tokens, shape.top_k, dtype=_BF16, device="meta", requires_grad=True)

    def run(x: Tensor, weights: Tensor) -> Any:
        return forward(x, index, weights)

    return step_call(run, [x, weights], layer, is_checkpointed)


def expert_entries(shape: Shape, tokens: int) -> Iterator[Entry]:
    """Yield the entries of experts, without and with checkpointing; NF4 only with bitsandbytes."""
    names = [name for name in expert_peers.CALLS if name != "ours, NF4" or _has_bitsandbytes()]
    layers = {name: expert_peers.build(name, shape) for name in names}
    sizes = f"{shape.hidden}→{shape.intermediate}"
    title = f"{shape.model}, {shape.experts}{EXPERTS_WORD}{sizes}, top {shape.top_k}"
    for is_checkpointed in (False, True):
        entry = _entry(
            {
                name: expert_call(name, shape, tokens, is_checkpointed, layer)
                for name, layer in layers.items()
            },
            expert_limits,
            sizes=(tokens, shape.hidden, shape.intermediate, RANK),
            what=title + CHECKPOINTED * is_checkpointed,
            dtype="bf16, bf16 adapters",
        )
        entry.measures = *entry.measures, "flops"
        yield entry


# ---- The table ----


def _has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """Yield the entries of the whole table; those over NF4 only with bitsandbytes."""
    shapes, has_bitsandbytes = [*itertools.product(SHAPES, args.ranks)], _has_bitsandbytes()
    for cell in CELLS:
        if cell.base != "nf4" or has_bitsandbytes:
            for dropout_p, ((K, N), R) in itertools.product(DROPOUTS, shapes):
                yield from layer_entries(cell, K, N, R, dropout_p)
    for quant_type, ((K, N), R) in itertools.product((*E2M1_TYPES, *FORMS), shapes):
        yield from base_entries(quant_type, K, N, R)
    for block, cell in itertools.product(BLOCKS, blocks.CELLS):
        if cell.base != "nf4" or has_bitsandbytes:
            yield from block_entries(block, cell)
    # Of the MLP in bfloat16, dense and NF4.
    for block, cell in itertools.product(BLOCKS[-1:], blocks.CELLS[:4:3]):
        if cell.base != "nf4" or has_bitsandbytes:
            yield from tile_entries(cell, block)
    yield from map(head_entry, (_BF16, _F32))
    if expert_peers.unavailable_reason() is None:
        for tokens, shape in itertools.product(TOKENS, EXPERTS):
            yield from expert_entries(shape, tokens)


def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
    """Yield the rows of the table."""
    for entry in entries(args):
        yield from count_calls(entry)


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield how many rows of each kind ours loses, and the range of the ratio of bytes."""
    layers = [row for row in rows if row.what is None]
    fused = [row.moved for row in layers if row.strategy != LEFT]
    ratios = sorted(moved["ours"] / moved["peft"] for moved in fused)
    yield (
        f"{_count_losses(layers, 'PEFT', ('bytes', 'kernels', 'peak'))}; `fuse` leaves "
        f"{len(layers) - len(fused)} to PEFT; bytes over PEFT's elsewhere: "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    )
    for block in BLOCKS:
        of_block = [row for row in rows if (row.what or "").startswith(block.title)]
        yield f"{block.title}: {_count_losses(of_block, 'the best peer', ('bytes', 'peak'))}"
    tiled = [row for row in rows if (row.what or "").startswith(TILED)]
    lost = _count_losses(tiled, "the peers' tiles", ("bytes", "peak"))
    yield f"tiles: {lost}"
    bases = [row for row in rows if (row.what or "").startswith("base ")]
    lost = _count_losses(bases, "nested NF4", ("bytes", "kernels", "peak"))
    yield f"bases other than NF4: {lost}"
    if (reason := expert_peers.unavailable_reason()) is not None:
        yield f"no experts: {reason}"
        return
    experts = [row for row in rows if EXPERTS_WORD in (row.what or "")]
    yield f"experts: {_count_losses(experts, 'a peer of no more FLOPs', ('bytes',))}"


def _count_losses(rows: list[Row], peer: str, measures: Sequence[str]) -> str:
    lost = [row.misses["ours"] for row in rows if row.misses]
    counts = (f"{sum(measure in text for text in lost)} in {measure}" for measure in measures)
    return f"{len(rows)} rows, ours loses {len(lost)} to {peer} ({', '.join(counts)})"


def provenance(args: argparse.Namespace) -> Facts:
    """Return the versions of the libraries that decide what kernels run."""
    return versions("torch", "peft", "bitsandbytes")


SUITE = Suite(
    kind="count",
    option="count",
    unused="device shapes model rows quick dtypes dropout seconds csv baseline",
    rows=rows,
    provenance=provenance,
    summary=summary,
)
