"""The elementwise kernels of a gated MLP: h = act(g) ⊙ u, and its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import to_dtype


@triton.jit
def gated_kernel(
    g_ptr, u_ptr, h_ptr,
    n,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write h = act(g) ⊙ u of n contiguous elements. A program computes BLOCK_N of them.

    ACTIVATION: 0 for SiLU, 1 for GELU by tanh, 2 for GELU by erf.
    Rounding points: act(g) to its own dtype, as in PyTorch, and h; float32 between.
    Bytes: g, u and h once. Deterministic. Tested by tests/triton/test_gated.py.
    """
    at, mask = offsets(n, WIDE, BLOCK_N)
    g = to_dtype(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
    u = to_dtype(tl.load(u_ptr + at, mask=mask, other=0.0), tl.float32)
    a, _ = activate(g, ACTIVATION)
    TYPE: tl.constexpr = h_ptr.dtype.element_ty
    a = to_dtype(to_dtype(a, TYPE), tl.float32)
    tl.store(h_ptr + at, to_dtype(a * u, TYPE), mask=mask)


@triton.jit
def gated_backward_kernel(
    g_ptr, u_ptr, dh_ptr, dg_ptr, du_ptr, h_ptr,
    n,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dg = dh ⊙ u ⊙ act'(g), du = dh ⊙ act(g) and the h of `gated_kernel`.

    dg, du and h may be g, u and dh: a program loads all elements of its own before it stores one.
    Rounding points: act(g) to its own dtype, as in PyTorch, then du and h; dg once.
    Bytes: g, u, dh, dg, du and h once. Deterministic. Tested by tests/triton/test_gated.py.
    """
    at, mask = offsets(n, WIDE, BLOCK_N)
    g = to_dtype(tl.load(g_ptr + at, mask=mask, other=0.0), tl.float32)
    u = to_dtype(tl.load(u_ptr + at, mask=mask, other=0.0), tl.float32)
    dh = to_dtype(tl.load(dh_ptr + at, mask=mask, other=0.0), tl.float32)
    a, slope = activate(g, ACTIVATION)
    TYPE: tl.constexpr = h_ptr.dtype.element_ty
    a = to_dtype(to_dtype(a, TYPE), tl.float32)
    tl.store(dg_ptr + at, to_dtype(dh * u * slope, TYPE), mask=mask)
    tl.store(du_ptr + at, to_dtype(dh * a, TYPE), mask=mask)
    tl.store(h_ptr + at, to_dtype(a * u, TYPE), mask=mask)


@triton.jit
def offsets(n, WIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the offsets of a program's elements, and which of them are below n."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    at = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    return at, at < n


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Return act(g) and act'(g) in float32.

    GELU by tanh is g·σ(2z), since 1 + tanh(z) = 2·σ(2z), and σ·(1 − σ) does not cancel here.
    """
    if ACTIVATION == 2:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        return g * cdf, cdf + g * pdf
    else:
        t = g
        dt = tl.full(g.shape, 1.0, dtype=tl.float32)
        if ACTIVATION == 1:
            t = 1.5957691216057308 * (g + 0.044715 * g * g * g)
            dt = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        e = tl.exp(-tl.abs(t))
        sigmoid = tl.where(t >= 0, 1.0, e) / (1.0 + e)
        return g * sigmoid, sigmoid + g * dt * e / ((1.0 + e) * (1.0 + e))
