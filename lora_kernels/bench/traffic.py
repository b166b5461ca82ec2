"""`lora-kernels bench --count`: memory traffic of a LoRA layer on a GPU, ours beside PEFT's.

Counted on meta tensors by `counter`, without a GPU: bytes, kernels and peak memory, no timings.
Ours is PEFT's layer after `fuse`, the peer the same layer before. Both are in training mode, and x
and the adapters need gradients. A row is one direction of one layer. Before every count the
versions of the adapters change, as in an optimizer's step. A call before the first count fills what
the process caches. A layer that `fuse` leaves to PEFT is the same twice.

A forward is judged by itself, a backward with its forward: a step is what a user pays for. Ours
loses a row where it moves more bytes with more than `FEW_ROWS` rows of x, launches more kernels
than `allowed_kernels`, or takes a peak that is higher by more than `PEAK_UNIT`. PEFT under
torch.compile is left out: its generated kernels fuse in ways that meta tensors do not show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends.decode4bit import FUSED_ROWS
from ..layers import QLoRALinear
from ..quantization import Weight4bit
from . import baselines, counter
from .counter import Kernel, Traffic
from .results import NESTED_NF4, Row

ROWS = (1, 16, 512, 8192)  # M
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # K, N
DROPOUTS = (0.0, 0.05)
FEW_ROWS = 64  # up to here a layer is bound by launches, not by bandwidth
# CUDA's caching allocator reserves memory in blocks of 2 MiB at least: what differs by less takes
# the same memory of a card. Ours keeps P, a few vectors of N and DoRA's norm in float32.
PEAK_UNIT = 2 << 20
KERNEL_BYTES = 6_000_000  # moved by an H100 in the 2 µs that a small kernel takes (estimate)
MASK_KERNELS = 8  # see `allowed_kernels`
DIRECTIONS = "forward", "backward"
LEFT = "left to PEFT"  # the strategy of a layer that `fuse` does not take


class Cell(NamedTuple):
    """A kind of layer.

    Args:
        name: in the table.
        dtype: of x and of the base; with a 4-bit base, of x and its compute dtype.
        adapter_dtype: of lora_A, lora_B and DoRA's magnitude.
        base: "dense" or "nf4" (nested scales, blocks of 64).
        autocast: whether the forward runs under autocast to `dtype`.
        dora: whether the adapter is a DoRA.
        adapters: how many are active.
        x_dtype: of x, if it is another than `dtype`.
    """

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    base: str = "dense"
    autocast: bool = False
    dora: bool = False
    adapters: int = 1
    x_dtype: torch.dtype | None = None


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


def allowed_kernels(cell: Cell, dropout_p: float, ours: Traffic, peft: Traffic) -> int:
    """Return the most kernels that ours may launch: PEFT's, and one for each KERNEL_BYTES saved.

    MASK_KERNELS more if each adapter, or a DoRA's base GEMM too, has a mask.

    >>> allowed_kernels(CELLS[0], 0.0, Traffic(60_000_000, 0, 9, 0), Traffic(100_000_000, 0, 7, 0))
    13
    """
    has_masks = dropout_p > 0 and (cell.dora or cell.adapters > 1)
    return peft.kernels + (peft.bytes - ours.bytes) // KERNEL_BYTES + MASK_KERNELS * has_masks


def losses(cell: Cell, M: int, dropout_p: float, ours: Traffic, peft: Traffic) -> list[str]:
    """Return the measures in which ours loses.

    ours, peft: of a forward, or of a forward and its backward together.

    >>> losses(CELLS[0], 512, 0.0, Traffic(60, 0, 9, 4 << 20), Traffic(100, 0, 7, 1 << 20))
    ['kernels', 'peak']
    """
    lost = {
        "bytes": M > FEW_ROWS and ours.bytes > peft.bytes,
        "kernels": ours.kernels > allowed_kernels(cell, dropout_p, ours, peft),
        "peak": ours.peak > peft.peak + PEAK_UNIT,
    }
    return [name for name in lost if lost[name]]


def both(first: Traffic, second: Traffic) -> Traffic:
    """Return the traffic of one call after the other."""
    read, written, kernels = (a + b for a, b in zip(first[:3], second[:3], strict=True))
    peak = max(first.peak, second.peak)
    return Traffic(read, written, kernels, peak, first.flops + second.flops)


def stock(cell: Cell, K: int, N: int, R: int, dropout_p: float = 0.0, device: str = "meta") -> Any:
    """Build PEFT's layer of a cell, in training mode; alpha = 2·R."""
    base: Any = nn.Linear(K, N, bias=False, device=device, dtype=cell.dtype)
    if cell.base == "nf4":
        base = baselines.linear_4bit(base, "nf4")
    # PEFT's DoRA copies a 4-bit base, which bitsandbytes cannot on meta.
    with mock.patch("peft.tuners.lora.dora.deepcopy", lambda layer: layer):
        return baselines.peft_layer(
            base,
            [R] * cell.adapters,
            adapter_dtype=cell.adapter_dtype,
            lora_dropout=dropout_p,
            use_dora=cell.dora,
        )


def count_rows(
    steps: Mapping[str, tuple[Traffic, Traffic]],
    judge: Callable[[dict[str, Traffic], str], list[str]],
    **key: Any,
) -> Iterator[Row]:
    """Yield the rows of a training step: of its forward, and of its backward.

    Args:
        steps: forward and backward of each call.
        judge: returns the measures in which ours loses, from the counts of each call and the
            direction; beside the backward these are of both directions together.
        key: the fields that name the row.
    """
    whole = {name: both(*step) for name, step in steps.items()}
    for i, direction in enumerate(DIRECTIONS):
        counts = {name: step[i] for name, step in steps.items()}
        lost = judge(whole if i else counts, direction)
        yield count_row(counts, lost, mode=direction, **key)


