"""The functions that `ops` calls, which launch kernels on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.call import Grads, Needs, Operands, Saved, Spec
from ...core.dtypes import DTYPE_NUMBERS
from ...core.packed4bit import Packed4bit
from .. import workspace
from ..replay import replayed
from . import COOPERATIVE, launch, module
from .launch import codes, empty, matrix, of_codes, pointer, vector, whole_rows

# The smallest split of a summed dimension, a multiple of the kernel's step: of columns, of rows in
# a skinny GEMM, of rows in column sums, and of K in `gemm`.
_SPLIT, _THIN_SPLIT, _SUMS_SPLIT, _GEMM_SPLIT = 256, 1024, 64, 256
_BLOCKS = 264  # thread blocks that occupy any GPU
_GEMM_TILE = (64, 128)
_MAX_SPLITS = 8
_MAX_PUBLISHERS = 16  # splits of K for P in `decode`


@replayed
def lora_linear(operands: Operands, spec: Spec, strategy: str) -> tuple[Tensor, Saved]:
    """Compute y [M, N] for x [M, K]."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, bias, rng, *_ = operands
    scaling, _, dtype, y_dtype, save_z = spec
    assert weight is not None and rng is None
    M, (N, R) = x.shape[0], lora_B.shape
    y = empty(x, M, N, dtype=y_dtype)
    z = empty(x, M, N, dtype=y_dtype) if save_z else None
    if not M:
        return y, Saved(x.new_empty(M, R, dtype=torch.float32), z)
    linear = _Linear(
        x, weight, lora_B.t(), y, dtype, scaling, rank_gate, out_scale=column_scale, bias=bias, z=z
    )
    if strategy == COOPERATIVE:
        p = _decode(linear, lora_A)
    else:
        p = _sum(_thin(x, None, False, lora_A))
        linear.run(p)
    return y, Saved(p, z)


@replayed
def lora_linear_backward(
    dy: Tensor, operands: Operands, saved: Saved, spec: Spec, needs: Needs, strategy: str
) -> Grads:
    """Compute the gradients for dy [M, N] and x [M, K], in the same way for each strategy."""
    x, weight, lora_A, lora_B, rank_gate, column_scale, _, rng, *_ = operands
    (p, z, _), (scaling, _, dtype, *_) = saved, spec
    assert weight is not None and rng is None
    need_x, need_A, need_B, need_gate, need_column_scale, need_bias, *_ = needs
    (M, N), R, K = dy.shape, p.shape[1], x.shape[1]
    dx = empty(dy, M, K, dtype=x.dtype) if need_x else None
    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_A else None
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else None
    dg = torch.zeros(R, dtype=torch.float32, device=dy.device) if need_gate else None
    sums = None
    if need_bias or need_column_scale:
        sums = torch.zeros(2, N, dtype=torch.float32, device=dy.device)
        if M:
            _column_sums(dy, z if need_column_scale else None, sums)
    dbias = sums[0] if sums is not None and need_bias else None
    dc = sums[1] if sums is not None and need_column_scale else None
    if not M:
        for grad in (dA, dB):
            if grad is not None:
                grad.zero_()
        return Grads(dx, dA, dB, dg, dc, dbias)
    ds, need_s = None, need_x or need_A or need_gate
    if dB is not None and need_s and R <= module().PAIR_MAX_RANK:
        ds_partials, db_partials = _pair(dy, column_scale, lora_B, p)
        ds = _sum(ds_partials)
        _reduce(db_partials, rank_gate, scaling, dB)
    else:
        if need_s:
            ds = _sum(_thin(dy, column_scale, False, lora_B.t()))
        if dB is not None:
            _reduce(_thin(dy, column_scale, True, p.t()), rank_gate, scaling, dB)
    if dx is not None:
        assert ds is not None
        dz = dy if column_scale is None else dy * column_scale.to(dy.dtype)
        _Linear(dz, weight, lora_A, dx, dtype, scaling, rank_gate, transposed=True).run(ds)
    if dA is not None:
        assert ds is not None
        _reduce(_thin(x, None, True, ds.t()), rank_gate, scaling, dA.t())
    if need_gate:
        assert ds is not None
        dg = (ds * p).sum(0).mul_(scaling)
    return Grads(dx, dA, dB, dg, dc, dbias)


