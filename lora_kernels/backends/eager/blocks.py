"""Adapted layers that share their x, and the gated MLP, in library GEMMs on a GPU.

    P_i = D(x)·A_iᵀ        y_i = x·W_iᵀ + s_i·(P_i ⊙ g_i)·B_iᵀ + bias_i

For many rows the layers' A are stacked: one GEMM reads x for all P, and one for all dA. dx
accumulates in one tensor, `dx.addmm_(dy_i, W_i)`. So n layers read x n + 1 times in the forward and
once in the backward. As single layers they would read it 2·n times in the forward and n times in
the backward, and autograd would add n tensors dx.

A call is plain if x and all A and B have one dtype and there is no gate. P and dS have that dtype
too, and the scaling is the `alpha` or `beta` of a GEMM that accumulates. All other calls take the
dtypes and the operands in parts of `products`.

A layer is a `Record` with its operands computed: its weight dense in the dtype of the base GEMM, or
packed in 4 bits, its scaling a float, and a rank gate [R] or None.

The gated MLP is y = down(h) with h = act(g) ⊙ u, g = gate(x) and u = up(x). It keeps g and u, and
its backward computes h again (see `gated_mlp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, addmm, mm
from torch.nn.functional import linear

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.codes import Codes
from ...core.dtypes import stat_dtype, to_dtype
from ...core.record import PLAIN, Record
from .. import decoder
from . import gated_mlp, orders, products
from .linear import drop
from .orders import BASE_FIRST


def dense(layer: Record, dtype: torch.dtype) -> Tensor:
    """Return W of a layer; a 4-bit weight is decoded to `dtype`."""
    weight = layer.weight
    if type(weight) is Codes:
        return decoder.dense(weight, (layer.lora_B.shape[0], layer.lora_A.shape[1]), dtype)
    return cast(Tensor, weight)


class DropoutMask(NamedTuple):
    """A dropout mask that PyTorch's kernel drew, bool [M, K], and the probability."""

    mask: Tensor
    p: float

    def apply(self, x: Tensor) -> Tensor:
        """Return D(x), or D's gradient."""
        return drop(x, self.p, mask=self.mask).x


class BlockNeeds(NamedTuple):
    """Which gradients are needed: x's, and those of each layer.

    bias and rank_gate are empty if no layer needs them.
    """

    x: bool
    lora_A: Sequence[bool]
    lora_B: Sequence[bool]
    bias: Sequence[bool]
    rank_gate: Sequence[bool]


class BlockGrads(NamedTuple):
    """The gradients; None for a gradient that is not needed.

    bias: in dy's `stat_dtype`. rank_gate: in P's dtype.
    """

    x: Tensor | None
    lora_A: list[Tensor | None]
    lora_B: list[Tensor | None]
    bias: list[Tensor | None]
    rank_gate: list[Tensor | None]


# One plain layer


def linear_output(x: Tensor, layer: Record) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y [M, N], P [M, R] and the dropout mask of one plain layer, for x [M, K]."""
    weight, lora_A, lora_B, bias, _, dropout_p = layer[:PLAIN]
    base = mask = None
    if type(weight) is Codes:  # before anything else is held beside a decoded weight
        base = decoder.gemm(weight, x, lora_B.shape[0], bias)
    if dropout_p:
        dropped, mask = torch.native_dropout(x, dropout_p, True)
        p = orders.down_projection(dropped, lora_A)
        del dropped
    else:
        p = orders.down_projection(x, lora_A)
    return _add_base_and_update(x, p, layer, base), p, mask


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    p: Tensor,
    layer: Record,
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute dx, dA and dB of one plain layer. x [M, K] is None if no dA is needed."""
    lora_A, lora_B, scaling = layer.lora_A, layer.lora_B, layer.scaling
    dx = dA = dB = None
    if need_x:  # while nothing is held beside a decoded weight
        dx = mm(dy, dense(layer, dy.dtype))
    if need_B:
        dB = orders.gradient_B(dy, p, scaling, dy.dtype)
    if need_x or need_A:
        ds = orders.gradient_S(dy, lora_B, scaling)
        if need_A:
            dA = orders.gradient_A(ds, cast(Tensor, x), dy.dtype)
        if dx is not None:
            dx.addmm_(ds, lora_A)
    return dx, dA, dB


