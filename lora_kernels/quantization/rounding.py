"""Round a weight to the values of a format: the nearest, a random one, or the best for its outputs.

A merge rounds W + D, where W has the format's values and D is an adapter's update. Nearest rounding
returns W wherever D is less than half of the distance to the next value, so that a small update
is lost. The other two keep it:

- stochastic: one of the two values beside the number, with the probability that makes the mean the
  number (Croci et al., 2022). The mean of the update is kept, and the error is larger.
- error: values for which the output error ||(Q - W - D) xᵀ|| is small over given x. Sweeps of
  coordinate descent over the columns give each the nearest value to what the errors of all other
  columns leave to it, as in QuantEase (Behdin et al., 2023) and, once and without a return, in
  GPTQ (Frantar et al., 2022). They start from the nearest values and from a stochastic rounding,
  and each row of the weight takes the better of its two results, by `weighted_error`.

The scales and shifts of a quantized weight stay: with them its format holds W exactly, and what is
rounded is D alone.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from .weight import QuantizedWeight

ROUNDINGS = "nearest", "stochastic", "error"
DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, which is added to it
SWEEPS = 3
_BLOCK = 128  # columns whose errors are updated one by one


class Grid(Protocol):
    """The values that a format can store in each place of a weight [N, K].

    Tensors are float32 and transposed, [K, N], so that a column of the weight is contiguous.
    """

    def nearest(self, t: Tensor, columns: slice) -> Tensor:
        """Return the values nearest to t [columns, N]."""

    def stochastic(self, t: Tensor, draws: Tensor) -> Tensor:
        """Return one of the two values beside each t [K, N]; draws: uniform in [0, 1), [K, N]."""


class FloatGrid:
    """The values of a floating dtype of 16 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def nearest(self, t: Tensor, columns: slice) -> Tensor:
        return t.to(self.dtype).float()

    def stochastic(self, t: Tensor, draws: Tensor) -> Tensor:
        near = t.to(self.dtype)
        # Sign and magnitude: one more is the next value away from 0. A t that was rounded to 0
        # lies between 0 and the smallest value of its own sign, which the 0 has too.
        step = torch.where(near.float().abs() < t.abs(), 1, -1).short()
        other = (near.view(torch.int16) + step).view(self.dtype).float()
        at = near.float()
        share = torch.where(at == t, 0.0, (t - at) / (other - at))
        return torch.where(draws < share, other, at)


class CodeGrid:
    """The values code[q] · scale + shift of a quantized weight's blocks."""

    def __init__(self, weight: QuantizedWeight) -> None:
        N, K = weight.shape
        scales = weight.scales()
        scale, shift = scales.unbind(1) if scales.dim() > 1 else (scales, None)

        def each(of_blocks: Tensor) -> Tensor:
            spread = of_blocks.repeat_interleave(weight.blocksize)[: N * K]
            return spread.view(N, K).t().contiguous()

        self.scale = each(scale)
        self.shift = self.scale.new_zeros(1, 1).expand(K, N) if shift is None else each(shift)
        self.divisor = torch.where(self.scale == 0, 1.0, self.scale)
        # Only codes that the weight has: some formats use a part of a table of 256.
        used = unpack_codes(weight).unique().int()
        levels, order = weight.code[used].sort(stable=True)
        is_new = torch.ones_like(levels, dtype=torch.bool)
        is_new[1:] = levels[1:] != levels[:-1]
        self.levels, self.order = levels[is_new], used[order][is_new].to(torch.uint8)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def _places(self, t: Tensor, columns: slice) -> Tensor:
        x = (t - self.shift[columns]) / self.divisor[columns]
        return torch.bucketize(x, self.middles)

    def _values(self, places: Tensor, columns: slice) -> Tensor:
        values: Tensor = self.levels[places] * self.scale[columns] + self.shift[columns]
        return values

    def nearest(self, t: Tensor, columns: slice) -> Tensor:
        return self._values(self._places(t, columns), columns)

    def stochastic(self, t: Tensor, draws: Tensor) -> Tensor:
        x = (t - self.shift) / self.divisor
        last = len(self.levels) - 1
        below = torch.bucketize(x, self.levels, right=True).sub_(1).clamp_(0, max(0, last - 1))
        low, high = self.levels[below], self.levels[(below + 1).clamp_(max=last)]
        return self._values(below + (draws < (x - low) / (high - low)), slice(None))

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes uint8 [K, N] of values of the grid."""
        found: Tensor = self.order[self._places(values, slice(None))]
        return found


def gram_matrix(x: Tensor) -> Tensor:
    """Return XᵀX / T of x [..., K] with T rows, float32 [K, K]."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    return rows.t() @ rows / max(1, len(rows))