@dataclass
class _Linear:
    """y = out_scale ⊙ (x·W + S·q) + bias, S = s_scale · gate ⊙ P; `run` takes P.

    transposed: whether the weight's rows are the inner dimension, as in dx.
    """

    x: Tensor
    weight: Tensor | Packed4bit
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
        self.gate, self.out_scale, self.bias = map(
            _contiguous, (self.gate, self.out_scale, self.bias)
        )
        weight, stored = self.weight, self.transposed
        self.w = weight.to(self.dtype) if isinstance(weight, Tensor) else None  # as under autocast
        if self.w is not None and self.w.stride(0) == 1 != self.w.stride(1):
            self.w, stored = self.w.t(), not stored
        c = weight if isinstance(weight, Packed4bit) else None
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
        outputs = self.y.data_ptr(), pointer(self.z), DTYPE_NUMBERS[self.y.dtype]
        return matrix(x), *self._base, *update, out_scale, bias, *outputs, *self.shape

    def run(self, p: Tensor) -> None:
        """Compute y by `gemm`."""
        x = whole_rows(self.x.to(self.dtype))
        M, N, K, _ = self.shape
        tile_m, tile_n = _GEMM_TILE
        tiles = -(-M // tile_m) * -(-N // tile_n)
        most = min(_MAX_SPLITS, _BLOCKS // tiles)
        k_per_split, num_splits = _split(K, _GEMM_SPLIT, most)
        partials = empty(x, num_splits, M, N) if num_splits > 1 else None
        touched = {"x": x, "p": p, "partials": partials, **self.touched}
        split_k = num_splits, pointer(partials), k_per_split
        launch.run("gemm", x, touched, self.args(x, p), *split_k)


def _decode(linear: _Linear, a: Tensor) -> Tensor:
    """Compute y for few rows, and return P."""
    x, a, (M, _, K, R) = whole_rows(linear.x), whole_rows(a), linear.shape
    k_per_split, num_splits = _split(K, _SPLIT, _MAX_PUBLISHERS)
    partials, p = empty(x, num_splits, M, R), empty(x, M, R)
    flags = workspace.flags(x.device)
    addresses = map(pointer, (partials, p, flags))
    down_projection = matrix(x), matrix(a), *addresses, k_per_split, num_splits
    args = linear.args(x, None), *down_projection, 0, workspace.MAX_BLOCKS
    is_kept, count = module().decode_plan(args)
    # A product's x that exceeds shared memory is loaded by tiles; P's is never rounded.
    rounded = x if is_kept else whole_rows(x.to(linear.dtype))
    tile_partials = empty(x, count) if count else None
    rest = *down_projection, pointer(tile_partials), workspace.MAX_BLOCKS
    args = linear.args(rounded, None), *rest
    touched = {"x": x, "a": a, "partials": partials, "p": p, "flags": flags, **linear.touched}
    touched["tile_partials"] = tile_partials
    touched["rounded"] = rounded if rounded is not x else None
    launch.run("decode", x, touched, *args)
    return p


def _thin(v: Tensor, v_scale: Tensor | None, over_rows: bool, y: Tensor) -> Tensor:
    """Return the partial sums [num_splits, I, R] of (v ⊙ v_scale)·yᵀ, or (v ⊙ v_scale)ᵀ·yᵀ."""
    R, J = y.shape
    I = v.shape[1] if over_rows else v.shape[0]  # noqa: E741
    blocks = -(-I // 64) * -(-R // (64 if R > 16 else 16))
    least = _THIN_SPLIT if over_rows else _SPLIT
    j_per_split, num_splits = _split(J, least, _BLOCKS // blocks)
    v_scale, out = _contiguous(v_scale), empty(v, num_splits, I, R)
    touched = {"v": v, "v_scale": v_scale, "y": y, "out": out}
    operands = matrix(v), vector(v_scale), over_rows, matrix(y), out.data_ptr()
    launch.run("thin", v, touched, *operands, I, J, R, j_per_split, num_splits)
    return out


def _pair(dy: Tensor, scale: Tensor | None, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial sums of (dy ⊙ scale)·b and of (dy ⊙ scale)ᵀ·s, and read dy once."""
    (M, N), R = dy.shape, s.shape[1]
    num_row_tiles = -(-M // module().PAIR_ROWS)
    n_per_split, num_splits = _split(N, _SPLIT, _BLOCKS // num_row_tiles)
    partials = empty(dy, num_splits, M, R), empty(dy, num_row_tiles, N, R)
    scale = _contiguous(scale)
    touched = {"v": dy, "v_scale": scale, "b": b, "s": s}
    touched |= {"ds_partials": partials[0], "db_partials": partials[1]}
    operands = matrix(dy), vector(scale), matrix(b), *map(pointer, (s, *partials))
    launch.run("pair", dy, touched, *operands, M, N, R, n_per_split, num_splits, num_row_tiles)
    return partials


def _column_sums(v: Tensor, z: Tensor | None, sums: Tensor) -> None:
    """Write Σ v and Σ v ⊙ z over the rows to sums, float32 [2, N]."""
    M, N = v.shape
    m_per_split, num_splits = _split(M, _SUMS_SPLIT, _BLOCKS // -(-N // 128))
    partials = empty(v, num_splits, N, 2)
    touched, operands = {"v": v, "z": z, "partials": partials}, (matrix(v), matrix(z))
    sizes = M, N, m_per_split, num_splits
    launch.run("column_sums", v, touched, *operands, partials.data_ptr(), *sizes)
    _reduce(partials, None, 1.0, sums.t())


def _sum(partials: Tensor) -> Tensor:
    """Return Σ partials, [M, R] float32; a view if there is one partial sum."""
    if partials.shape[0] == 1:
        return partials[0]
    out = empty(partials, *partials.shape[1:])
    _reduce(partials, None, 1.0, out)
    return out


def _reduce(partials: Tensor, gate: Tensor | None, scale: float, out: Tensor) -> None:
    """Write scale · gate ⊙ Σ partials to out [I, R], in out's dtype and strides."""
    num_splits, rows, ranks = partials.shape
    gate = _contiguous(gate)
    touched, operands = {"partials": partials, "gate": gate, "out": out}, (vector(gate), scale)
    sizes = out.data_ptr(), DTYPE_NUMBERS[out.dtype], rows, ranks, *out.stride(), num_splits
    launch.run("reduce", partials, touched, partials.data_ptr(), *operands, *sizes)


def _split(n: int, least: int, most: int) -> tuple[int, int]:
    """Return the size of each split of n, a multiple of `least`, and their number, up to `most`."""
    steps = -(-n // least)
    per_split = -(-steps // max(1, min(most, steps))) * least
    return per_split, -(-n // per_split)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