# Layers of one x


def linears(
    x: Tensor, layers: Sequence[Record], is_plain: bool, is_stacked: bool
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return each y_i [M, N_i] in the dtype of x [M, K], and each P_i [M, R_i].

    Args:
        is_plain: see the module.
        is_stacked: whether one GEMM computes all P. It copies the A, which pays for many rows.
    """
    ps = low_ranks(x, layers, is_plain, is_stacked)
    if is_plain:
        return [_output(x, ps[i], layer) for i, layer in enumerate(layers)], ps
    return [_general_output(x, ps[i], layer) for i, layer in enumerate(layers)], ps


def low_ranks(
    x: Tensor, layers: Sequence[Record], is_plain: bool, is_stacked: bool
) -> Sequence[Tensor]:
    """Return each P_i [M, R_i]; see `linears`."""
    if is_stacked:
        stacked = stack([layer.lora_A for layer in layers])
        p = orders.down_projection(x, stacked) if is_plain else products.shrink(x, stacked, 0)
        del stacked
        return p.split_with_sizes([layer.lora_A.shape[0] for layer in layers], 1)
    if is_plain:
        return [orders.down_projection(x, layer.lora_A) for layer in layers]
    return [products.shrink(x, layer.lora_A, 0) for layer in layers]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return matrices of K columns one below the other: a view if they lie so in memory, as those
    that `ops.blocks` casts do."""
    first, rows = tensors[0], 0
    if len(tensors) == 1:
        return first
    K, start, memory = first.shape[1], first.storage_offset(), first.untyped_storage().data_ptr()
    for t in tensors:
        follows = t.storage_offset() == start + rows * K and t.is_contiguous()
        if not follows or t.untyped_storage().data_ptr() != memory:
            return torch.cat(list(tensors))
        rows += t.shape[0]
    return first.as_strided((rows, K), (K, 1))


def base_output(x: Tensor, layer: Record) -> Tensor:
    """Return x·Wᵀ + bias [M, N] in x's dtype."""
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, Codes):
        base = decoder.gemm(weight, x, layer.lora_B.shape[0], bias)
        if base is not None:
            return base
    return linear(x, dense(layer, x.dtype), None if bias is None else to_dtype(bias, x.dtype))


def _output(x: Tensor, p: Tensor, layer: Record) -> Tensor:
    """Return y [M, N] of a plain layer."""
    base, weight = None, layer.weight
    if type(weight) is Codes:
        base = decoder.gemm(weight, x, layer.lora_B.shape[0], layer.bias)
    return _add_base_and_update(x, p, layer, base)


def _add_base_and_update(x: Tensor, p: Tensor, layer: Record, base: Tensor | None) -> Tensor:
    """Return y of a plain layer. base: x·Wᵀ + bias, which is overwritten; None to compute it."""
    lora_B, bias, scaling = layer.lora_B, layer.bias, layer.scaling
    if base is not None:
        return base.addmm_(p, lora_B.t(), alpha=scaling)
    weight = dense(layer, x.dtype)
    if BASE_FIRST in orders.winners and orders.is_faster(BASE_FIRST, x, lora_B):
        base = linear(x, weight, None if bias is None else to_dtype(bias, x.dtype))
        return base.addmm_(p, lora_B.t(), alpha=scaling)
    if bias is None:  # the base GEMM adds itself to scaling · P·Bᵀ
        return linear(p, lora_B).addmm_(x, weight.t(), beta=scaling)
    update = addmm(to_dtype(bias, x.dtype), p, lora_B.t(), alpha=scaling)
    return update.addmm_(x, weight.t())


