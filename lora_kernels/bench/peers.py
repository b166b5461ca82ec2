"""The sequences of GEMMs in which others compute q/k/v, gated MLPs and linear layers with LoRA.

These are autograd Functions written here from the formulas that Unsloth and axolotl publish; no
source of theirs is in them. With S the scaling, P = x·Aᵀ, dS = dY·B, h = silu(g) ⊙ u, and every
tensor in x's dtype:

- Each projection is ``y = x·Wᵀ``, then ``y.addmm_(P, Bᵀ, alpha=S)`` in place.
- dA = S·dSᵀ·x. dB = S·dYᵀ·P, with P computed again.
- dx = dY·W + S·dS·A, summed over the projections in place.
- A gated MLP saves x, g and u. Its backward makes h again, and h, dg and du take the memory of dh,
  g and u. silu(g) ⊙ u is one kernel, and so is its backward.
- Unsloth computes dS once for dA and again for dx. axolotl computes dS once, except for the MLP's
  last projection. Unsloth may put dx into x's memory ("unsloth_inplace"), which others must then
  not read: ours is not compared with that.
- "addmm" is what one writes without a Function for the block: one a projection that saves P,
  PyTorch's own silu(g) ⊙ u, and a sum of the dx by autograd.

Adapters of another dtype are cast in each direction. A 4-bit W is decoded in each direction: by one
kernel in Unsloth, else by bitsandbytes' ops, one kernel and two for nested scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.codes import Codes
from ..quantization import QuantizedWeight
from .baselines import Forward


class Projection(NamedTuple):
    """A frozen weight [N, K] with its adapter A [R, K] and B [N, R].

    decodes_at_once: whether one kernel decodes a 4-bit weight.
    """

    weight: Tensor | Codes
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    decodes_at_once: bool = False

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W; a 4-bit weight is decoded to `dtype`."""
        weight = self.weight
        if not isinstance(weight, Codes):
            return weight
        shape = self.lora_B.shape[0], self.lora_A.shape[1]
        if self.decodes_at_once and weight.packed.is_meta:  # counted; bitsandbytes computes
            return torch.ops.lora_kernels.decode(*weight, *shape, dtype)  # type: ignore[no-any-return]
        return bitsandbytes_dense(weight, shape, dtype)


def bitsandbytes_dense(weight: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K], decoded by bitsandbytes to float32, bfloat16 or float16."""
    scales = weight.absmax
    if weight.nested_absmax is not None:
        nested = weight.nested_absmax, weight.nested_code, weight.nested_blocksize
        scales = torch.ops.bitsandbytes.dequantize_blockwise(scales, *nested, torch.float32)
        scales = scales.add_(weight.offset)
    return torch.ops.bitsandbytes.dequantize_4bit(  # type: ignore[no-any-return]
        weight.packed.view(-1, 1), scales, weight.blocksize, weight.quant_type, shape, dtype
    )


def projections_of(block: nn.Module) -> list[Projection]:
    """Return the projections of a block of `build_block`, with the layers' own tensors."""
    from ..peft.base import readable_weight

    projections = []
    for layer in cast(Any, block.children()):
        if hasattr(layer, "lora_A"):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            x = A.new_empty(1, 1, dtype=torch.bfloat16)
            weight, _ = readable_weight(layer.base_layer, x)
            codes_or_dense = weight.codes if isinstance(weight, QuantizedWeight) else weight
            projections.append(Projection(codes_or_dense, A, B, layer.scaling["default"]))
    return projections


class Policy(NamedTuple):
    """Which tensors a peer computes twice, and which memory it overwrites.

    Args:
        saves_p: P is saved for dB, not computed again.
        reuses_ds: dS is computed once for dA and dx.
        overwrites_x: dx takes the memory of x.
        decodes_at_once: one kernel decodes a 4-bit weight.
    """

    saves_p: bool = False
    reuses_ds: bool = True
    overwrites_x: bool = False
    decodes_at_once: bool = False


UNSLOTH = Policy(reuses_ds=False, decodes_at_once=True)
UNSLOTH_INPLACE = UNSLOTH._replace(overwrites_x=True)
AXOLOTL, ADDMM = Policy(), Policy(saves_p=True)


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
    dss: Sequence[Tensor | None],
    out: Tensor | None,
) -> Tensor:
    """Return Σ dY·W + s·dS·A.

    Args:
        dss: dS of each projection, None to compute it here.
        out: the memory of the result, or None.
    """
    dx = out
    for i, (dy, p, ds) in enumerate(zip(dys, projections, dss, strict=True)):
        weight = p.dense(dy.dtype)
        dx = torch.mm(dy, weight, out=dx) if i == 0 else cast(Tensor, dx).addmm_(dy, weight)
        del weight
        dx.addmm_(torch.mm(dy, p.lora_B) if ds is None else ds, p.lora_A, alpha=p.scaling)
    return cast(Tensor, dx)


class _Frozen(NamedTuple):
    """The arguments of a Function that have no gradient."""

    policy: Policy
    weights: tuple[Tensor | Codes, ...]
    scalings: tuple[float, ...]

    def projections(self, adapters: Sequence[Tensor], dtype: torch.dtype) -> list[Projection]:
        """Return the projections with their adapters, A and B in turns, cast to `dtype`."""
        adapters = [t.to(dtype) for t in adapters]
        parts = zip(self.weights, adapters[::2], adapters[1::2], self.scalings, strict=True)
        return [Projection(*each, self.policy.decodes_at_once) for each in parts]


