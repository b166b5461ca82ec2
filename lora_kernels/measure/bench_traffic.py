"""`lora-kernels bench --count`: memory traffic of a LoRA layer on a GPU, ours beside PEFT's.

Counted on meta tensors by `traffic`, without a GPU: bytes, kernels and peak memory, no timings.
Ours is PEFT's layer after `fuse`, the peer the same layer before. Both are in training mode, and x
and the adapters need gradients. A row is one direction of one layer. Before every count the
versions of the adapters change, as in an optimizer's step. A call before the first count fills what
the process caches.

Ours loses a row where it moves more bytes, takes a peak that is higher by more than `PEAK_UNIT`, or
launches more kernels than `allowed_kernels`. PEFT under torch.compile is left out: its generated
kernels fuse in ways that meta tensors do not show.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import __version__, traffic
from .. import device as devices
from ..traffic import Traffic

ROWS = (1, 16, 512, 8192)  # M
SHAPES = ((4096, 4096), (4096, 14336))  # K, N
RANKS = (8, 16, 64)
DROPOUTS = (0.0, 0.05)
FEW_ROWS = 64  # up to here a layer is bound by launches, not by bandwidth
# CUDA's caching allocator reserves memory in blocks of 2 MiB at least: what differs by less takes
# the same memory of a card. Ours keeps P, a few vectors of N and DoRA's norm in float32.
PEAK_UNIT = 2 << 20
EXTRA_KERNELS, LESS_BYTES = 8, 0.7  # see `allowed_kernels`
SAVED_BYTES = 48 << 20  # moved by an H100 in the 16 µs that as many small kernels take (estimate)
MEASURES = ("bytes", "kernels", "peak")


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
    """

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    base: str = "dense"
    autocast: bool = False
    dora: bool = False
    adapters: int = 1

    @property
    def dropouts(self) -> tuple[float, ...]:
        """The dropout probabilities of its rows."""
        return DROPOUTS if self.adapters == 1 and not self.dora else (0.0,)

    @property
    def has_fp32_gemms(self) -> bool:
        """True if PEFT multiplies in float32: float32 adapters without autocast."""
        return self.adapter_dtype is torch.float32 and not self.autocast


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
    Cell("bf16, two bf16 adapters", _BF16, _BF16, adapters=2),
    Cell("bf16, two fp32 adapters", _BF16, _F32, adapters=2),
)


def allowed_kernels(cell: Cell, M: int, ours: Traffic, peft: Traffic) -> int:
    """Return the most kernels that ours may launch: PEFT's number.

    With float32 GEMMs in PEFT's and more than FEW_ROWS rows, EXTRA_KERNELS more if ours moves at
    most LESS_BYTES of PEFT's bytes, or SAVED_BYTES fewer.

    >>> ours, peft = Traffic(60, 0, 9, 0), Traffic(100, 0, 7, 0)
    >>> allowed_kernels(CELLS[0], 512, ours, peft), allowed_kernels(CELLS[1], 512, ours, peft)
    (7, 15)
    """
    pays = ours.bytes <= LESS_BYTES * peft.bytes or ours.bytes <= peft.bytes - SAVED_BYTES
    if cell.has_fp32_gemms and M > FEW_ROWS and pays:
        return peft.kernels + EXTRA_KERNELS
    return peft.kernels


def losses(cell: Cell, M: int, ours: Traffic, peft: Traffic) -> list[str]:
    """Return the measures in which ours loses.

    >>> losses(CELLS[0], 512, Traffic(60, 0, 9, 4 << 20), Traffic(100, 0, 7, 1 << 20))
    ['kernels', 'peak']
    """
    lost = {
        "bytes": ours.bytes > peft.bytes,
        "kernels": ours.kernels > allowed_kernels(cell, M, ours, peft),
        "peak": ours.peak > peft.peak + PEAK_UNIT,
    }
    return [name for name in MEASURES if lost[name]]