def _general_output(x: Tensor, p: Tensor, layer: Record) -> Tensor:
    """Return y [M, N] of a layer that is not plain."""
    weight, lora_B, bias = layer.weight, layer.lora_B, layer.bias
    scaling, gate = layer.scaling, layer.rank_gate
    base = None
    if isinstance(weight, Codes):
        base = decoder.gemm(weight, x, lora_B.shape[0], bias)
    s = p if gate is None else p * gate
    if base is not None:
        return products.expand(s, lora_B, x, scaling, accumulator=base)
    z = products.expand(s, lora_B, x, scaling, bias)
    return products.add_base(z, x, dense(layer, x.dtype).t(), x.dtype, x.dtype)


def linears_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ps: Sequence[Tensor | None],
    layers: Sequence[Record],
    needs: BlockNeeds,
    is_plain: bool,
    grad_dtype: torch.dtype,
    mask: DropoutMask | None = None,
) -> BlockGrads:
    """Compute the gradients, dx as [M, K].

    Args:
        dys: [M, N_i]; None for a y without a gradient.
        x: [M, K]; None if no dA is needed.
        ps: P_i [M, R_i]; None if neither dB nor a gate's gradient is needed.
        layers, is_plain: as in the forward.
        grad_dtype: of plain layers' dA and dB, as in `orders.gradient_A`.
        mask: that of the forward; of a plain layer alone in its block.
    """
    need_x, need_A, need_B = needs.x, needs.lora_A, needs.lora_B
    need_bias, need_gate = needs.bias, needs.rank_gate
    none: list[Tensor | None] = [None] * len(layers)
    dA, dB = none, none.copy()
    dbias: list[Tensor | None] = [None] * len(need_bias)
    dg: list[Tensor | None] = [None] * len(need_gate)
    grads = BlockGrads(None, dA, dB, dbias, dg)
    indices = [i for i, dy in enumerate(dys) if dy is not None]
    if not need_x:  # a layer may be frozen
        indices = [i for i in indices if any([needed[i] for needed in needs[1:] if needed])]
    if not indices:
        return grads
    for i in indices if need_bias else ():
        if need_bias[i]:
            dy = cast(Tensor, dys[i])
            dbias[i] = dy.sum(0, dtype=stat_dtype(dy.dtype))
    if not is_plain:
        return _general_backward(grads, dys, x, ps, layers, indices, needs)
    need_any_A = any(need_A)
    dx: Tensor | None = None
    ds: Tensor | None = None
    if need_x or need_any_A:
        ranks = [layers[i].lora_A.shape[0] for i in indices]
        first = cast(Tensor, dys[indices[0]])
        ds = first.new_empty(first.shape[0], sum(ranks))
        layer_ds = ds.split_with_sizes(ranks, 1) if len(indices) > 1 else (ds,)
    for n, i in enumerate(indices):
        dy, layer = cast(Tensor, dys[i]), layers[i]
        lora_B, scaling = layer.lora_B, layer.scaling
        if need_x and mask is None:  # while nothing large is held beside a decoded weight
            weight = dense(layer, dy.dtype)
            dx = mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            del weight
        if need_B[i]:
            dB[i] = orders.gradient_B(dy, cast(Tensor, ps[i]), scaling, grad_dtype)
        if ds is not None:
            orders.gradient_S(dy, lora_B, scaling, layer_ds[n])
    if ds is None:
        return grads
    if need_any_A:
        dropped = cast(Tensor, x) if mask is None else mask.apply(cast(Tensor, x))
        stacked_dA = orders.gradient_A(ds, dropped, grad_dtype)
        del dropped
        slices = stacked_dA.split_with_sizes(ranks) if len(indices) > 1 else (stacked_dA,)
        for i, layer_dA in zip(indices, slices, strict=True):
            if need_A[i]:
                dA[i] = layer_dA
    if not need_x:
        return grads
    As = [layers[i].lora_A for i in indices]
    A = stack(As)
    if mask is None:
        return grads._replace(x=cast(Tensor, dx).addmm_(ds, A))
    (i,) = indices
    dx, dy = mask.apply(mm(ds, A)), cast(Tensor, dys[i])
    return grads._replace(x=dx.addmm_(dy, dense(layers[i], dy.dtype)))


