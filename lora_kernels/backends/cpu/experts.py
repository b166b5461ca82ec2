"""Mixtures of experts by the native CPU kernels, one native call for each direction; see `cpu`.

Threads: an expert with more than half a thread's share of the rows takes all threads, and the
others take one thread each. Without fused kernels ("library"), torch.mm runs the base GEMM of each
expert that has more than a few rows. A 4-bit stack is decoded one expert at a time unless each
expert begins a block of codes and of nested scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...core.call import ExpertsGrads, ExpertsNeeds, ExpertsOperands, ExpertsSpec, Saved
from ...core.codes import Codes
from ...core.dtypes import DTYPE_NUMBERS, to_dtype
from .. import decoder
from ..experts import expert_offsets, largest_rank, runs, weight_of
from . import heuristics as cpu_heuristics
from . import native
from .linear import FUSED, pack_dropout, pack_rows, pointer, rows_of_any, vector


class _Stack(NamedTuple):
    """A stack of weights as the native kernels take it.

    Args:
        tensor: dense, which owns the memory, or None.
        matrix, codes: the first expert's, dense or 4-bit; the other is None.
        expert_stride: elements from one expert to the next.
        table_stride: of the codes' scales; 0 if one table serves all experts.
        few_rows: the most rows of an expert for the GEMV kernel.
        is_fused: whether the kernels compute the other experts' base GEMM too.
    """

    tensor: Tensor | None
    matrix: tuple[int, int, int, int] | None
    codes: object
    expert_stride: int
    table_stride: int
    few_rows: int
    is_fused: bool


def _pack_stack(operands: ExpertsOperands, spec: ExpertsSpec, strategy: str) -> _Stack:
    weight, (E, N, _), K = operands.weight, operands.lora_B[0].shape, operands.x.shape[1]
    if isinstance(weight, Codes):
        shape = (E * K, N) if spec.transposed else (E * N, K)
        is_aligned = _is_block_aligned(weight, N * K)
        can_gemv = is_aligned and not spec.transposed
        few = cpu_heuristics.few_rows(spec.dtype, True, N * K) if can_gemv else 0
        codes = decoder.native_view(weight, shape)
        table = weight.nested_code
        tables = 0 if table is None or table.dim() == 1 else table.stride(0)
        return _Stack(None, None, codes, N * K, tables, few, is_aligned and strategy == FUSED)
    w = to_dtype(cast(Tensor, weight), spec.dtype)
    if w.stride(2) != 1 and w.stride(1) != 1:
        w = w.contiguous()
    step, row, column = w.stride()
    few = cpu_heuristics.few_rows(spec.dtype, False, N * K) if column == 1 else 0
    matrix = w.data_ptr(), DTYPE_NUMBERS[w.dtype], row, column
    return _Stack(w, matrix, None, step, 0, few, strategy == FUSED)


def _is_block_aligned(weight: Codes, elements: int) -> bool:
    """Return True if each expert of so many elements begins a block, and one of nested scales."""
    nested = weight.nested_blocksize if weight.nested_absmax is not None else 1
    return elements % (weight.blocksize * nested) == 0


class _Arguments(NamedTuple):
    """The arguments of both directions, and the tensors that own the memory they point to."""

    layer: tuple[Any, ...]
    experts: tuple[Any, ...]
    tenants: tuple[tuple[Any, ...], ...]
    stack: _Stack
    tensors: tuple[Tensor | None, ...]


def _pack(
    operands: ExpertsOperands,
    spec: ExpertsSpec,
    strategy: str,
    dA: Sequence[Tensor | None] | None = None,
    dB: Sequence[Tensor | None] | None = None,
) -> _Arguments:
    """Pack the first expert's layer, the steps from one expert to the next, and the tenants."""
    x, _, lora_A, lora_B, offsets, bias, rng, *_ = operands
    (M, K), (E, N, _), stack = x.shape, lora_B[0].shape, _pack_stack(operands, spec, strategy)
    lora_A = [A if A.stride(2) == 1 else A.contiguous() for A in lora_A]
    lora_B = [B if 1 in B.stride()[1:] or _is_interleaved(B) else B.contiguous() for B in lora_B]
    stops, bias = to_dtype(offsets, torch.int64).contiguous(), vector(bias)
    places = None if rng is None else torch.arange(M)
    mask, keep_scale = pack_dropout(spec.dropout_p, rng, places)
    sizes, factors = (M, K, N, largest_rank(operands.lora_A)), (0, 0, pointer(bias))
    adapter, threads = (None, None, 0.0), torch.get_num_threads()
    layer = (stack.matrix, stack.codes, *sizes, *adapter, *factors, mask, keep_scale, threads)
    steps = stack.expert_stride, stack.table_stride, N
    how = spec.transposed, stack.few_rows, stack.is_fused
    experts = E, len(lora_A), stops.data_ptr(), *steps, *how
    nothing = [None] * len(lora_A)
    tenants = tuple(map(_pack_tenant, lora_A, lora_B, spec.scaling, dA or nothing, dB or nothing))
    return _Arguments(layer, experts, tenants, stack, (*lora_A, *lora_B, stops, bias, places))


