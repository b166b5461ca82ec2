"""`lora-kernels bench --count`: memory traffic of blocks of LoRA layers, beside all peers.

A block is one linear layer, q, k and v of one x, or a gated MLP, as in `traffic` on meta tensors.
Ours is what `fuse` makes of PEFT's modules. The peers are PEFT's modules, and the orders of GEMMs
in which others compute such a block. Those are autograd Functions written here from the formulas
that Unsloth and axolotl publish; no source of theirs is in them.

With S the scaling, P = x·Aᵀ, dS = dY·B, h = silu(g) ⊙ u, and every tensor in x's dtype:

- Each projection is ``y = x·Wᵀ``, then ``y.addmm_(P, Bᵀ, alpha=S)`` in place.
- dA = S·dSᵀ·x. dB = S·dYᵀ·P, with P computed again.
- dx = dY·W + S·dS·A, summed over the projections in place.
- A gated MLP keeps x, g and u. Its backward makes h again, and h, dg and du take the memory of dh,
  g and u. silu(g) ⊙ u is one kernel, and so is its backward.
- Unsloth computes dS once for dA and again for dx. axolotl keeps dS, except for the MLP's last
  projection. Unsloth may put dx into x's memory ("unsloth_inplace"), which others must then not
  read: ours is not compared with that.
- "addmm" is what one writes without a Function for the block: one a projection that keeps P,
  PyTorch's own silu(g) ⊙ u, and a sum of the dx by autograd.

Adapters of another dtype are cast in each direction, in ours by `fuse(model, cast_adapters=True)`.
A 4-bit W is decoded by bitsandbytes' ops in each direction, one kernel and two for nested scales.

A forward is judged by itself, a backward with its forward, as in `traffic`. Ours loses a row where
it moves more than `MOST_BYTES` times the bytes of the best peer, or where the peak of the step is
more than `traffic.PEAK_UNIT` above the lowest peer's. The best peer is the best in that measure.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import decode4bit
from ..backends.eager import head
from ..core.packed4bit import Packed4bit
from ..ops.head import lora_linear_cross_entropy
from ..quantization import Weight4bit
from ..quantization.codebooks import E2M1_TYPES
from . import experts_traffic, traffic
from .counter import Traffic, count_layer
from .results import Facts, Row, versions
from .table import Suite
from .traffic import PEAK_UNIT, Cell

ROWS = (1, 512, 8192)  # M
RANK = 16
MOST_BYTES = 1.01
_F32, _BF16 = torch.float32, torch.bfloat16
_COMMON = "NF4 bf16, fp32 adapters, autocast"
CELLS = (
    Cell("bf16, bf16 adapters", _BF16, _BF16),
    Cell("bf16, fp32 adapters", _BF16, _F32),
    Cell("bf16, fp32 adapters, autocast", _BF16, _F32, autocast=True),
    Cell("NF4 bf16, bf16 adapters", _BF16, _BF16, "nf4"),
    Cell("NF4 bf16, fp32 adapters", _BF16, _F32, "nf4"),
    Cell("NF4 bf16, bf16 adapters, autocast", _BF16, _BF16, "nf4", autocast=True),
    Cell(_COMMON, _BF16, _F32, "nf4", autocast=True),
    # The norms' outputs after `prepare_model_for_kbit_training`.
    Cell(f"{_COMMON}, fp32 x", _BF16, _F32, "nf4", autocast=True, x_dtype=_F32),
)
CHECKPOINTED = ", checkpointed"  # after a block's title: rows whose backward runs the forward again


class Block(NamedTuple):
    """Projections that are counted together.

    Args:
        name: "layer", "qkv" or "mlp".
        K: in-features, of the MLP also the out-features.
        Ns: out-features of each projection of x.
    """

    name: str
    K: int
    Ns: tuple[int, ...]

    @property
    def title(self) -> str:
        """The name, and in-features and out-features.

        >>> Block("mlp", 64, (96, 96)).title
        'mlp 64→96→64'
        """
        out = f"{self.Ns[0]}→{self.K}" if self.name == "mlp" else "+".join(map(str, self.Ns))
        return f"{self.name} {self.K}→{out}"


BLOCKS = (
    Block("layer", 4096, (4096,)),
    Block("qkv", 4096, (4096, 1024, 1024)),
    Block("mlp", 4096, (14336, 14336)),
)


class QueryKeyValue(nn.Module):
    """q, k and v of one x, as an attention layer calls them. x [M, K] -> three [M, N]."""

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class OneProjection(nn.Module):
    """One linear layer, called as `QueryKeyValue` calls its own. x [M, K] -> one [M, N]."""

    def __init__(self, q_proj: nn.Module) -> None:
        super().__init__()
        self.q_proj = q_proj

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.q_proj(x),)


def stock(block: Block, cell: Cell, R: int = RANK, device: str = "meta") -> nn.Module:
    """Build a block of PEFT's layers, in training mode; an MLP is transformers' LlamaMLP.

    >>> type(stock(Block("mlp", 64, (96, 96)), CELLS[0])).__name__
    'LlamaMLP'
    """
    if block.name != "mlp":
        kind = QueryKeyValue if block.name == "qkv" else OneProjection
        return kind(*(traffic.stock(cell, block.K, N, R, device=device) for N in block.Ns))
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    K, H = block.K, block.Ns[0]
    with torch.device("meta"):
        mlp = cast(Any, LlamaMLP)(LlamaConfig(hidden_size=K, intermediate_size=H))
    adapt_linears(mlp, cell, R, device)
    return cast(nn.Module, mlp)


def adapt_linears(parent: nn.Module, cell: Cell, R: int, device: str) -> None:
    """Replace the linear layers that a parent calls by PEFT's of their size, newly drawn."""
    for name, layer in list(parent.named_children()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features
            setattr(parent, name, traffic.stock(cell, *sizes, R, device=device))


# ---- The peers' Functions ----


class Projection(NamedTuple):
    """A frozen weight [N, K] with its adapter A [R, K] and B [N, R]."""

    weight: Tensor | Packed4bit
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W; a 4-bit weight is decoded to `dtype`."""
        if not isinstance(self.weight, Packed4bit):
            return self.weight
        shape = self.lora_B.shape[0], self.lora_A.shape[1]
        return decode4bit.bitsandbytes_dense(self.weight, shape, dtype)


def projections_of(block: nn.Module) -> list[Projection]:
    """Return the projections of a block of `stock`, with the layers' own tensors."""
    from ..peft.base import readable_weight

    found = []
    for layer in cast(Any, block.children()):
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight, _ = readable_weight(layer.base_layer, A.new_empty(1, 1, dtype=_BF16))
            form = weight.codes if isinstance(weight, Weight4bit) else weight
            found.append(Projection(form, A, B, layer.scaling["default"]))
    return found


class Order(NamedTuple):
    """The choices of a peer: tensors computed twice, and memory that is overwritten.

    Args:
        keeps_p: P is saved for dB, not computed again.
        keeps_ds: dS is computed once for dA and dx.
        overwrites_x: dx takes the memory of x.
    """

    keeps_p: bool = False
    keeps_ds: bool = True
    overwrites_x: bool = False


UNSLOTH, UNSLOTH_INPLACE = Order(keeps_ds=False), Order(keeps_ds=False, overwrites_x=True)
AXOLOTL, ADDMM = Order(), Order(keeps_p=True)


def _project(x: Tensor, p: Projection, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return x·Wᵀ + s·P·Bᵀ and P = x·Aᵀ; transposed: x·W + s·dS·A and dS = x·B."""
    weight = p.dense(x.dtype)
    y = torch.mm(x, weight if transposed else weight.t())
    del weight
    down, up = (p.lora_B, p.lora_A) if transposed else (p.lora_A.t(), p.lora_B.t())
    low_rank = torch.mm(x, down)
    return y.addmm_(low_rank, up, alpha=p.scaling), low_rank


def _adapter_gradients(
    x: Tensor, dy: Tensor, p: Projection, ds: Tensor, P: Tensor | None = None
) -> list[Tensor]:
    """Return dA = s·dSᵀ·x and dB = s·dYᵀ·P. P: x·Aᵀ, None to compute it here."""
    dA, dB = torch.empty_like(p.lora_A), torch.empty_like(p.lora_B)
    dA.addmm_(ds.t(), x, beta=0, alpha=p.scaling)
    dB.addmm_(dy.t(), torch.mm(x, p.lora_A.t()) if P is None else P, beta=0, alpha=p.scaling)
    return [dA, dB]


def _input_gradient(
    dys: Sequence[Tensor],
    projections: Sequence[Projection],
    kept: Sequence[Tensor | None],
    out: Tensor | None,
) -> Tensor:
    """Return Σ dY·W + s·dS·A. kept: dS of each, None to compute it here. out: memory to take."""
    dx = out
    for i, (dy, p, ds) in enumerate(zip(dys, projections, kept, strict=True)):
        weight = p.dense(dy.dtype)
        dx = torch.mm(dy, weight, out=dx) if i == 0 else cast(Tensor, dx).addmm_(dy, weight)
        del weight
        dx.addmm_(torch.mm(dy, p.lora_B) if ds is None else ds, p.lora_A, alpha=p.scaling)
    return cast(Tensor, dx)


class _Frozen(NamedTuple):
    """The arguments of a Function that have no gradient."""

    order: Order
    weights: tuple[Tensor | Packed4bit, ...]
    scalings: tuple[float, ...]

    def projections(self, adapters: Sequence[Tensor], dtype: torch.dtype) -> list[Projection]:
        """Return the projections with their adapters, A and B in turns, cast to `dtype`."""
        adapters = [t.to(dtype) for t in adapters]
        return [*map(Projection, self.weights, adapters[::2], adapters[1::2], self.scalings)]


class FusedProjections(torch.autograd.Function):
    """Projections of one x: Unsloth's and axolotl's LoRA_QKV; LoRA_W and LoRA_O are one of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, *adapters: Tensor) -> tuple[Tensor, ...]:
        ys, ps = [], []
        for p in frozen.projections(adapters, x.dtype):
            y, low_rank = _project(x, p)
            ys.append(y)
            ps += [low_rank] if frozen.order.keeps_p else []
            del low_rank
        ctx.save_for_backward(x, *adapters, *ps)
        ctx.frozen = frozen
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        order, count = ctx.frozen.order, len(dys)
        x, *saved = ctx.saved_tensors
        projections = ctx.frozen.projections(saved[: 2 * count], x.dtype)
        ps = saved[2 * count :] or [None] * count
        grads, kept = [], []
        for dy, p, P in zip(dys, projections, ps, strict=True):
            ds = torch.mm(dy, p.lora_B)
            grads += _adapter_gradients(x, dy, p, ds, P)
            kept.append(ds if order.keeps_ds else None)
            del ds
        dx = _input_gradient(dys, projections, kept, x if order.overwrites_x else None)
        return dx, None, *grads


# Ops of their own, so that the counter sees one kernel.
@torch.library.custom_op("lora_kernels_bench::silu_mul", mutates_args=())
def silu_mul(g: Tensor, u: Tensor) -> Tensor:
    """Return h = silu(g) ⊙ u."""
    return F.silu(g) * u


@silu_mul.register_fake
def _(g: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(g)


@torch.library.custom_op("lora_kernels_bench::silu_mul_backward_", mutates_args=("dh", "g", "u"))
def silu_mul_backward_(dh: Tensor, g: Tensor, u: Tensor) -> None:
    """Overwrite dh by h, g by dg and u by du."""
    sigma = torch.sigmoid(g)
    activation = g * sigma
    h, du = activation * u, dh * activation
    dg = dh * u * sigma * (1 + g * (1 - sigma))
    for to, found in zip((dh, g, u), (h, dg, du), strict=True):
        to.copy_(found)


@silu_mul_backward_.register_fake
def _(dh: Tensor, g: Tensor, u: Tensor) -> None:
    return None


class FusedMLP(torch.autograd.Function):
    """A gated MLP of the projections gate, up and down: Unsloth's and axolotl's LoRA_MLP."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, *adapters: Tensor) -> Tensor:
        gate, up, down = frozen.projections(adapters, x.dtype)
        g, u = _project(x, gate)[0], _project(x, up)[0]
        ctx.save_for_backward(x, g, u, *adapters)
        ctx.frozen = frozen
        return _project(silu_mul(g, u), down)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        order = ctx.frozen.order
        x, g, u, *adapters = ctx.saved_tensors
        gate, up, down = ctx.frozen.projections(adapters, x.dtype)
        dh = _project(dy, down, transposed=True)[0]
        silu_mul_backward_(dh, g, u)
        h, dg, du = dh, g, u  # h stays to the end, as in the peers
        of_down = _adapter_gradients(h, dy, down, torch.mm(dy, down.lora_B))
        grads: list[Tensor] = []
        kept: list[Tensor | None] = []
        for each, p in ((dg, gate), (du, up)):
            ds = torch.mm(each, p.lora_B)
            grads += _adapter_gradients(x, each, p, ds)
            kept.append(ds if order.keeps_ds else None)
            del ds
        dx = _input_gradient((dg, du), (gate, up), kept, x if order.overwrites_x else None)
        return dx, None, *grads, *of_down


def _apply(function: Any, order: Order, projections: Sequence[Projection], x: Tensor) -> Any:
    frozen = _Frozen(
        order, tuple(p.weight for p in projections), tuple(p.scaling for p in projections)
    )
    return function.apply(x, frozen, *(t for p in projections for t in (p.lora_A, p.lora_B)))


Call = Callable[[Tensor], Any]


def fused(order: Order, block: str, projections: Sequence[Projection]) -> Call:
    """Return the call of a peer that has one Function for the block."""
    function = FusedMLP if block == "mlp" else FusedProjections
    return lambda x: _apply(function, order, projections, x)


def separate(order: Order, block: str, projections: Sequence[Projection]) -> Call:
    """Return the call of a peer that has one Function for each projection."""

    def call(x: Tensor) -> Any:
        def project(x: Tensor, p: Projection) -> Tensor:
            return _apply(FusedProjections, order, [p], x)[0]  # type: ignore[no-any-return]

        if block != "mlp":
            return tuple(project(x, p) for p in projections)
        gate, up, down = projections
        return project(F.silu(project(x, gate)) * project(x, up), down)

    return call


INPLACE = "unsloth_inplace"
# Name in the JSON -> what builds the peer's call from a block's name and its projections.
FUNCTIONS: dict[str, Callable[[str, Sequence[Projection]], Call]] = {
    "unsloth": lambda block, projections: fused(UNSLOTH, block, projections),
    "axolotl": lambda block, projections: fused(AXOLOTL, block, projections),
    "addmm": lambda block, projections: separate(ADDMM, block, projections),
    INPLACE: lambda block, projections: fused(UNSLOTH_INPLACE, block, projections),
}

# ---- Rows ----

Counts = dict[str, Traffic]  # of ours and each peer


def best(counts: Counts, measure: str) -> str:
    """Return the peer that is best in "bytes" or "peak", of those that do not overwrite x."""
    peers = [name for name in counts if name not in ("ours", INPLACE)]
    return min(peers, key=lambda name: cast(int, getattr(counts[name], measure)))


def losses(counts: Counts) -> list[str]:
    """Return the measures in which ours loses.

    counts: of a forward, or of a forward and its backward together.

    >>> peers = {"peft": Traffic(90, 9, 7, 0), INPLACE: Traffic(0, 0, 0, 0)}
    >>> losses({"ours": Traffic(99, 0, 9, 2 << 20), **peers})
    []
    >>> losses({"ours": Traffic(99, 1, 9, 1 + (2 << 20)), **peers})
    ['bytes', 'peak']
    """
    ours = counts["ours"]
    lost = {
        "bytes": ours.bytes > MOST_BYTES * counts[best(counts, "bytes")].bytes,
        "peak": ours.peak > counts[best(counts, "peak")].peak + PEAK_UNIT,
    }
    return [name for name in lost if lost[name]]


def judge(counts: Counts, direction: str) -> list[str]:
    """Return the `losses` of a direction. The peak is a step's: what is counted here trains."""
    return [name for name in losses(counts) if name != "peak" or direction == "backward"]


def count_block(block: Block, cell: Cell, R: int = RANK, Ms: Sequence[int] = ROWS) -> Iterator[Row]:
    """Yield the rows of a block and a kind of layer: both directions for each M.

    The last M once more, checkpointed.

    >>> [row.kernels["axolotl"] for row in count_block(Block("layer", 64, (64,)), CELLS[0], 8, [9])]
    [3, 6, 3, 9]
    """
    from ..peft import fuse

    module = stock(block, cell, R)
    projections = projections_of(module)
    steps_of = [(M, False) for M in Ms] + [(Ms[-1], True)]

    def count(call: Call | None = None) -> list[tuple[Traffic, Traffic]]:
        traffic.count_step(module, cell, Ms[0], block.K, call=call)
        return [
            traffic.count_step(module, cell, M, block.K, call=call, is_checkpointed=again)
            for M, again in steps_of
        ]

    found = {"peft": count()}
    # The peers' Functions want x in the base's dtype.
    for name, build in FUNCTIONS.items() if cell.x_dtype is None else ():
        if name != INPLACE or block.name != "layer":  # Unsloth's single layer overwrites nothing
            found[name] = count(build(block.name, projections))
    fuse(nn.Sequential(module), cast_adapters=True)
    found = {"ours": count(), **found}

    for i, (M, again) in enumerate(steps_of):
        steps = {name: counts[i] for name, counts in found.items()}
        what = block.title + CHECKPOINTED * again
        key = {"what": what, "dtype": cell.name, "M": M, "K": block.K, "N": sum(block.Ns)}
        yield from traffic.count_rows(steps, judge, R=R, **key)


HEAD = (8192, 4096, 128256)  # rows of a step, hidden size and vocabulary of Llama 3


def count_head(adapter_dtype: torch.dtype, R: int = RANK) -> Row:
    """Count a training step of a head with its loss, in bfloat16: ours, PyTorch's ops, PEFT's.

    PyTorch computes the loss of PEFT's logits [M, V] in float32. The second is ours on a device
    that does not run the Triton kernel.

    >>> list(count_head(torch.bfloat16).moved)
    ['ours', "ours by PyTorch's ops", 'peft']
    """
    M, K, V = HEAD
    layer = traffic.stock(Cell("head", _BF16, adapter_dtype), K, V, R)
    A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    labels = torch.zeros(M, dtype=torch.int64, device="meta")

    def ours(x: Tensor) -> Tensor:
        weight, scaling = layer.base_layer.weight, layer.scaling["default"]
        return lora_linear_cross_entropy(x, weight, A, B, labels, scaling)

    def peft(x: Tensor) -> Tensor:
        return F.cross_entropy(layer(x).float(), labels)

    def count(call: Callable[[Tensor], Tensor]) -> Traffic:
        for _ in range(2):  # the first call fills what the process caches
            x = torch.empty(M, K, dtype=_BF16, device="meta", requires_grad=True)
            found = count_layer(lambda x=x: call(x), [x, A, B])  # type: ignore[misc]
        return traffic.both(*found)

    key = ("meta", None)
    with mock.patch.dict(head.kernel_reasons, {key: None}):
        counted = {"ours": count(ours)}
    with mock.patch.dict(head.kernel_reasons, {key: "PyTorch's ops are counted"}):
        counted["ours by PyTorch's ops"] = count(ours)
    counted["peft"] = count(peft)
    name = f"bf16, {'bf16' if adapter_dtype == _BF16 else 'fp32'} adapter"
    sizes: dict[str, Any] = {"M": M, "K": K, "N": V, "R": R}
    return traffic.count_row(counted, what="head and loss", dtype=name, mode="step", **sizes)


class Count(Suite):
    """Memory traffic, counted: layers beside PEFT's, blocks beside all peers, head, experts."""

    def __init__(self) -> None:
        unused = "device shapes model rows quick dtypes dropout seconds csv baseline"
        super().__init__("count", "count", unused)

    def provenance(self, args: argparse.Namespace) -> Facts:
        """Return the versions of the libraries that decide what kernels run."""
        return versions("torch", "peft", "bitsandbytes")

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        """Yield the rows, those of NF4 if bitsandbytes is installed."""
        has_bitsandbytes = find_spec("bitsandbytes") is not None
        for cell in traffic.CELLS:
            if cell.base != "nf4" or has_bitsandbytes:
                for p, (K, N), R in itertools.product(traffic.DROPOUTS, traffic.SHAPES, args.ranks):
                    yield from traffic.count_cell(cell, K, N, R, p)
        for kind, (K, N), R in itertools.product(E2M1_TYPES, traffic.SHAPES, args.ranks):
            yield from traffic.count_base(kind, K, N, R)
        for block, cell in itertools.product(BLOCKS, CELLS):
            if cell.base != "nf4" or has_bitsandbytes:
                yield from count_block(block, cell)
        yield from map(count_head, (_BF16, _F32))
        yield from experts_traffic.rows()

    def summary(self, rows: list[Row]) -> Iterator[str]:
        """Yield how many rows of each kind ours loses, and the range of the ratio of bytes."""
        layers = [row for row in rows if row.what is None]
        fused = [row.moved for row in layers if row.strategy != traffic.LEFT]
        ratios = sorted(moved["ours"] / moved["peft"] for moved in fused)
        yield (
            f"{_count_losses(layers, 'PEFT', ('bytes', 'kernels', 'peak'))}; `fuse` leaves "
            f"{len(layers) - len(fused)} to PEFT; bytes over PEFT's elsewhere: "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
        )
        for block in BLOCKS:
            found = [row for row in rows if row.what and row.what.startswith(block.title)]
            yield f"{block.title}: {_count_losses(found, 'the best peer', ('bytes', 'peak'))}"
        bases = [row for row in rows if row.what and row.what.startswith("base ")]
        lost = _count_losses(bases, "nested NF4", ("bytes", "kernels", "peak"))
        yield f"bases in MXFP4 and NVFP4: {lost}"
        if (reason := experts_traffic.missing()) is not None:
            yield f"no experts: {reason}"
            return
        experts = [row for row in rows if row.what and " experts " in row.what]
        yield f"experts: {_count_losses(experts, 'a peer of no more FLOPs', ('bytes',))}"

    def has_failed(self, rows: list[Row]) -> bool:
        """True if ours loses a row."""
        return any(row.misses for row in rows)


def _count_losses(rows: list[Row], peer: str, measures: Sequence[str]) -> str:
    lost = [row.misses["ours"] for row in rows if row.misses]
    counts = (f"{sum(name in each for each in lost)} in {name}" for name in measures)
    return f"{len(rows)} rows, ours loses {len(lost)} to {peer} ({', '.join(counts)})"
