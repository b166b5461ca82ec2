"""Mixtures of experts by the native CPU kernels, one native call for each direction; see `cpu`.

Threads: an expert with more than half a thread's share of the rows takes all threads, and the
others take one thread each. Without fused kernels ("library"), torch.mm runs the base GEMM of each
expert that has more than a few rows. A 4-bit stack is decoded one expert at a time unless each
expert begins a block of codes and of nested scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...core.call import ExpertsGrads, ExpertsNeeds, ExpertsOperands, ExpertsSpec, Saved
from ...core.dtypes import DTYPE_NUMBERS, to_dtype
from ...core.packed4bit import Packed4bit
from .. import decode4bit
from ..experts import runs, split_tenants, weight_of
from . import heuristics as cpu_heuristics
from . import native
from .linear import FUSED, pack_dropout, pack_rows, pointer, rows_of_any, vector


class _Stack(NamedTuple):
    """A stack of weights as the native kernels take it.

    Args:
        tensor: dense, which owns the memory, or None.
        matrix, codes: the first expert's, dense or 4-bit; the other is None, and both without a
            base.
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
    weight, (E, N, _), K = operands.weight, operands.lora_B.shape, operands.x.shape[1]
    if weight is None:
        return _Stack(None, None, None, 0, 0, 0, False)
    if isinstance(weight, Packed4bit):
        shape = (E * K, N) if spec.transposed else (E * N, K)
        is_aligned = _is_block_aligned(weight, N * K)
        can_gemv = is_aligned and not spec.transposed
        few = cpu_heuristics.few_rows(spec.dtype, True, N * K) if can_gemv else 0
        codes = decode4bit.native_view(weight, shape)
        table = weight.nested_code
        tables = 0 if table is None or table.dim() == 1 else table.stride(0)
        return _Stack(None, None, codes, N * K, tables, few, is_aligned and strategy == FUSED)
    w = to_dtype(weight, spec.dtype)
    if w.stride(2) != 1 and w.stride(1) != 1:
        w = w.contiguous()
    step, row, column = w.stride()
    few = cpu_heuristics.few_rows(spec.dtype, False, N * K) if column == 1 else 0
    matrix = w.data_ptr(), DTYPE_NUMBERS[w.dtype], row, column
    return _Stack(w, matrix, None, step, 0, few, strategy == FUSED)


def _is_block_aligned(weight: Packed4bit, elements: int) -> bool:
    """Return True if each expert of so many elements begins a block, and one of nested scales."""
    nested = weight.nested_blocksize if weight.nested_absmax is not None else 1
    return elements % (weight.blocksize * nested) == 0


class _Call(NamedTuple):
    """The arguments of both directions, and the tensors that own the memory they point to."""

    layer: tuple[Any, ...]
    experts: tuple[Any, ...]
    stack: _Stack
    tensors: tuple[Tensor | None, ...]


def _pack(operands: ExpertsOperands, spec: ExpertsSpec, strategy: str) -> _Call:
    """Pack the first expert's layer, and the steps from one expert to the next."""
    x, _, lora_A, lora_B, offsets, bias, rng, *_ = operands
    (M, K), (E, N, R), stack = x.shape, lora_B.shape, _pack_stack(operands, spec, strategy)
    lora_A = lora_A if lora_A.stride(2) == 1 else lora_A.contiguous()
    stops, bias = to_dtype(offsets, torch.int64).contiguous(), vector(bias)
    places = None if rng is None else torch.arange(M)
    a = lora_A.data_ptr(), DTYPE_NUMBERS[lora_A.dtype], lora_A.stride(1), 1
    b = lora_B.data_ptr(), DTYPE_NUMBERS[lora_B.dtype], lora_B.stride(1), lora_B.stride(2)
    mask, keep_scale = pack_dropout(spec.dropout_p, rng, places)
    factors, sizes = (0, 0, pointer(bias)), (M, K, N, R)
    adapter, threads = (a, b, spec.scaling), torch.get_num_threads()
    layer = (stack.matrix, stack.codes, *sizes, *adapter, *factors, mask, keep_scale, threads)
    of_weight, of_grads = (stack.expert_stride, stack.table_stride), (R * K, N * R)
    steps = *of_weight, lora_A.stride(0), lora_B.stride(0), N, *of_grads
    how = spec.transposed, stack.few_rows, stack.is_fused
    owners = lora_A, lora_B, stops, bias, places
    return _Call(layer, (E, stops.data_ptr(), *steps, *how), stack, owners)


