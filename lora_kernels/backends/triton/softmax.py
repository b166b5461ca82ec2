"""The loss of a language model's head and its gradient, from logits, in place."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import to_dtype


@triton.jit
def cross_entropy_kernel(
    y_ptr, labels_ptr, loss_ptr,
    columns, scale, cap, weight, smoothing,
    HAS_CAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a row's loss, and its gradient into y. A program computes one row of contiguous y.

        z = scale · y, or cap · tanh(scale · y)
        loss = log Σ exp(z) − (1 − ε)·z_label − ε·mean(z)
        dy = weight · (softmax(z) − (1 − ε)·onehot(label) − ε/columns), times 1 − tanh² with a cap

    A row whose label is not 0 to columns − 1 gets NaN.

    smoothing: ε, read if HAS_SMOOTHING. cap: read if HAS_CAP. weight: read if HAS_GRADIENT.
    A thread reads no element in the second pass that another thread has written.
    Rounding points: dy to y's dtype; float32 between.
    Bytes: y twice and dy once, or y once without the gradient. Deterministic: maxima and sums of
    a lane, then over lanes. Tested by tests/triton/test_cross_entropy.py.
    """
    row = tl.program_id(0)
    given = tl.load(labels_ptr + row)
    is_wrong = (given < 0) | (given >= columns)
    label = given.to(tl.int32)
    at_loss = loss_ptr + row
    y_row = y_ptr + offset(row, columns, WIDE)
    lanes = tl.arange(0, BLOCK_N)
    # The least finite number, for rows that begin with logits of -inf.
    top = tl.full([BLOCK_N], -3.4028234663852886e38, dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    target = tl.zeros([BLOCK_N], dtype=tl.float32)
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, columns, BLOCK_N):
        at = start + lanes
        mask = at < columns
        z, _ = logits(tl.load(y_row + at, mask=mask, other=0.0), scale, cap, HAS_CAP)
        z = tl.where(mask, z, float("-inf"))
        above = tl.where(z > top, z, top)  # top if z is NaN, which then makes total NaN
        total = total * tl.exp(top - above) + tl.exp(z - above)
        top = above
        target += tl.where(at == label, z, 0.0)
        if HAS_SMOOTHING:
            sums += tl.where(mask, z, 0.0)
    highest = tl.where(is_wrong, float("nan"), tl.max(top, 0))
    whole = tl.sum(total * tl.exp(top - highest), 0)
    wanted = tl.sum(target, 0)
    if HAS_SMOOTHING:
        wanted = wanted * (1.0 - smoothing) + tl.sum(sums, 0) / columns * smoothing
    tl.store(at_loss, tl.log(whole) + (highest - wanted))
    if HAS_GRADIENT:
        TYPE: tl.constexpr = y_ptr.dtype.element_ty
        factor = weight / whole
        at_label = weight
        if HAS_SMOOTHING:
            at_label = weight * (1.0 - smoothing)
        for start in range(0, columns, BLOCK_N):
            at = start + lanes
            mask = at < columns
            z, slope = logits(tl.load(y_row + at, mask=mask, other=0.0), scale, cap, HAS_CAP)
            d = tl.exp(z - highest) * factor - tl.where(at == label, at_label, 0.0)
            if HAS_SMOOTHING:
                d -= smoothing / columns * weight
            tl.store(y_row + at, to_dtype(d * slope, TYPE), mask=mask)


@triton.jit
def offset(row, columns, WIDE: tl.constexpr):
    """Return the offset of a row's first element, in 64 bits if WIDE."""
    if WIDE:
        row = row.to(tl.int64)
    return row * columns


@triton.jit
def logits(y, scale, cap, HAS_CAP: tl.constexpr):
    """Return z and the slope of the cap, 1 − tanh², in float32; slope 1 without a cap.

    With e = exp(-2|a|), tanh(|a|) is (1 − e) / (1 + e), and 1 − tanh² is 4e / (1 + e)².
    """
    a = to_dtype(y, tl.float32) * scale
    if HAS_CAP:
        e = tl.exp(-2.0 * tl.abs(a))
        tanh = (1.0 - e) / (1.0 + e)
        return cap * tl.where(a < 0, -tanh, tanh), 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        return a, 1.0