def _is_interleaved(B: Tensor) -> bool:
    """Return True if the expert is the innermost index of B [E, N, R], as PEFT stores it."""
    E, _, R = B.shape
    return B.stride() == (1, R * E, E)


def _new_grad(t: Tensor) -> Tensor:
    """Return memory of t's shape: contiguous, or as PEFT stores lora_B if t is."""
    if _is_interleaved(t) and 1 not in t.stride()[1:]:
        return t.new_empty(*t.shape[1:], t.shape[0]).permute(2, 0, 1)
    return t.new_empty(t.shape)


def _pack_tenant(
    A: Tensor, B: Tensor, scaling: float, dA: Tensor | None, dB: Tensor | None
) -> tuple[Any, ...]:
    a = A.data_ptr(), DTYPE_NUMBERS[A.dtype], A.stride(1), 1
    b = B.data_ptr(), DTYPE_NUMBERS[B.dtype], B.stride(1), B.stride(2)
    return a, b, A.stride(0), B.stride(0), A.shape[1], scaling, pointer(dA), pointer(dB)


def lora_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] in spec.y_dtype, zero in rows of no expert; P is float32 [M, R]."""
    assert native.module is not None
    (M, K), N, R = operands.x.shape, operands.lora_B[0].shape[1], largest_rank(operands.lora_A)
    x, x_row = rows_of_any(operands.x, K)
    xs, y = to_dtype(x, spec.dtype), x.new_empty(M, N, dtype=spec.y_dtype)
    # A tenant's rows of P end at its rank.
    new = x.new_empty if len(operands.lora_A) == 1 else x.new_zeros
    p = new((M, R), dtype=torch.float32)
    args = _pack(operands, spec, strategy)
    if not args.stack.is_fused:
        for e, rows in runs(expert_offsets(operands)):
            if rows.stop - rows.start > args.stack.few_rows:
                w = to_dtype(cast(Tensor, weight_of(operands, spec, e, spec.dtype)), spec.dtype)
                y[rows] = torch.mm(xs[rows], w.t())
    x_rows = pack_rows(x, x_row)
    base_rows = x_rows if xs is x else pack_rows(xs, K)
    few_rows, z = False, 0  # few_rows is decided for each expert; z is for a column scale
    outputs = p.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[y.dtype], z
    forward = x_rows, base_rows, few_rows, *outputs
    native.module.lora_experts(args.layer, args.experts, args.tenants, forward)
    return y, Saved(p)


def lora_experts_backward(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
) -> ExpertsGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    assert native.module is not None
    K, (E, N, _) = operands.x.shape[1], operands.lora_B[0].shape
    x, x_row = rows_of_any(operands.x, K)
    dy, dy_row = rows_of_any(dy, N)
    dz = to_dtype(dy, spec.dtype) if needs.x else dy
    dx = x.new_empty(operands.x.shape) if needs.x else None
    dA, dB = (
        [_new_grad(t) if need else None for t, need in zip(tensors, need_each, strict=True)]
        for tensors, need_each in ((operands.lora_A, needs.lora_A), (operands.lora_B, needs.lora_B))
    )
    dbias = saved.p.new_empty(E, N) if needs.bias else None  # float32, as P
    args = _pack(operands._replace(bias=None), spec, strategy, dA, dB)
    if dx is not None and not args.stack.is_fused:
        for e, rows in runs(expert_offsets(operands)):
            w = to_dtype(cast(Tensor, weight_of(operands, spec, e, spec.dtype)), spec.dtype)
            dx[rows] = torch.mm(dz[rows], w)
    dy_rows = pack_rows(dy, dy_row)
    base_rows = dy_rows if dz is dy else pack_rows(dz, N)
    gradients = pointer(dx), 0, 0, 0, 0, pointer(dbias)  # of each tenant A's and B's
    backward = dy_rows, base_rows, pack_rows(x, x_row), saved.p.data_ptr(), 0, *gradients
    native.module.lora_experts_backward(args.layer, args.experts, args.tenants, backward)
    return ExpertsGrads(dx, dA, dB, dbias)