def lora_experts(
    operands: ExpertsOperands, spec: ExpertsSpec, strategy: str
) -> tuple[Tensor, Saved]:
    """Compute y [M, N] in spec.y_dtype, zero in rows of no expert; P is float32 [M, R]."""
    (M, _), (_, N, _) = operands.x.shape, operands.lora_B.shape
    y = operands.x.new_empty(M, N, dtype=spec.y_dtype)
    if spec.tenants == 1:
        return y, _forward(operands, spec, strategy, y)
    base, adapters = split_tenants(operands, spec)
    _forward(*base, strategy, y)
    return y, _forward(*adapters, strategy, y)


def _forward(operands: ExpertsOperands, spec: ExpertsSpec, strategy: str, y: Tensor) -> Saved:
    """Compute y, which without a weight holds the base GEMM and the bias."""
    assert native.module is not None
    (M, K), R, weight = operands.x.shape, operands.lora_A.shape[1], operands.weight
    x, x_row = rows_of_any(operands.x, K)
    xs, p = to_dtype(x, spec.dtype), x.new_empty(M, R, dtype=torch.float32)
    call = _pack(operands, spec, strategy)
    if weight is not None and not call.stack.is_fused:
        for e, rows in runs(operands.offsets):
            if rows.stop - rows.start > call.stack.few_rows:
                w = to_dtype(cast(Tensor, weight_of(operands, spec, e, spec.dtype)), spec.dtype)
                y[rows] = torch.mm(xs[rows], w.t())
    x_rows = pack_rows(x, x_row)
    base_rows = x_rows if xs is x else pack_rows(xs, K)
    few_rows, z = False, 0  # few_rows is decided for each expert; z is for a column scale
    outputs = p.data_ptr(), y.data_ptr(), DTYPE_NUMBERS[y.dtype], z
    native.module.lora_experts(call.layer, call.experts, (x_rows, base_rows, few_rows, *outputs))
    return Saved(p)


def lora_experts_backward(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
) -> ExpertsGrads:
    """Compute the gradients for dy [M, N] and x [M, K]."""
    dx = operands.x.new_empty(operands.x.shape) if needs.x else None
    if spec.tenants == 1:
        return _backward(dy, operands, saved, spec, needs, strategy, dx)
    base, adapters = split_tenants(operands, spec)
    of_base = ExpertsNeeds(needs.x, False, False, needs.bias)
    dbias = _backward(dy, base[0], saved, base[1], of_base, strategy, dx).bias
    needs = needs._replace(bias=False)
    grads = _backward(dy, adapters[0], saved, adapters[1], needs, strategy, dx)
    return grads._replace(bias=dbias)


def _backward(
    dy: Tensor,
    operands: ExpertsOperands,
    saved: Saved,
    spec: ExpertsSpec,
    needs: ExpertsNeeds,
    strategy: str,
    dx: Tensor | None,
) -> ExpertsGrads:
    """Compute the gradients. dx: None, or dx's memory, which without a weight holds the base's."""
    assert native.module is not None
    K, (E, N, R), weight = operands.x.shape[1], operands.lora_B.shape, operands.weight
    x, x_row = rows_of_any(operands.x, K)
    dy, dy_row = rows_of_any(dy, N)
    dz = to_dtype(dy, spec.dtype) if needs.x else dy
    dA = operands.lora_A.new_empty(E, R, K) if needs.lora_A else None
    dB = operands.lora_B.new_empty(E, N, R) if needs.lora_B else None
    dbias = saved.p.new_empty(E, N) if needs.bias else None  # float32, as P
    call = _pack(operands._replace(bias=None), spec, strategy)
    if dx is not None and weight is not None and not call.stack.is_fused:
        for e, rows in runs(operands.offsets):
            w = to_dtype(cast(Tensor, weight_of(operands, spec, e, spec.dtype)), spec.dtype)
            dx[rows] = torch.mm(dz[rows], w)
    dy_rows = pack_rows(dy, dy_row)
    base_rows = dy_rows if dz is dy else pack_rows(dz, N)
    gradients = (*map(pointer, (dx, dA, dB)), 0, 0, pointer(dbias))
    backward = dy_rows, base_rows, pack_rows(x, x_row), saved.p.data_ptr(), 0, *gradients
    native.module.lora_experts_backward(call.layer, call.experts, backward)
    return ExpertsGrads(dx, dA, dB, dbias)
