"""Mixtures of experts in PyTorch's GEMMs, on any device and in any floating dtype.

On a GPU, `torch.nn.functional.grouped_mm` runs a call with a dense weight. It needs 16-bit or
float32 operands whose rows are multiples of 16 bytes. The host does not wait for the offsets.
Rounding points: the adapter, P and dS to the dtype of the base GEMM; each gradient from that dtype;
y after the base GEMM and after the low-rank update.

Otherwise the eager backend's `lora_linear` runs once for each expert, with its rounding points. On
a GPU the host waits for the offsets. One expert of a 4-bit weight is decoded at a time. Neither
path allocates a temporary of E·N·K elements.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ...core.call import (
    ExpertsGrads,
    ExpertsNeeds,
    ExpertsOperands,
    ExpertsSpec,
    Needs,
    Operands,
    Saved,
    Spec,
)
from ...core.dropout import dropout_mask, dropout_scale
from ...core.dtypes import stat_dtype
from ..experts import runs, weight_of
from ..library import is_on_gpu_path
from . import linear as eager

ALIGNED = 16  # the rows of `grouped_mm`'s operands must be multiples of so many bytes


def is_grouped(operands: ExpertsOperands, spec: ExpertsSpec) -> bool:
    """Return True if `grouped_mm` runs the call."""
    x, weight, lora_A, lora_B = operands[:4]
    sizes = lora_A.shape[1], lora_A.shape[2], lora_B.shape[1]
    return (
        isinstance(weight, Tensor)
        and _is_aligned(weight)
        and is_on_gpu_path(x.device.type)
        and hasattr(functional, "grouped_mm")
        and spec.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(size * spec.dtype.itemsize % ALIGNED == 0 for size in sizes)
    )


def _is_aligned(t: Tensor) -> bool:
    """Return True if `grouped_mm` reads t as it is: one of the last two strides is 1, and the
    others, and the address, are multiples of `ALIGNED` bytes."""
    strides = list(t.stride())
    if 1 not in strides[-2:]:
        return False
    strides.remove(1)
    aligned = all(stride * t.element_size() % ALIGNED == 0 for stride in strides)
    return aligned and (t.is_meta or t.data_ptr() % ALIGNED == 0)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows of a, or columns if b is a matrix, by its part of b.

    Operands that are not aligned, as PEFT's lora_B, are copied.
    """
    a, b = (t if _is_aligned(t) else t.contiguous() for t in (a, b))
    found: Tensor = functional.grouped_mm(a, b, offs=offsets.to(torch.int32))
    return found


def _zero_rows_of_no_expert(t: Tensor, offsets: Tensor) -> Tensor:
    """Zero the rows after the last expert's in place: `grouped_mm` leaves them undefined."""
    rows = torch.arange(t.shape[0], device=t.device)[:, None]
    return t.masked_fill_(rows >= offsets[-1], 0)


def _bias_of_rows(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Return the bias [M, N] of each row's expert."""
    places = torch.arange(rows, device=bias.device)
    expert = torch.bucketize(places, offsets.contiguous(), right=True)
    return bias[expert.clamp_(max=bias.shape[0] - 1)]


def lora_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, offsets, bias, rng, mask = operands
    scaling, dropout_p, dtype, y_dtype, _ = spec
    if is_grouped(operands, spec):
        dropped, factor, drawn = eager.drop(x, dropout_p, rng, mask)
        y = _grouped_mm(x.to(dtype), cast(Tensor, weight).to(dtype).mT, offsets)
        p = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=stat_dtype(dtype))
        if lora_A.shape[1]:
            narrow = _grouped_mm(dropped.to(dtype), lora_A.to(dtype).mT, offsets)
            p = narrow.to(p.dtype)
            s = (p * (scaling * factor)).to(dtype)
            y += _grouped_mm(s, lora_B.to(dtype).mT, offsets)
            p = _zero_rows_of_no_expert(p * factor if factor != 1.0 else p, offsets)
        if bias is not None:
            y += _bias_of_rows(bias, offsets, x.shape[0])
        return _zero_rows_of_no_expert(y, offsets).to(y_dtype), Saved(p, None, drawn)
    y = x.new_zeros(x.shape[0], lora_B.shape[1], dtype=y_dtype)
    p = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=stat_dtype(dtype))
    one = Spec(scaling, dropout_p, dtype, y_dtype)
    draws = dropout_p and rng is None and mask is None
    drawn = eager.drop(x, dropout_p).mask if draws else None
    kept = _mask(operands, spec) if drawn is None else drawn
    for e, rows in runs(offsets):
        own = Operands(
            x[rows],
            weight_of(operands, spec, e, dtype),
            lora_A[e],
            lora_B[e],
            bias=None if bias is None else bias[e],
            mask=None if kept is None else kept[rows],
        )
        y[rows], saved = eager.lora_linear(own, one, strategy)
        p[rows] = saved.p
    return y, Saved(p, None, drawn)


