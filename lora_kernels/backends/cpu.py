"""Native CPU kernels around the library's base product.

Forward: z = x·Wᵀ by oneDNN/MKL; P = D(x)·Aᵀ (`shrink`); y = c⊙(z + S·Bᵀ) + bias in one pass over
y (`expand`). Backward: one read of dY gives dS and dB (`backward_pair`), `grad_a` gives dA, the
library gives dZ·W and `expand` adds D'(dXA·A) to it in place.

Rounding points: the base product rounds to the compute dtype; P, S, dS and dXA are float32 and
never rounded to 16 bits; y and dx are rounded once more when the rank update is added; each
parameter's gradient is rounded once, from float32 to its own dtype. On avx512bf16 a
bfloat16 subnormal counts as zero, as in the library's own bfloat16 products there.
Deterministic for a given M, instruction set and thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import reference
from . import native

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, whatever their distance."""
    if t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t
    return t.contiguous()


def _vector(t: Tensor | None) -> Tensor | None:
    """A per-column or per-rank factor as contiguous float32."""
    return None if t is None else _cast(t, torch.float32).contiguous()


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _mask(dropout_p: float, rng: Tensor | None) -> tuple[int, int, float]:
    """What kernels take of dropout: rng pointer (0: none), threshold, 1/(1−p)."""
    if rng is None:
        return 0, 0, 1.0
    return (
        rng.data_ptr(),
        reference.dropout_threshold(dropout_p),
        reference.dropout_scale(dropout_p),
    )


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    dtype: torch.dtype,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] -> y [M, N] in `dtype`, P [M, R] float32, z [M, N] or [0]."""
    kernels, threads = native.module, torch.get_num_threads()
    assert kernels is not None
    x, lora_A = _rows(x), _rows(lora_A)
    (M, K), (N, R) = x.shape, lora_B.shape
    if weight is None:
        y = x.new_zeros(M, N, dtype=dtype)
    else:
        y = linear(_cast(x, dtype), _cast(weight, dtype))
    p = x.new_empty(M, R, dtype=torch.float32)
    z = y.new_empty((M, N) if save_z else (0,))
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)
    kernels.shrink(
        x.data_ptr(), _DTYPE[x.dtype], x.stride(0), M, K,
        lora_A.data_ptr(), _DTYPE[lora_A.dtype], lora_A.stride(0), R,
        keep_scale, rng_ptr, threshold, p.data_ptr(), threads,
    )  # fmt: skip
    s = p if rank_gate is None else p * rank_gate
    c, b = _vector(column_scale), _vector(bias)
    kernels.expand(
        y.data_ptr(), _DTYPE[dtype], N, M, N, s.data_ptr(), R,
        lora_B.data_ptr(), _DTYPE[lora_B.dtype], lora_B.stride(1), lora_B.stride(0),
        scaling, _ptr(c), _ptr(b), z.data_ptr() if save_z else 0, 0, 0, threads,
    )  # fmt: skip
    return y, p, z


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    p: Tensor,
    z: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
    column_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_gate: bool,
    need_column_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy [M, N] -> dx, dA, dB, dg, dc, dbias; each of size 0 where it is not asked for."""
    kernels, threads = native.module, torch.get_num_threads()
    assert kernels is not None
    dy, x = _rows(dy), _rows(x)
    (M, K), (N, R) = x.shape, lora_B.shape
    dtype = dy.dtype
    rng_ptr, threshold, keep_scale = _mask(dropout_p, rng)

    def out(need: bool, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape if need else (0,), dtype=dtype)

    need_ds = need_x or need_A or need_gate
    # The gate's gradient wants dS itself; without a gate the kernel scales dS to dXA at once.
    ds_scale = 1.0 if rank_gate is not None else scaling * keep_scale
    ds, dB = out(need_ds, (M, R)), out(need_B, (N, R), lora_B.dtype)
    dc, dbias = out(need_column_scale, (N,)), out(need_bias, (N,))
    c = _vector(column_scale)
    s = p if rank_gate is None else p * rank_gate
    if need_ds or need_B or need_column_scale or need_bias:
        kernels.backward_pair(
            dy.data_ptr(), _DTYPE[dtype], dy.stride(0), M, N,
            lora_B.data_ptr(), _DTYPE[lora_B.dtype], lora_B.stride(0), lora_B.stride(1), R,
            s.data_ptr(), _ptr(c), z.data_ptr() if need_column_scale else 0, ds_scale, scaling,
            ds.data_ptr() if need_ds else 0, dB.data_ptr() if need_B else 0, _DTYPE[lora_B.dtype],
            dc.data_ptr() if need_column_scale else 0, dbias.data_ptr() if need_bias else 0,
            threads,
        )  # fmt: skip
    dg = (ds * p).sum(0).mul_(scaling) if need_gate else out(False, ())
    dxa = ds
    if rank_gate is not None and need_ds:
        dxa = ds * (rank_gate * (scaling * keep_scale))
    dA = out(need_A, (R, K), lora_A.dtype)
    if need_A:
        kernels.grad_a(
            x.data_ptr(), _DTYPE[x.dtype], x.stride(0), M, K, dxa.data_ptr(), R,
            rng_ptr, threshold, dA.data_ptr(), _DTYPE[lora_A.dtype], threads,
        )  # fmt: skip
    if not need_x:
        return out(False, ()), dA, dB, dg, dc, dbias
    dz = dy if column_scale is None else dy * column_scale.to(dtype)
    dx = x.new_zeros(M, K) if weight is None else torch.mm(dz, _cast(weight, dtype))
    dx = _cast(dx, x.dtype)
    kernels.expand(
        dx.data_ptr(), _DTYPE[x.dtype], K, M, K, dxa.data_ptr(), R,
        lora_A.data_ptr(), _DTYPE[lora_A.dtype], lora_A.stride(0), lora_A.stride(1),
        1.0, 0, 0, 0, rng_ptr, threshold, threads,
    )  # fmt: skip
    return dx, dA, dB, dg, dc, dbias
