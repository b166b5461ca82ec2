"""Mixtures of experts in PyTorch's GEMMs, on any device and in any floating dtype.

On a GPU, `torch.nn.functional.grouped_mm` runs a call. It needs 16-bit or float32 operands whose
rows are multiples of 16 bytes. For bfloat16 on a GPU of compute capability 9 or 10 it is one kernel
that reads the offsets on the GPU, and the host does not wait. Elsewhere PyTorch waits for the
offsets and multiplies one expert at a time. A 4-bit weight is decoded in pieces (`quantized_stack`)
where the host need not wait, and a call with fewer rows than experts decodes those experts alone,
by `torch.bmm` in place of `grouped_mm`, on any GPU.
Rounding points: the adapter, P and dS to the dtype of the base GEMM; each gradient from that dtype;
y after the base GEMM and after the low-rank update. From `fold_rows` on, W + s·B·A of all experts
takes the place of the update, and is rounded; P is computed for dB alone.

Otherwise the eager backend's `lora_linear` runs once for each expert, with its rounding points. On
a GPU the host waits for the offsets. One expert of a 4-bit weight is decoded at a time; the whole
stack, if a block of codes straddles two experts. `loop_reason` says why a call runs so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...core import device
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
from ...core.codes import Codes
from ...core.dropout import dropout_mask, dropout_scale
from ...core.dtypes import stat_dtype
from .. import decoder
from ..experts import expert_offsets, largest_rank, runs, weight_of
from ..library import is_on_gpu_path
from . import linear as eager
from .quantized_stack import ALIGNED, build_stack, chosen_experts, expert_of_rows, uncut_reason

MOST_GROUPS = 1023  # of PyTorch's kernel


def loop_reason(operands: ExpertsOperands, spec: ExpertsSpec) -> str | None:
    """Return why a call runs expert by expert; None if `grouped_mm` runs it.

    Of a 4-bit call with fewer rows than experts it is the reason for the backward alone.
    """
    x, weight, (lora_B, *_) = operands.x, operands.weight, operands.lora_B
    (E, N, R), K = lora_B.shape, x.shape[1]
    if not is_on_gpu_path(x.device.type):
        return "on a CPU"
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not take {spec.dtype}"
    if any(size * spec.dtype.itemsize % ALIGNED for size in (R, K, N)):
        return f"grouped_mm needs rows of {ALIGNED} bytes; rank {R}, in {K}, out {N} are no such"
    if E > MOST_GROUPS:
        return f"grouped_mm takes at most {MOST_GROUPS} experts"
    if isinstance(weight, Codes):
        return waits_reason(x.device, spec.dtype) or uncut_reason(operands, spec)
    if weight is None or _is_aligned(weight):
        return None
    return "the weight's strides are not aligned"


def fold_rows(operands: ExpertsOperands, spec: ExpertsSpec) -> int | None:
    """Return the number of rows from which W + s·B·A of all experts is computed; None for never.

    In elements that a training step moves, and in FLOPs, a GPU's two orders differ in

    - the low-rank update of y and of dx: 4·M·(N + K), written, and added to the base's result by
      two reads and a write; 2·M·R·(N + K).
    - W + s·B·A in both directions: 8·E·N·K, a copy of W that a GEMM updates in place; 4·E·N·K·R.
      Of a 4-bit stack, whose decoded form is updated, 4·E·N·K, and beside it 2·M·(N + K) where
      pieces of y and dx are copied.

    Both counts are lower from 2·E·N·K / (N + K) rows on, of a stack in one piece the FLOPs alone
    set this bound. The rest is the same: dA and dB come from P = x·Aᵀ and dY·B. Dropout acts on
    the adapter's x alone, so W + s·B·A does not exist.
    """
    E, N, R = operands.lora_B[0].shape
    K = operands.x.shape[1]
    if not R or spec.dropout_p or operands.weight is None or not is_grouped(operands, spec):
        return None
    return 2 * E * N * K // (N + K) + 1


def is_folded(operands: ExpertsOperands, spec: ExpertsSpec) -> bool:
    """Return True if a call computes W + s·B·A, alike in the forward, its recomputation and the
    backward: it depends on sizes and layouts alone."""
    least = fold_rows(operands, spec)
    return least is not None and operands.x.shape[0] >= least


def waits_reason(where: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `grouped_mm` waits for the offsets on a device and multiplies one expert at a
    time; None if it is one kernel. PyTorch's `_grouped_mm_cuda` decides so."""
    if dtype is not torch.bfloat16:
        return f"PyTorch's kernel for all experts takes bfloat16, not {dtype}"
    if where.type in ("meta", "cpu"):  # `as_on_gpu`'s; both stand for an H100
        return None
    if where.type != "cuda":
        return f"whether PyTorch has a kernel for all experts on {where.type} is not known"
    gpu = device.gpu(where.index)
    if gpu.kind == "cuda" and gpu.capability // 10 in (9, 10):
        return None
    return f"PyTorch's kernel for all experts does not run on {gpu.name}"