def _mask(operands: ExpertsOperands, spec: ExpertsSpec) -> Tensor | None:
    """Return the dropout mask [M, K], generated if its state is given; None without dropout."""
    if operands.rng is None:
        return operands.mask
    M, K = operands.x.shape
    return dropout_mask(operands.rng, M, K, spec.dropout_p)


def lora_experts_backward(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
) -> ExpertsGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    if is_grouped(operands, spec):
        return _grouped_backward(dy, operands, saved, spec, needs)
    x, _, lora_A, lora_B, offsets, *_ = operands
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs.x else None
    dA, dB = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in ((lora_A, needs.lora_A), (lora_B, needs.lora_B))
    )
    dbias = x.new_zeros(lora_B.shape[:2], dtype=saved.p.dtype) if needs.bias else None
    one = Spec(spec.scaling, spec.dropout_p, spec.dtype, spec.y_dtype)
    own_needs = Needs(needs.x, needs.lora_A, needs.lora_B, bias=needs.bias)
    mask = _mask(operands, spec)
    for e, rows in runs(offsets):
        base = weight_of(operands, spec, e, spec.dtype) if needs.x else None
        own = Operands(
            x[rows], base, lora_A[e], lora_B[e], mask=None if mask is None else mask[rows]
        )
        kept = Saved(saved.p[rows])
        grads = eager.lora_linear_backward(dy[rows], own, kept, one, own_needs, strategy)
        for all_experts, at, grad in (
            (dx, rows, grads.x),
            (dA, e, grads.lora_A),
            (dB, e, grads.lora_B),
            (dbias, e, grads.bias),
        ):
            if all_experts is not None:
                all_experts[at] = cast(Tensor, grad)
    return ExpertsGrads(dx, dA, dB, dbias)


def _grouped_backward(
    dy: Tensor, operands: ExpertsOperands, saved: Saved, spec: ExpertsSpec, needs: ExpertsNeeds
) -> ExpertsGrads:
    x, weight, lora_A, lora_B, offsets, _, rng, mask = operands
    scaling, dropout_p, dtype, _, _ = spec
    dx = dA = dB = dbias = None
    R, dz = lora_A.shape[1], dy.to(dtype).contiguous()
    if needs.bias:
        ones = dz.new_ones(dz.shape[0], ALIGNED)
        dbias = _grouped_mm(dz.t(), ones, offsets)[:, :, 0].to(saved.p.dtype)
    factor = 1.0 if rng is None else dropout_scale(dropout_p)
    if needs.lora_B:
        s = (saved.p * scaling).to(dtype)
        dB = _grouped_mm(dz.t(), s, offsets).to(lora_B.dtype)
    dxa = None
    if R and (needs.lora_A or needs.x):
        dxa = _grouped_mm(dz, lora_B.to(dtype), offsets) * (scaling * factor)
    if needs.lora_A:
        assert dxa is not None  # only experts without adapters have R = 0
        dropped = eager.drop(x, dropout_p, rng, mask).x.to(dtype)
        dA = _grouped_mm(dxa.t(), dropped, offsets).to(lora_A.dtype)
    if needs.x:
        dx = _grouped_mm(dz, cast(Tensor, weight).to(dtype), offsets)
        if dxa is not None:
            dx += eager.drop(_grouped_mm(dxa, lora_A.to(dtype), offsets), dropout_p, rng, mask).x
        dx = _zero_rows_of_no_expert(dx, offsets).to(x.dtype)
    return ExpertsGrads(dx, dA, dB, dbias)