def stock(cell: Cell, K: int, N: int, R: int, dropout_p: float = 0.0) -> Any:
    """Build PEFT's layer of a cell on meta, in training mode; alpha = 2·R."""
    from peft import LoraConfig, get_peft_model

    base = _linear_4bit(cell, K, N) if cell.base == "nf4" else _linear(cell, K, N)
    model: Any = nn.Sequential(base)
    model.is_loaded_in_4bit = cell.base == "nf4"  # as transformers marks a model
    config = LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=dropout_p, use_dora=cell.dora, target_modules=["0"]
    )
    names = ["default", *(f"adapter {i}" for i in range(1, cell.adapters))]
    model = get_peft_model(model, config).train()
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, child in layer.named_children():
        if name.startswith("lora_"):  # PEFT makes some of them on the CPU
            child.to(device="meta", dtype=cell.adapter_dtype)
    layer.set_adapter(names)
    return layer


def _linear(cell: Cell, K: int, N: int) -> nn.Module:
    return nn.Linear(K, N, bias=False, device="meta", dtype=cell.dtype)


def _linear_4bit(cell: Cell, K: int, N: int) -> nn.Module:
    """Build bitsandbytes' layer as if it had quantized a weight [N, K] to nested NF4."""
    import bitsandbytes

    bnb: Any = bitsandbytes
    blocks = -(-N * K // 64)
    nested = bnb.functional.QuantState(
        absmax=_on_meta(-(-blocks // 256)), code=_on_meta(256), blocksize=256, dtype=_F32
    )
    state = bnb.functional.QuantState(
        absmax=_on_meta(blocks, dtype=torch.uint8), shape=torch.Size((N, K)), code=_on_meta(16),
        blocksize=64, quant_type="nf4", dtype=cell.dtype, offset=_on_meta(), state2=nested,
    )  # fmt: skip
    linear = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=cell.dtype, quant_type="nf4", device="meta"
    )
    linear.weight = bnb.nn.Params4bit(
        _on_meta(-(-N * K // 2), 1, dtype=torch.uint8), requires_grad=False, quant_state=state,
        blocksize=64, quant_type="nf4", bnb_quantized=True, module=linear,
    )  # fmt: skip
    linear.quant_state = state
    return linear  # type: ignore[no-any-return]


def _on_meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def count_cell(
    cell: Cell, K: int, N: int, R: int, dropout_p: float = 0.0, Ms: Sequence[int] = ROWS
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a cell at one shape and rank: both directions for each M.

    >>> [row["bytes"]["peft"] for row in count_cell(CELLS[0], 64, 64, 8, Ms=[32])]
    [48128, 59392]
    """
    from ..peft import fuse

    layer = stock(cell, K, N, R, dropout_p)
    peft = _count_steps(layer, cell, K, Ms)
    fuse(nn.Sequential(layer))
    ours = _count_steps(layer, cell, K, Ms)
    for M, of_ours, of_peft in zip(Ms, ours, peft, strict=True):
        for direction, mine, theirs in zip(("forward", "backward"), of_ours, of_peft, strict=True):
            yield {
                "cell": cell.name,
                "M": M, "K": K, "N": N, "R": R,
                "dropout_p": dropout_p,
                "direction": direction,
                **{name: {"ours": getattr(mine, name), "peft": getattr(theirs, name)}
                   for name in MEASURES},
                "allowed_kernels": allowed_kernels(cell, M, mine, theirs),
                "losses": losses(cell, M, mine, theirs),
            }  # fmt: skip


def _count_steps(
    layer: nn.Module, cell: Cell, K: int, Ms: Sequence[int]
) -> list[tuple[Traffic, Traffic]]:
    """Return forward and backward of the layer for each M."""
    count_step(layer, cell, Ms[0], K)
    return [count_step(layer, cell, M, K) for M in Ms]


def count_step(
    layer: nn.Module, cell: Cell, M: int, K: int, log: list[traffic.Kernel] | None = None
) -> tuple[Traffic, Traffic]:
    """Count forward and backward of one training step with x [M, K].

    Args:
        layer: of `stock`, fused or not.
        cell: the layer's.
        log: as `traffic.count_layer`'s.
    """
    x = _on_meta(M, K, dtype=cell.dtype).requires_grad_()
    adapters = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in adapters:
            p.add_(0.0)  # a new version, for which nothing is cached

    def forward() -> Tensor:
        if not cell.autocast:
            return layer(x)  # type: ignore[no-any-return]
        with traffic.autocast(cell.dtype):
            return layer(x)  # type: ignore[no-any-return]

    return traffic.count_layer(forward, [x, *adapters], log)


def rows(cells: Sequence[Cell] = CELLS) -> Iterator[dict[str, Any]]:
    """Yield the table's rows, those of NF4 if bitsandbytes is installed."""
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    for cell in cells:
        if cell.base == "nf4" and not has_bitsandbytes:
            continue
        for dropout_p, (K, N), R in itertools.product(cell.dropouts, SHAPES, RANKS):
            yield from count_cell(cell, K, N, R, dropout_p)


def provenance() -> dict[str, Any]:
    """Return the versions that decide which kernels run."""
    libraries = ("torch", "peft", "bitsandbytes")
    return {"version": __version__, **{name: devices.version(name) for name in libraries}}


HEADER = (
    f"{'bytes':>5} {'ours, MB':>9} {'PEFT, MB':>9} {'kernels':>7} {'peak':>6} {'ours, MB':>9} "
    f"{'PEFT, MB':>9}  layer"
)


def line(row: dict[str, Any]) -> str:
    """Return a row as text: ratios of ours to PEFT's, each before what it is made of."""
    count, peak, kernels = row["bytes"], row["peak"], row["kernels"]
    lost = f"  ✗ {', '.join(row['losses'])}" if row["losses"] else ""
    of_kernels = f"{kernels['ours']}/{kernels['peft']}"
    return (
        f"{ratio(count):5.2f} {count['ours'] / 1e6:9.2f} {count['peft'] / 1e6:9.2f} "
        f"{of_kernels:>7} {ratio(peak):6.2f} {peak['ours'] / 1e6:9.2f} {peak['peft'] / 1e6:9.2f}  "
        f"{row['cell']}, {row['M']}×{row['K']}×{row['N']} r={row['R']} "
        f"p={row['dropout_p']:g} {row['direction']}{lost}"
    )


def ratio(measure: dict[str, int]) -> float:
    """Return ours over PEFT's."""
    return measure["ours"] / measure["peft"]


def summary(table: Sequence[dict[str, Any]]) -> str:
    """Return how many rows ours loses, and the range of the ratio of bytes."""
    ratios = sorted(ratio(row["bytes"]) for row in table)
    lost = [row["losses"] for row in table if row["losses"]]
    counts = (f"{sum(name in each for each in lost)} in {name}" for name in MEASURES)
    return (
        f"{len(table)} rows, ours loses {len(lost)} ({', '.join(counts)}); bytes over PEFT's: "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    )


def run(json_path: Path | None) -> int:
    """Print the table and write it to `json_path` if given; return 1 if ours loses a row, or 0."""
    print(HEADER)
    table = []
    for row in rows():
        table.append(row)
        print(line(row), flush=True)
    print(summary(table))
    if json_path is not None:
        write(json_path, {"provenance": provenance(), "rows": table})
    return 1 if any(row["losses"] for row in table) else 0


def write(path: Path, data: dict[str, Any]) -> None:
    """Write the table as JSON, a row a line."""
    lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in data["rows"])
    facts = json.dumps(data["provenance"], ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "provenance": {facts},\n "rows": [\n{lines}\n ]\n}}\n')