class FusedProjections(torch.autograd.Function):
    """Projections of one x: Unsloth's and axolotl's LoRA_QKV; LoRA_W and LoRA_O are one of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, *adapters: Tensor) -> tuple[Tensor, ...]:
        ys, ps = [], []
        for p in frozen.projections(adapters, x.dtype):
            y, low_rank = _project(x, p)
            ys.append(y)
            ps += [low_rank] if frozen.policy.saves_p else []
            del low_rank
        ctx.save_for_backward(x, *adapters, *ps)
        ctx.frozen = frozen
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        policy, count = ctx.frozen.policy, len(dys)
        x, *saved = ctx.saved_tensors
        projections = ctx.frozen.projections(saved[: 2 * count], x.dtype)
        ps = saved[2 * count :] or [None] * count
        grads, dss = [], []
        for dy, p, P in zip(dys, projections, ps, strict=True):
            ds = torch.mm(dy, p.lora_B)
            grads += _adapter_gradients(x, dy, p, ds, P)
            dss.append(ds if policy.reuses_ds else None)
            del ds
        dx = _input_gradient(dys, projections, dss, x if policy.overwrites_x else None)
        return dx, None, *grads


# Custom ops, so that the counter sees one kernel.
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
    for out, result in zip((dh, g, u), (h, dg, du), strict=True):
        out.copy_(result)


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
        policy = ctx.frozen.policy
        x, g, u, *adapters = ctx.saved_tensors
        gate, up, down = ctx.frozen.projections(adapters, x.dtype)
        dh = _project(dy, down, transposed=True)[0]
        silu_mul_backward_(dh, g, u)
        h, dg, du = dh, g, u  # h stays to the end, as in the peers
        grads_of_down = _adapter_gradients(h, dy, down, torch.mm(dy, down.lora_B))
        grads: list[Tensor] = []
        dss: list[Tensor | None] = []
        for grad, p in ((dg, gate), (du, up)):
            ds = torch.mm(grad, p.lora_B)
            grads += _adapter_gradients(x, grad, p, ds)
            dss.append(ds if policy.reuses_ds else None)
            del ds
        dx = _input_gradient((dg, du), (gate, up), dss, x if policy.overwrites_x else None)
        return dx, None, *grads, *grads_of_down


class Tiles(torch.autograd.Function):
    """A module in tiles of rows: the order of ALST, and of unsloth-zoo, Liger and axolotl after it.

    The forward joins the results of the tiles. The backward runs each tile's forward again, writes
    dx into zeros, and adds up the parameters' gradients in their dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, tiles: int, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.tiles, ctx.trained = module, tiles, trained
        with torch.no_grad():
            ys = [module(t) for t in x.chunk(tiles)]
        return torch.cat(ys)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), sums = ctx.saved_tensors, list[Tensor]()
        dx = torch.zeros_like(x)
        chunks = (t.chunk(ctx.tiles) for t in (x, dy, dx))
        for x_t, dy_t, dx_t in zip(*chunks, strict=True):
            x_t = x_t.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.module(x_t)
            grad, *grads = torch.autograd.grad(y, [x_t, *ctx.trained], dy_t)
            dx_t.copy_(grad)
            del y, grad
            sums = [total.add_(g) for total, g in zip(sums, grads, strict=True)] if sums else grads
        return dx, None, None, *sums


def tiled(module: nn.Module, rows: int) -> Forward:
    """Return the call of a module in tiles of rows, by `Tiles`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return lambda x: Tiles.apply(x, module, -(-x.shape[0] // rows), *trained)


def _apply(function: Any, policy: Policy, projections: Sequence[Projection], x: Tensor) -> Any:
    weights, scalings = (tuple(getattr(p, n) for p in projections) for n in ("weight", "scaling"))
    adapters = (t for p in projections for t in (p.lora_A, p.lora_B))
    return function.apply(x, _Frozen(policy, weights, scalings), *adapters)


def fused(policy: Policy, block: str, projections: Sequence[Projection]) -> Forward:
    """Return the call of a peer that has one Function for the block."""
    function = FusedMLP if block == "mlp" else FusedProjections
    return lambda x: _apply(function, policy, projections, x)


def separate(policy: Policy, block: str, projections: Sequence[Projection]) -> Forward:
    """Return the call of a peer that has one Function for each projection."""

    def call(x: Tensor) -> Any:
        def project(x: Tensor, p: Projection) -> Tensor:
            return _apply(FusedProjections, policy, [p], x)[0]  # type: ignore[no-any-return]

        if block != "mlp":
            return tuple(project(x, p) for p in projections)
        gate, up, down = projections
        return project(F.silu(project(x, gate)) * project(x, up), down)

    return call


INPLACE = "unsloth_inplace"
# Name in the JSON -> what builds the peer's call from a block's name and its projections.
FUNCTIONS: dict[str, Callable[[str, Sequence[Projection]], Forward]] = {
    "unsloth": partial(fused, UNSLOTH),
    "axolotl": partial(fused, AXOLOTL),
    "addmm": partial(separate, ADDMM),
    INPLACE: partial(fused, UNSLOTH_INPLACE),
}
