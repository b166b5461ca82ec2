"""The functions that `ops` calls, which launch kernels on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.codes import Codes
from ...core.dtypes import DTYPE_NUMBERS
from .. import workspace
from ..launches import Plan, contiguous, planned, sum_products
from . import COOPERATIVE, launch, module
from .launch import codes, empty, matrix, of_codes, pointer, vector, whole_rows

# The smallest split of a summed dimension, a multiple of the kernel's step: of columns, of rows in
# a skinny GEMM, of rows in column sums, and of K in `gemm`.
_SPLIT, _THIN_SPLIT, _SUMS_SPLIT, _GEMM_SPLIT = 256, 1024, 64, 256
_BLOCKS = 264  # thread blocks that occupy any GPU
_GEMM_TILE = (64, 128)
_MAX_SPLITS = 8
_MAX_PUBLISHERS = 16  # splits of K for P in `decode`


@planned
def lora_linear(plan: Plan, operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng, *_ = operands
    scaling, _, dtype, y_dtype, save_z = spec
    assert weight is not None and rng is None
    M, (N, R) = x.shape[0], lora_B.shape
    y = empty(plan, M, N, dtype=y_dtype)
    z = empty(plan, M, N, dtype=y_dtype) if save_z else None
    if not M:
        return y, Saved(plan.empty(M, R), z)
    options: Any = {"out_scale": column_scale, "bias": bias, "z": z}
    linear = _Linear(plan, x, weight, lora_B.t(), y, dtype, scaling, rank_gate, **options)
    if strategy == COOPERATIVE:
        p = _decode(plan, linear, lora_A)
    else:
        p = _sum(plan, _thin(plan, x, None, False, lora_A))
        linear.run(p)
    return y, Saved(p, z)


@planned
def lora_linear_backward(
    plan: Plan,
    dy: Tensor,
    operands: Operands,
    saved: Saved,
    spec: Spec,
    needs: Needs,
    strategy: str,
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K], in the same way for each strategy."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng, *_ = operands
    (p, z, _), (scaling, _, dtype, *_) = saved, spec
    assert weight is not None and rng is None
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias, *_ = needs
    (M, N), R, K = dy.shape, p.shape[1], x.shape[1]
    dx = empty(plan, M, K, dtype=x.dtype) if need_x else None
    dA = plan.empty(*lora_A.shape, dtype=lora_A.dtype) if need_A else None
    dB = plan.empty(*lora_B.shape, dtype=lora_B.dtype) if need_B else None
    dg = plan.empty(R) if need_gate else None
    sums = None
    if need_bias or need_column_scale:
        sums = plan.empty(2, N)
        if M:
            _column_sums(plan, dy, z if need_column_scale else None, sums)
    dbias = sums[0] if sums is not None and need_bias else None
    dc = sums[1] if sums is not None and need_column_scale else None
    if not M:
        for grad in (dA, dB, dg, sums):
            if grad is not None:
                plan.call(Tensor.zero_, grad)
        return Grads(dx, dA, dB, dg, dc, dbias)
    ds, need_s = None, need_x or need_A or need_gate
    if dB is not None and need_s and R <= module().PAIR_MAX_RANK:
        ds_partials, db_partials = _pair(plan, dy, column_scale, lora_B, p)
        ds = _sum(plan, ds_partials)
        _reduce(plan, db_partials, rank_gate, scaling, dB)
    else:
        if need_s:
            ds = _sum(plan, _thin(plan, dy, column_scale, False, lora_B.t()))
        if dB is not None:
            _reduce(plan, _thin(plan, dy, column_scale, True, p.t()), rank_gate, scaling, dB)
    if dx is not None:
        assert ds is not None
        dz = dy
        if column_scale is not None:
            dz = plan.empty(M, N, dtype=dy.dtype)
            plan.call(_scale_columns, dz, dy, column_scale)
        _Linear(plan, dz, weight, lora_A, dx, dtype, scaling, rank_gate, transposed=True).run(ds)
    if dA is not None:
        assert ds is not None
        _reduce(plan, _thin(plan, x, None, True, ds.t()), rank_gate, scaling, dA.t())
    if need_gate:
        plan.call(sum_products, dg, ds, p, scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


@dataclass
class _Linear:
    """y = out_scale ⊙ (x·W + S·q) + bias, S = s_scale · gate ⊙ P; `run` takes P.

    transposed: whether the weight's rows are the inner dimension, as in dx.
    """

    plan: Plan
    x: Tensor
    weight: Tensor | Codes
    q: Tensor
    y: Tensor
    dtype: torch.dtype
    s_scale: float
    gate: Tensor | None = None
    out_scale: Tensor | None = None
    bias: Tensor | None = None
    z: Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        (M, K), (R, N) = self.x.shape, self.q.shape
        self.shape = M, N, K, R
        self.gate, self.out_scale, self.bias = (
            contiguous(self.plan, t) for t in (self.gate, self.out_scale, self.bias)
        )
        weight, stored = self.weight, self.transposed
        self.w = weight if isinstance(weight, Tensor) else None
        if self.w is not None and self.w.dtype is not self.dtype:  # as under autocast
            self.w = self.plan.copy(self.w, self.dtype)
        if self.w is not None and self.w.stride(0) == 1 != self.w.stride(1):
            self.w, stored = self.w.t(), not stored
        c = weight if isinstance(weight, Codes) else None
        vectors = {"gate": self.gate, "out_scale": self.out_scale, "bias": self.bias}
        outputs = {"y": self.y, "z": self.z}
        self.touched = {"w": self.w, "q": self.q, **vectors, **outputs}
        self.touched |= of_codes(c)
        shape = (K, N) if stored else (N, K)
        self._base = matrix(self.w), codes(c, shape), stored, DTYPE_NUMBERS[self.dtype]

    def args(self, x: Tensor, p: Tensor | None) -> tuple[object, ...]:
        """Pack the arguments that `gemm` and `decode` have in common."""
        gate, out_scale, bias = map(vector, (self.gate, self.out_scale, self.bias))
        update = pointer(p), matrix(self.q), gate, self.s_scale
        outputs = self.y, pointer(self.z), DTYPE_NUMBERS[self.y.dtype]
        return matrix(x), *self._base, *update, out_scale, bias, *outputs, *self.shape

    def run(self, p: Tensor) -> None:
        """Compute y by `gemm`."""
        x = whole_rows(self.plan, self.x, self.dtype)
        M, N, K, _ = self.shape
        tile_m, tile_n = _GEMM_TILE
        tiles = -(-M // tile_m) * -(-N // tile_n)
        most = min(_MAX_SPLITS, _BLOCKS // tiles)
        k_per_split, num_splits = _split(K, _GEMM_SPLIT, most)
        partials = empty(self.plan, num_splits, M, N) if num_splits > 1 else None
        touched = {"x": x, "p": p, "partials": partials, **self.touched}
        split_k = num_splits, pointer(partials), k_per_split
        launch.run(self.plan, "gemm", touched, self.args(x, p), *split_k)


def _decode(plan: Plan, linear: _Linear, a: Tensor) -> Tensor:
    """Compute y for few rows, and return P."""
    x, a = whole_rows(plan, linear.x), whole_rows(plan, a)
    M, _, K, R = linear.shape
    k_per_split, num_splits = _split(K, _SPLIT, _MAX_PUBLISHERS)
    partials, p = empty(plan, num_splits, M, R), empty(plan, M, R)
    flags = plan.flags()
    addresses = map(pointer, (partials, p, flags))
    down_projection = matrix(x), matrix(a), *addresses, k_per_split, num_splits
    args = linear.args(x, None), *down_projection, 0, workspace.MAX_BLOCKS
    is_kept, count = module().decode_plan(launch.with_addresses(args))
    # A product's x that exceeds shared memory is loaded by tiles; P's is never rounded.
    rounded = x if is_kept else whole_rows(plan, x, linear.dtype)
    tile_partials = empty(plan, count) if count else None
    rest = *down_projection, pointer(tile_partials), workspace.MAX_BLOCKS
    args = linear.args(rounded, None), *rest
    touched = {"x": x, "a": a, "partials": partials, "p": p, "flags": flags, **linear.touched}
    touched["tile_partials"] = tile_partials
    touched["rounded"] = rounded if rounded is not x else None
    launch.run(plan, "decode", touched, *args)
    return p


def _thin(plan: Plan, v: Tensor, v_scale: Tensor | None, over_rows: bool, y: Tensor) -> Tensor:
    """Return the partial sums [num_splits, I, R] of (v ⊙ v_scale)·yᵀ, or (v ⊙ v_scale)ᵀ·yᵀ."""
    R, J = y.shape
    I = v.shape[1] if over_rows else v.shape[0]  # noqa: E741
    blocks = -(-I // 64) * -(-R // (64 if R > 16 else 16))
    least = _THIN_SPLIT if over_rows else _SPLIT
    j_per_split, num_splits = _split(J, least, _BLOCKS // blocks)
    v_scale, out = contiguous(plan, v_scale), empty(plan, num_splits, I, R)
    touched = {"v": v, "v_scale": v_scale, "y": y, "out": out}
    operands = matrix(v), vector(v_scale), over_rows, matrix(y), out
    launch.run(plan, "thin", touched, *operands, I, J, R, j_per_split, num_splits)
    return out


def _pair(
    plan: Plan, dy: Tensor, scale: Tensor | None, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the partial sums of (dy ⊙ scale)·b and of (dy ⊙ scale)ᵀ·s, and read dy once."""
    (M, N), R = dy.shape, s.shape[1]
    num_row_tiles = -(-M // module().PAIR_ROWS)
    n_per_split, num_splits = _split(N, _SPLIT, _BLOCKS // num_row_tiles)
    partials = empty(plan, num_splits, M, R), empty(plan, num_row_tiles, N, R)
    scale = contiguous(plan, scale)
    touched = {"v": dy, "v_scale": scale, "b": b, "s": s}
    touched |= {"ds_partials": partials[0], "db_partials": partials[1]}
    operands = matrix(dy), vector(scale), matrix(b), s, *partials
    launch.run(plan, "pair", touched, *operands, M, N, R, n_per_split, num_splits, num_row_tiles)
    return partials


def _column_sums(plan: Plan, v: Tensor, z: Tensor | None, sums: Tensor) -> None:
    """Write Σ v and Σ v ⊙ z over the rows to sums, float32 [2, N]."""
    M, N = v.shape
    m_per_split, num_splits = _split(M, _SUMS_SPLIT, _BLOCKS // -(-N // 128))
    partials = empty(plan, num_splits, N, 2)
    touched, operands = {"v": v, "z": z, "partials": partials}, (matrix(v), matrix(z))
    sizes = M, N, m_per_split, num_splits
    launch.run(plan, "column_sums", touched, *operands, partials, *sizes)
    _reduce(plan, partials, None, 1.0, sums.t())


def _sum(plan: Plan, partials: Tensor) -> Tensor:
    """Return Σ partials, [M, R] float32; a view if there is one partial sum."""
    if partials.shape[0] == 1:
        return partials[0]
    out = empty(plan, *partials.shape[1:])
    _reduce(plan, partials, None, 1.0, out)
    return out


def _reduce(plan: Plan, partials: Tensor, gate: Tensor | None, scale: float, out: Tensor) -> None:
    """Write scale · gate ⊙ Σ partials to out [I, R], in out's dtype and strides."""
    num_splits, rows, ranks = partials.shape
    gate = contiguous(plan, gate)
    touched, operands = {"partials": partials, "gate": gate, "out": out}, (vector(gate), scale)
    sizes = out, DTYPE_NUMBERS[out.dtype], rows, ranks, *out.stride(), num_splits
    launch.run(plan, "reduce", touched, partials, *operands, *sizes)


def _split(n: int, least: int, most: int) -> tuple[int, int]:
    """Return the size of each split of n, a multiple of `least`, and their number, up to `most`."""
    steps = -(-n // least)
    per_split = -(-steps // max(1, min(most, steps))) * least
    return per_split, -(-n // per_split)


def _scale_columns(out: Tensor, dy: Tensor, scale: Tensor) -> None:
    torch.mul(dy, scale.to(dy.dtype), out=out)