def _general_backward(
    grads: BlockGrads,
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ps: Sequence[Tensor | None],
    layers: Sequence[Record],
    indices: Sequence[int],
    needs: BlockNeeds,
) -> BlockGrads:
    """Compute the gradients of a block that is not plain; those of the biases are in `grads`."""
    need_x, need_A, need_B = needs.x, needs.lora_A, needs.lora_B
    dtype = cast(Tensor, dys[indices[0]]).dtype
    dx: Tensor | None = None
    gated_ds = []
    for i in indices:
        dy, p, layer = cast(Tensor, dys[i]), ps[i], layers[i]
        gate = layer.rank_gate
        if need_x:
            weight = dense(layer, dtype)
            dx = mm(dy, weight) if dx is None else products.add_base(dx, dy, weight, dtype, dtype)
            del weight
        wide_dy = products.widen(dy, layer.lora_B)
        if need_B[i]:
            s = cast(Tensor, p) if gate is None else cast(Tensor, p) * gate
            grads.lora_B[i] = products.adapter_gradient(wide_dy, s, layer.scaling, layer.lora_B)
        ds = products.shrink(wide_dy, layer.lora_B, 1, layer.scaling)
        if needs.rank_gate and needs.rank_gate[i]:
            grads.rank_gate[i] = (ds * cast(Tensor, p)).sum(0)
        gated_ds.append(ds if gate is None else ds * gate)
        del wide_dy, ds  # before the next layer's float32 copies
    if not (need_x or any(need_A)):
        return grads
    ranks = [t.shape[1] for t in gated_ds]
    ds = torch.cat(gated_ds, dim=1) if len(indices) > 1 else gated_ds[0]
    del gated_ds
    stacked = stack([layers[i].lora_A for i in indices])
    in_parts = products.is_in_parts(ds, stacked, dtype)
    parts = products.split_in_three(ds, dtype, 1, lo_first=False) if in_parts else None
    if any(need_A):
        dA = products.gradient_A(ds, parts, cast(Tensor, x), stacked).split(ranks)
        for i, part in zip(indices, dA, strict=True):
            if need_A[i]:
                grads.lora_A[i] = part
    if dx is not None:
        dx = to_dtype(products.input_update(ds, parts, stacked, dtype, accumulator=dx), dtype)
    return grads._replace(x=dx)


def add_update_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    dropout_p: float,
) -> Saved:
    """Add scaling·((D(x)·Aᵀ) ⊙ g)·Bᵀ to y [M, N] in place, for x [M, K] of y's dtype.

    Returns P and the dropout mask, which `linear.lora_linear_backward` takes.
    """
    dropped, _, mask = drop(x, dropout_p)
    is_plain = lora_A.dtype is lora_B.dtype is y.dtype and rank_gate is None
    p = linear(dropped, lora_A) if is_plain else products.shrink(dropped, lora_A, 0)
    products.expand(p if rank_gate is None else p * rank_gate, lora_B, y, scaling, accumulator=y)
    return Saved(p, None, mask)


# The gated MLP