def is_grouped(operands: ExpertsOperands, spec: ExpertsSpec) -> bool:
    """Return True if `grouped_mm` runs the call."""
    return loop_reason(operands, spec) is None


def _is_aligned(t: Tensor) -> bool:
    """Return True if `grouped_mm` reads t as it is: one of the last two strides is 1, and the
    others, and the address, are multiples of `ALIGNED` bytes."""
    strides = list(t.stride())
    if 1 not in strides[-2:]:
        return False
    strides.remove(1)
    aligned = all(stride * t.element_size() % ALIGNED == 0 for stride in strides)
    return aligned and (t.is_meta or t.data_ptr() % ALIGNED == 0)


def _align(t: Tensor) -> Tensor:
    return t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format)


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's rows of a, or columns if b is a matrix, by its part of b.

    Operands that are not aligned, as PEFT's lora_B, are copied. Columns that are summed in groups
    stay apart in memory: side by side the kernel wants groups of 16 bytes.
    """
    a = _align(a) if b.dim() == 3 else _align(a.t()).t()
    offsets = offsets.to(torch.int32)
    if offsets.stride(0) != 1:  # which PyTorch refuses, for a single expert too
        offsets = offsets.clone(memory_format=torch.contiguous_format)
    product: Tensor = functional.grouped_mm(a, _align(b), offs=offsets)
    return product


def _zero_rows_of_no_expert(t: Tensor, offsets: Tensor, spec: ExpertsSpec) -> Tensor:
    """Zero the rows after the last expert's in place: `grouped_mm` leaves them undefined."""
    if not spec.has_tail:
        return t
    rows = torch.arange(t.shape[0], device=t.device)[:, None]
    return t.masked_fill_(rows >= offsets[-1], 0)


def _multiply(a: Tensor, stack: Tensor, offsets: Tensor, chosen: Tensor | None) -> Tensor:
    """Multiply each row of a by its expert's matrix.

    stack: [E, .., ..], or with `chosen` one matrix for each row.
    """
    if chosen is None:
        return _grouped_mm(a, stack, offsets)
    return torch.bmm(a[:, None], stack)[:, 0]


def _of_rows(stack: Tensor, chosen: Tensor | None) -> Tensor:
    return stack if chosen is None else stack.index_select(0, chosen)


def _add_base(
    a: Tensor,
    operands: ExpertsOperands,
    spec: ExpertsSpec,
    chosen: Tensor | None,
    update: Callable[[], Tensor] | None,
    backward: bool = False,
) -> Tensor:
    """Return a·Wᵀ, in the backward a·W, by each row's expert, plus the update.

    Args:
        chosen: the experts that are decoded, of `chosen_experts`.
        update: computes the low-rank update, which is overwritten; None for no adapters, or if
            W is W + s·B·A.
    """
    weight, offsets = operands.weight, operands.offsets
    folds = update is None and is_folded(operands, spec)
    if weight is None:
        assert update is not None  # experts without a base have adapters
        return update()
    if isinstance(weight, Codes):
        stack = build_stack(operands, spec, chosen, backward)

        def decode(piece: slice) -> Tensor:
            matrices = stack.decode(piece)
            return _fold_(matrices, operands, spec, piece, backward) if folds else matrices

        if len(stack.pieces) > 1:  # the update first: then no piece needs a pass of its own
            width = stack.shape[stack.axis]
            out = a.new_empty(a.shape[0], width) if update is None else update()
            for piece in stack.pieces:
                part = out[:, piece]
                put = part.copy_ if update is None else part.add_
                put(_multiply(a, decode(piece), offsets, chosen))  # no name keeps a piece
            return out
        base = _multiply(a, decode(stack.pieces[0]), offsets, chosen)
    else:
        dense = weight.to(spec.dtype, copy=folds)
        matrices = dense if backward else dense.mT
        if folds:
            _fold_(matrices, operands, spec, slice(None), backward)
        base = _grouped_mm(a, matrices, offsets)
    return base if update is None else base.add_(update())