def round_weight(
    target: Tensor,
    base: Tensor | QuantizedWeight,
    dtype: torch.dtype,
    how: str = "error",
    gram: Tensor | None = None,
    generator: torch.Generator | None = None,
    layers: int = 1,
) -> Tensor | QuantizedWeight:
    """Round W + D to the values that W's format or a dtype holds.

    Where the target equals W, the result has W's stored value. Nearest rounding takes the nearest
    value of the format with W's scales.

    Args:
        target: W + D, float32 [N, K].
        base: W, a `QuantizedWeight` or dense [N, K]. The result has the scales of a quantized one,
            and new codes. A dense one is rounded to nearest where the target equals it.
        dtype: bfloat16 or float16, of the result over a dense base.
        how: "nearest", "stochastic" or "error".
        gram: XᵀX of the layer's inputs, float32 [K, K], for "error". A hundredth of its mean
            diagonal is added to its diagonal, so that it may be singular; of an x that is 0 the
            identity matrix takes its place. A diagonal matrix leaves nothing to feed back: the
            result is then the nearest value.
        generator: of the random numbers; equal seeds give equal results.
        layers: how many layers of a model are rounded so. The part of an output error along the
            update counts once for each, because it adds up over the layers.

    Returns:
        The rounded weight, dense [N, K] in `dtype` or a `QuantizedWeight` with the base's scales.

    Raises:
        ValueError: `how` is none of the three; the target or `gram` has another shape, or holds
            NaN or infinity; "error" has no `gram`.

    >>> import torch
    >>> from lora_kernels.quantization import round_weight
    >>> base, update = torch.ones(2, 64), torch.full((2, 64), 0.001)
    >>> nearest = round_weight(base + update, base, torch.bfloat16, "nearest")
    >>> x = 1 + 0.1 * torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    >>> kept = round_weight(base + update, base, torch.bfloat16, "error", gram_matrix(x))
    >>> (nearest - base).mean().item()
    0.0
    >>> 0.0005 < (kept - base).mean().item() < 0.0015
    True
    """
    if how not in ROUNDINGS:
        raise ValueError(f"how: got {how!r}, want one of {', '.join(ROUNDINGS)}")
    if target.shape != base.shape or target.dim() != 2:
        raise ValueError(f"target: got shape {list(target.shape)}, want {list(base.shape)}")
    if not target.isfinite().all():
        raise ValueError("target: got NaN or infinity in it, want finite values")
    weights = _damped(gram, target.shape[1]) if how == "error" else None
    grid: Grid = CodeGrid(base) if isinstance(base, QuantizedWeight) else FloatGrid(dtype)
    start = base.dequantize(torch.float32) if isinstance(base, QuantizedWeight) else base.float()
    start, goal = start.t().contiguous(), target.float().t().contiguous()
    is_free = start != goal
    kept = start if isinstance(base, QuantizedWeight) else grid.nearest(start, slice(None))

    def near() -> Tensor:
        return torch.where(is_free, grid.nearest(goal, slice(None)), kept)

    def drawn() -> Tensor:
        draws = torch.rand(goal.shape, generator=generator, device=goal.device)
        return torch.where(is_free, grid.stochastic(goal, draws), kept)

    if weights is None:
        rounded = near() if how == "nearest" else drawn()
    else:
        rounded, other = near(), drawn()
        errors = []
        for q in (rounded, other):
            descend(q, goal, weights, grid, is_free)
            errors.append(weighted_error(q - goal, goal - start, weights, layers))
        rounded = torch.where(errors[0] <= errors[1], rounded, other)
    if not isinstance(base, QuantizedWeight):
        return rounded.t().to(dtype).contiguous()
    assert isinstance(grid, CodeGrid)
    return with_codes(base, torch.where(is_free, grid.codes(rounded), unpack_codes(base).t()).t())


def _damped(gram: Tensor | None, K: int) -> Tensor:
    """Return the checked Gram matrix with a positive diagonal."""
    if gram is None:
        raise ValueError("gram: got none, want the Gram matrix of the layer's inputs")
    if gram.shape != (K, K):
        raise ValueError(f"gram: got shape {list(gram.shape)}, want {[K, K]}")
    if not gram.isfinite().all():
        raise ValueError("gram: got NaN or infinity in it, want finite values")
    mean = gram.diagonal().mean()
    if mean <= 0:
        return torch.eye(K, device=gram.device)
    return gram.float() + DAMPING * mean * torch.eye(K, device=gram.device)


def descend(rounded: Tensor, goal: Tensor, gram: Tensor, grid: Grid, is_free: Tensor) -> None:
    """Lower the diagonal of (Q - T)ᵀ H (Q - T) by coordinate descent over the rows of Q, in place.

    Args:
        rounded: Q, values of the grid [K, N].
        goal: T, [K, N].
        gram: H, with a positive diagonal [K, K].
        is_free: the elements that may change, bool [K, N].
    """
    K = len(goal)
    off = rounded - goal
    for _ in range(SWEEPS):
        for start in range(0, K, _BLOCK):
            stop = min(start + _BLOCK, K)
            slopes = gram[start:stop] @ off
            for k in range(start, stop):
                here, weights = slice(k, k + 1), gram[k, k:stop]
                want = rounded[here] - slopes[k - start] / weights[0]
                best = torch.where(is_free[here], grid.nearest(want, here), rounded[here])
                step = best - rounded[here]
                slopes[k - start :].addr_(weights, step[0])
                rounded[here] = best
                off[here] += step


def weighted_error(off: Tensor, update: Tensor, gram: Tensor, layers: int) -> Tensor:
    """Return eᵀHe + (layers - 1) · (eᵀHd)² / dᵀHd, [N], of each column e and d of two [K, N].

    The part of a layer's error along its update d weakens what the adapter learnt, and adds up over
    the layers, as independent errors do not.
    """
    along = gram @ update
    square = (along * update).sum(0)
    lost = torch.where(square > 0, (off * along).sum(0) ** 2 / square, 0.0)
    return (off * (gram @ off)).sum(0) + (layers - 1) * lost


def unpack_codes(weight: QuantizedWeight) -> Tensor:
    """Return the codes of a weight, uint8 [N, K]."""
    N, K = weight.shape
    packed = weight.packed
    if weight.codes.bits == 4:
        packed = torch.stack([packed >> 4, packed & 15], 1).flatten()[: N * K]
    return packed.view(N, K)


def with_codes(weight: QuantizedWeight, q: Tensor) -> QuantizedWeight:
    """Return the weight with other codes, uint8 [N, K]."""
    packed = q.reshape(-1)
    if weight.codes.bits == 4:
        packed = torch.nn.functional.pad(packed, (0, len(packed) % 2))
        packed = packed[::2] << 4 | packed[1::2]
    return dataclasses.replace(weight, packed=packed.contiguous())