def down_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    p: Tensor | None,
    layer: Record,
    needs: Needs,
    is_plain: bool,
    in_place: bool,
    activation: str,
    grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Grads]:
    """Compute dg and du [M, H], and the gradients of the down-projection of h = act(g) ⊙ u.

    Args:
        dy: [M, N].
        g, u: [M, H], contiguous.
        needs: of the down-projection. x: whether dg and du are needed.
        in_place: whether g and u may be overwritten.
        grad_dtype: as in `linears_backward`.
    """
    lora_A, lora_B, scaling = layer.lora_A, layer.lora_B, layer.scaling
    if not (is_plain and needs.x):
        operands = Operands(g, layer.weight, lora_A, lora_B, layer.rank_gate)
        saved = Saved(dy.new_empty(dy.shape[0], lora_A.shape[0]) if p is None else p)
        spec = Spec(scaling, 0.0, g.dtype, g.dtype)
        return gated_mlp.general_down_backward(
            dy, g, u, operands, saved, spec, needs, in_place, activation
        )
    dA = dB = dbias = None
    weight = dense(layer, dy.dtype)
    dh = mm(dy, weight)
    del weight
    if needs.lora_B:
        dB = orders.gradient_B(dy, cast(Tensor, p), scaling, grad_dtype)
    if needs.bias:
        dbias = dy.sum(0, dtype=stat_dtype(dy.dtype))
    ds = orders.gradient_S(dy, lora_B, scaling)
    dg, du, h = gated_mlp.gated_backward(g, u, dh.addmm_(ds, lora_A), in_place, activation)
    if needs.lora_A:
        dA = orders.gradient_A(ds, h, grad_dtype)
    return dg, du, Grads(None, dA, dB, None, None, dbias)


def updated_down_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    updates: gated_mlp.Updates,
    p: Tensor | None,
    layer: Record,
    needs: Needs,
    needs_gradients: bool,
    in_place: bool,
    activation: str,
    grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor], Grads]:
    """`down_backward` for g and u without their updates, which the kernels add.

    Returns dg, du, dB of gate and up if the kernel summed them, else none, and the gradients of the
    down-projection.

    Args:
        p: P [M, R] of the down-projection; None if neither dB nor a gate's gradient is needed.
        needs_gradients: whether dB of gate or up is needed.
    """
    lora_A, lora_B, gate = layer.lora_A, layer.lora_B, layer.rank_gate
    dA = dB = dgate = dbias = dh = None
    if needs.x:  # while nothing is held beside a decoded weight
        dh = mm(dy, dense(layer, dy.dtype))
    if needs.bias:
        dbias = dy.sum(0, dtype=stat_dtype(dy.dtype))
    if needs.lora_B:
        s = cast(Tensor, p)
        s = s if gate is None else to_dtype(s * gate, dy.dtype)
        dB = orders.gradient_B(dy, s, layer.scaling, grad_dtype)
    if not (needs.x or needs.lora_A or needs.rank_gate):
        return None, None, (), Grads(None, None, dB, None, None, dbias)
    if gate is None:
        ds = orders.gradient_S(dy, lora_B, layer.scaling)
    else:
        wide_ds = products.shrink(dy, lora_B, 1, layer.scaling)
        if needs.rank_gate:
            dgate = (wide_ds * cast(Tensor, p)).sum(0)
        ds = to_dtype(wide_ds * gate, dy.dtype)
    if dh is None:
        if needs.lora_A:
            product = gated_mlp.gated_update(g, u, updates, activation)
            dA = orders.gradient_A(ds, product, grad_dtype)
        return None, None, (), Grads(None, dA, dB, dgate, None, dbias)
    needs_gradients = needs_gradients or needs.lora_A
    dg, du, h, partials = gated_mlp.gated_update_backward(
        g, u, dh, updates, ds, lora_A, needs_gradients, in_place, activation
    )
    dBs: Sequence[Tensor] = ()
    if partials is not None:
        del dh, h  # before float32 gradients
        ranks = lora_A.shape[0], updates.b_gate.shape[1], updates.b_up.shape[1]
        sum_of_A, *dBs = gated_mlp.sum_partials(partials, ranks, grad_dtype)
        dA = sum_of_A if needs.lora_A else None
    elif needs.lora_A:
        dA = orders.gradient_A(ds, cast(Tensor, h), grad_dtype)
    return dg, du, dBs, Grads(None, dA, dB, dgate, None, dbias)