def _fold_(
    matrices: Tensor, operands: ExpertsOperands, spec: ExpertsSpec, piece: slice, backward: bool
) -> Tensor:
    """Add s·B·A to the matrices [E, in, piece of out] of a base GEMM in place."""
    A, B = (stacks[0].to(spec.dtype) for stacks in (operands.lora_A, operands.lora_B))
    left, right = (B, A) if backward else (A.mT, B.mT)
    return matrices.baddbmm_(left, right[:, :, piece], alpha=spec.scaling[0])


class _Part(NamedTuple):
    """A part of a call for several tenants."""

    operands: ExpertsOperands
    spec: ExpertsSpec


def _split_tenants(operands: ExpertsOperands, spec: ExpertsSpec) -> tuple[_Part, _Part]:
    """Return the call of the base, grouped by expert, and that of the adapters without a base,
    grouped by expert and tenant. Each has one tenant.

    The adapters are copied into one tensor, to the largest rank.
    """
    (E, N, _), K = operands.lora_B[0].shape, operands.x.shape[1]
    scaling = max(spec.scaling, key=abs) or 1.0  # the largest, so that no ratio overflows B
    base = operands._replace(
        lora_A=[operands.lora_A[0].new_empty(E, 0, K)],
        lora_B=[operands.lora_B[0].new_empty(E, N, 0)],
        offsets=expert_offsets(operands),
        rng=None,
        mask=None,
    )
    rank = largest_rank(operands.lora_A)
    As, Bs = [], []
    for A, B, factor in zip(operands.lora_A, operands.lora_B, spec.scaling, strict=True):
        B = B * (factor / scaling) if factor != scaling else B
        As.append(functional.pad(A, (0, 0, 0, rank - A.shape[1])) if A.shape[1] < rank else A)
        Bs.append(functional.pad(B, (0, rank - B.shape[2])) if B.shape[2] < rank else B)
    lora_A, lora_B = (torch.stack(stacks, dim=1).flatten(0, 1) for stacks in (As, Bs))
    adapters = operands._replace(weight=None, bias=None, lora_A=[lora_A], lora_B=[lora_B])
    one = spec._replace(scaling=(scaling,))
    return _Part(base, one._replace(dropout_p=0.0)), _Part(adapters, one)


def lora_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    if len(operands.lora_A) > 1:
        base, adapters = _split_tenants(operands, spec)
        y, _ = lora_experts(*base, strategy)
        update, saved = lora_experts(*adapters, strategy)
        return y.add_(update), saved
    x, (lora_A,), (lora_B,), bias = operands.x, operands.lora_A, operands.lora_B, operands.bias
    (scaling,), dropout_p, dtype, y_dtype = spec[:4]
    chosen = chosen_experts(operands, spec) if is_on_gpu_path(x.device.type) else None
    if chosen is not None or is_grouped(operands, spec):
        return _grouped_forward(operands, spec, chosen)
    operands = _with_plain_scales(operands)
    y = x.new_zeros(x.shape[0], lora_B.shape[1], dtype=y_dtype)
    p = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=stat_dtype(dtype))
    expert_spec = Spec(scaling, dropout_p, dtype, y_dtype)
    draws = dropout_p and operands.rng is None and operands.mask is None
    drawn = eager.drop(x, dropout_p).mask if draws else None
    applied_mask = _mask(operands, spec) if drawn is None else drawn
    for e, rows in runs(operands.offsets):
        expert_operands = Operands(
            x[rows],
            weight_of(operands, spec, e, dtype),
            lora_A[e],
            lora_B[e],
            bias=None if bias is None else bias[e],
            mask=None if applied_mask is None else applied_mask[rows],
        )
        y[rows], saved = eager.lora_linear(expert_operands, expert_spec, strategy)
        p[rows] = saved.p
    return y, Saved(p, None, drawn)