def count_row(counts: Mapping[str, Traffic], lost: Sequence[str] = (), **key: Any) -> Row:
    """Return the row of what was counted of each call.

    lost: the measures in which ours loses.
    """
    return Row(
        **key,
        moved={name: t.bytes for name, t in counts.items()},
        kernels={name: t.kernels for name, t in counts.items()},
        peak_bytes={name: t.peak for name, t in counts.items()},
        misses={"ours": ", ".join(lost)} if lost else {},
    )


def count_cell(
    cell: Cell,
    K: int,
    N: int,
    R: int,
    dropout_p: float = 0.0,
    Ms: Sequence[int] = ROWS,
    by_rule: bool = True,
) -> Iterator[Row]:
    """Yield the rows of a cell at one shape and rank: both directions for each M.

    by_rule: whether `fuse` leaves the layer to PEFT if its rule says so.

    >>> [row.moved["peft"] for row in count_cell(CELLS[0], 64, 64, 8, Ms=[32])]
    [48128, 59392]
    """
    from ..peft import eligibility, fuse, swap
    from ..peft.linear import Fused

    layer = stock(cell, K, N, R, dropout_p)

    def count() -> list[tuple[Traffic, Traffic]]:
        count_step(layer, cell, Ms[0], K)
        return [count_step(layer, cell, M, K) for M in Ms]

    peft = count()
    rule = eligibility.heavier_reason if by_rule else lambda layer: None
    with mock.patch.object(swap, "heavier_reason", rule):
        fuse(nn.Sequential(layer))
    ours = count()
    left = None if isinstance(layer, Fused) else LEFT
    for M, mine, theirs in zip(Ms, ours, peft, strict=True):
        yield from count_rows(
            {"ours": mine, "peft": theirs},
            lambda counts, _, M=M: losses(cell, M, dropout_p, **counts),  # type: ignore[misc]
            **{"dtype": cell.name, "M": M, "K": K, "N": N, "R": R, "dropout_p": dropout_p},
            strategy=left,
        )


def count_base(quant_type: str, K: int, N: int, R: int) -> Iterator[Row]:
    """Yield the rows of a `QLoRALinear` over MXFP4 or NVFP4: both directions for each of `ROWS`.

    Beside it are the same over nested NF4, and PEFT's layer over the decoded weight. Ours loses
    where it moves more bytes than over NF4 and the scales that it reads more, launches more kernels
    or takes a peak that is higher by more than `PEAK_UNIT`. Rows up to `FUSED_ROWS` are not judged:
    bitsandbytes' GEMM of NF4 decodes inside.

    >>> [row.moved["ours"] for row in count_base("mxfp4", 64, 64, 8)][-2:]
    [5526720, 7888064]
    """
    cell = Cell("bf16, bf16 adapters", _BF16, _BF16)
    on: Any = {"dtype": _BF16, "lora_dtype": _BF16, "device": "meta"}
    layers = {
        name: QLoRALinear(K, N, R, quant_type=kind, **on)
        for name, kind in (("ours", quant_type), (NESTED_NF4, "nf4"))
    }
    scales = [sum(t.nbytes for t in _scales(layer.weight4bit)) for layer in layers.values()]
    layers |= {"peft": stock(cell, K, N, R)}
    for M in ROWS:
        steps = {name: count_step(layer, cell, M, K) for name, layer in layers.items()}

        def judge(counts: dict[str, Traffic], direction: str, M: int = M) -> list[str]:
            ours, nf4 = counts["ours"], counts[NESTED_NF4]
            decodings = 1 if direction == DIRECTIONS[0] else 2  # a step decodes in both directions
            allowed = nf4.bytes + decodings * max(0, scales[0] - scales[1])
            lost = {
                "bytes": ours.bytes > allowed,
                "kernels": ours.kernels > nf4.kernels,
                "peak": ours.peak > nf4.peak + PEAK_UNIT,
            }
            return [name for name in lost if lost[name] and M > FUSED_ROWS]

        what = f"base {quant_type.upper()}"
        key = {"what": what, "dtype": cell.name, "M": M, "K": K, "N": N, "R": R}
        yield from count_rows(steps, judge, **key)


def _scales(weight: Weight4bit) -> list[Tensor]:
    """Return what scales are decoded from."""
    found = weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset
    return [t for t in found if t is not None]


def count_step(
    layer: nn.Module,
    cell: Cell,
    M: int,
    K: int,
    log: list[Kernel] | None = None,
    call: Callable[[Tensor], Any] | None = None,
    is_checkpointed: bool = False,
) -> tuple[Traffic, Traffic]:
    """Count forward and backward of one training step with x [M, K].

    Args:
        layer: of `stock`, fused or not, or a module of such layers.
        cell: the layer's.
        log: as `counter.count_layer`'s.
        call: computes y with the layer's parameters in place of the layer.
        is_checkpointed: whether the backward computes the forward again, and nothing but x is kept.
    """
    x = torch.empty(M, K, dtype=cell.x_dtype or cell.dtype, device="meta").requires_grad_()
    adapters = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in adapters:
            p.add_(0.0)  # a new version, for which nothing is cached

    def run(x: Tensor) -> Any:
        with counter.autocast(cell.dtype) if cell.autocast else contextlib.nullcontext():
            return (call or layer)(x)

    def forward() -> Any:
        if is_checkpointed:
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return run(x)

    return counter.count_layer(forward, [x, *adapters], log)