def _grouped_forward(
    operands: ExpertsOperands, spec: ExpertsSpec, chosen: Tensor | None
) -> tuple[Tensor, Saved]:
    x, _, (lora_A,), (lora_B,), offsets, *_ = operands
    (scaling,), dropout_p, dtype, y_dtype = spec[:4]
    M, R, bias = x.shape[0], lora_A.shape[1], operands.bias
    dropped, factor, drawn = eager.drop(x, dropout_p, operands.rng, operands.mask)
    p, update = x.new_zeros(M, R, dtype=stat_dtype(dtype)), None
    if R:
        A, B = (_of_rows(t, chosen).to(dtype).mT for t in (lora_A, lora_B))
        p = _multiply(dropped.to(dtype), A, offsets, chosen).to(p.dtype)
        if not is_folded(operands, spec):
            s = (p * (scaling * factor)).to(dtype)
            if bias is not None and chosen is None:
                s, B, bias = *_with_bias(s, B, bias), None
            update = functools.partial(_multiply, s, B, offsets, chosen)
        p = _zero_rows_of_no_expert(p * factor if factor != 1.0 else p, offsets, spec)
    del dropped
    y = _add_base(x.to(dtype), operands, spec, chosen, update)
    if bias is not None:
        y += bias[expert_of_rows(offsets, M) if chosen is None else chosen]
    return _zero_rows_of_no_expert(y, offsets, spec).to(y_dtype), Saved(p, None, drawn)


def _with_bias(s: Tensor, B: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the update and the bias: a column of ones in s [M, R], and the bias as
    a row of B [E, R, N]. Their rows stay aligned. A bias that is gathered takes passes over y."""
    (M, _), (E, _, N), more = s.shape, B.shape, ALIGNED // s.element_size()
    columns, rows = s.new_zeros(M, more), B.new_zeros(E, more, N)
    columns[:, 0], rows[:, 0] = 1, bias
    return torch.cat([s, columns], 1), torch.cat([B, rows], 1)


def _with_plain_scales(operands: ExpertsOperands) -> ExpertsOperands:
    """Decode the nested scales of a GPU's 4-bit weight once for all experts."""
    weight = operands.weight
    if not isinstance(weight, Codes) or not is_on_gpu_path(operands.x.device.type):
        return operands
    return operands._replace(weight=decoder.with_plain_scales(weight))


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
    if len(operands.lora_A) > 1:
        return _backward_of_tenants(dy, operands, saved, spec, needs, strategy)
    if is_grouped(operands, spec):
        return _grouped_backward(dy, operands, saved, spec, needs)
    x, (lora_A,), (lora_B,) = operands.x, operands.lora_A, operands.lora_B
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs.x else None
    dA, dB = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
        for t, (need,) in ((lora_A, needs.lora_A), (lora_B, needs.lora_B))
    )
    dbias = x.new_zeros(lora_B.shape[:2], dtype=saved.p.dtype) if needs.bias else None
    expert_spec = Spec(spec.scaling[0], spec.dropout_p, spec.dtype, spec.y_dtype)
    expert_needs = Needs(needs.x, needs.lora_A[0], needs.lora_B[0], bias=needs.bias)
    mask = _mask(operands, spec)
    operands = _with_plain_scales(operands) if needs.x else operands
    for e, rows in runs(operands.offsets):
        base = weight_of(operands, spec, e, spec.dtype) if needs.x else None
        expert_operands = Operands(
            x[rows], base, lora_A[e], lora_B[e], mask=None if mask is None else mask[rows]
        )
        expert_saved = Saved(saved.p[rows])
        grads = eager.lora_linear_backward(
            dy[rows], expert_operands, expert_saved, expert_spec, expert_needs, strategy
        )
        for grads_of_all, index, grad in (
            (dx, rows, grads.x),
            (dA, e, grads.lora_A),
            (dB, e, grads.lora_B),
            (dbias, e, grads.bias),
        ):
            if grads_of_all is not None:
                grads_of_all[index] = cast(Tensor, grad)
    return ExpertsGrads(dx, [dA], [dB], dbias)


def _backward_of_tenants(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
) -> ExpertsGrads:
    base, adapters = _split_tenants(operands, spec)
    of_base = ExpertsNeeds(needs.x, [False], [False], needs.bias)
    grads_of_base = lora_experts_backward(dy, base[0], saved, base[1], of_base, strategy)
    of_adapters = ExpertsNeeds(needs.x, [any(needs.lora_A)], [any(needs.lora_B)])
    grads = lora_experts_backward(dy, adapters[0], saved, adapters[1], of_adapters, strategy)
    dx = grads_of_base.x
    if dx is not None:
        dx.add_(cast(Tensor, grads.x))
    factors = [scaling / adapters.spec.scaling[0] for scaling in spec.scaling]
    dA = _split_grad(grads.lora_A[0], operands.lora_A, needs.lora_A, [1.0] * len(factors))
    dB = _split_grad(grads.lora_B[0], operands.lora_B, needs.lora_B, factors)
    return ExpertsGrads(dx, dA, dB, grads_of_base.bias)


def _split_grad(
    grad: Tensor | None,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    factors: Sequence[float],
) -> list[Tensor | None]:
    """Return the gradients of the tenants' parameters, whose stack `_split_tenants` builds."""
    if grad is None:
        return [None] * len(parameters)
    tenants = grad.unflatten(0, (-1, len(parameters))).unbind(1)
    grads = []
    for t, parameter, need, factor in zip(tenants, parameters, needs, factors, strict=True):
        part = t[:, : parameter.shape[1], : parameter.shape[2]]
        grads.append(torch.mul(part, factor).contiguous() if need else None)
    return grads


def _grouped_backward(
    dy: Tensor, operands: ExpertsOperands, saved: Saved, spec: ExpertsSpec, needs: ExpertsNeeds
) -> ExpertsGrads:
    x, _, (lora_A,), (lora_B,), offsets, *_ = operands
    (scaling,), dropout_p, dtype = spec[:3]
    (need_A,), (need_B,) = needs.lora_A, needs.lora_B
    rng, mask = operands.rng, operands.mask
    dx = dA = dB = dbias = None
    R, dz = lora_A.shape[1], dy.to(dtype).contiguous()
    if needs.bias:
        ones = dz.new_ones(dz.shape[0], ALIGNED)
        dbias = _grouped_mm(dz.t(), ones, offsets)[:, :, 0].to(saved.p.dtype)
    factor = 1.0 if rng is None else dropout_scale(dropout_p)
    if need_B:
        s = (saved.p * scaling).to(dtype)
        dB = _grouped_mm(dz.t(), s, offsets).to(lora_B.dtype)
    dxa = None
    if R and (need_A or needs.x):
        dxa = _grouped_mm(dz, lora_B.to(dtype), offsets) * (scaling * factor)
    if need_A:
        assert dxa is not None  # only experts without adapters have R = 0
        dropped = eager.drop(x, dropout_p, rng, mask).x.to(dtype)
        dA = _grouped_mm(dxa.t(), dropped, offsets).to(lora_A.dtype)
    if needs.x:

        def update() -> Tensor:
            narrow = _grouped_mm(cast(Tensor, dxa), lora_A.to(dtype), offsets)
            return eager.drop(narrow, dropout_p, rng, mask).x

        chosen = chosen_experts(operands, spec)
        is_updated = R and not is_folded(operands, spec)
        dx = _add_base(dz, operands, spec, chosen, update if is_updated else None, backward=True)
        dx = _zero_rows_of_no_expert(dx, offsets, spec).to(x.dtype)
    return ExpertsGrads(dx, [dA], [dB], dbias)
