"""The tolerance of every result: little more than PyTorch's own error in the same dtypes.

The reference is computed in float64 from inputs that are already rounded to their dtypes, so only
the computation's own roundings are judged. u is the unit roundoff of the coarsest rounding that the
op's docstring names. Eager's errors are those of plain PyTorch in the same dtypes. The limits are

    rms error ≤ 1.25 · max(eager's, chain) + u/4              relative to the rms of the reference
    max error ≤ 2 · eager's + 2 ulp of the largest |reference|

chain = 0.3 · √terms · 2⁻²⁴ is the rms error of a float32 sum of so many terms, added one after
another. Without it the limit would depend on the processor. The same PyTorch sums 144 products in
one chain on one processor and in sixteen on another, with errors of 3.1 u and 1.6 u.

Sources of the numbers:

- 1.25: the rms of n independent errors has a relative standard error of 1/√(2n), and the ratio of
  two has 1/√n: 6 % at n = 256. So 1.25 is four standard errors. Smaller outputs are pooled over
  several seeds.
- u/4: one rounding errs by 0.42 u rms (uniform in ± ulp/2, mantissas spread evenly in logarithm:
  u/√3 · √(3/(8·ln 2))). Where eager rounds once, 1.25 · 0.42 u + u/4 = 0.78 u admits three
  independent roundings (0.74 u) and not four (0.85 u).
- 0.3 · √terms: addition i of n rounds a sum that has grown as √i, and errs by 0.42 u of it (above).
  Relative to the whole sum, √n, that is 0.42 u · √(Σ i / n) = 0.42 u · √(n/2) = 0.3 u · √n, where
  u is 2⁻²⁴. No chain counts for more than CHAIN terms, because libraries sum longer ones in parts,
  and so must we.
- 2 and 2 ulp: the largest of n errors scatters more than their rms. A result that is rounded twice
  may be an ulp away from a result that is rounded once.

A reference that is all zeros (no rows, B = 0) is exact, so no error is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POOL = 256  # elements below which several seeds are pooled
CHAIN = 256  # terms of a float32 sum above which libraries add partial sums


def unit_roundoff(*dtypes: torch.dtype) -> float:
    """Half the distance from 1 to the next number, in the coarsest of the dtypes.

    >>> unit_roundoff(torch.float32, torch.bfloat16) == 2**-8
    True
    """
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2


@dataclass(frozen=True)
class Comparison:
    """Errors, eager's errors and the limits; rms relative to the reference's rms, max absolute."""

    rms: float
    eager_rms: float
    rms_limit: float
    max: float
    eager_max: float
    max_limit: float
    unit_roundoff: float

    @property
    def ok(self) -> bool:
        # A NaN compares false and so fails. Infinity in eager's result would excuse anything.
        return self.rms <= self.rms_limit < math.inf and self.max <= self.max_limit < math.inf

    def __str__(self) -> str:
        u = self.unit_roundoff
        return (
            f"{'ok' if self.ok else 'MISS'}: rms {self.rms / u:.3g} u "
            f"(eager {self.eager_rms / u:.3g} u, limit {self.rms_limit / u:.3g} u), "
            f"max {self.max:.3g} (eager {self.eager_max:.3g}, limit {self.max_limit:.3g}), "
            f"u = {u:.3g}"
        )


def compare(
    got: Tensor | Sequence[Tensor],
    ref: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    unit_roundoff: float,
    sums: Sequence[int] = (),
) -> Comparison:
    """Compare `got` with `ref` (float64); the limits derive from the errors of `eager`.

    got, ref, eager: a tensor each or, to pool seeds, a list of tensors. The three have equal
        shapes; got and eager may have any floating dtype.
    sums: the lengths of the float32 sums that an element passes through, one after another.

    Raises ValueError if shapes differ.

    >>> ref = torch.linspace(1, 2, 300, dtype=torch.float64)
    >>> compare(ref.bfloat16(), ref, ref.bfloat16(), 2**-8).ok
    True
    >>> compare(ref.bfloat16() * 1.1, ref, ref.bfloat16(), 2**-8).ok
    False
    """
    refs = _pool(ref)
    gots, eagers = _pool(got, like=ref), _pool(eager, like=ref)
    scale = _rms(refs)
    rms, max_error = _errors(gots, refs, scale)
    eager_rms, eager_max_error = _errors(eagers, refs, scale)
    if scale == 0:  # no elements, or zeros alone: exact
        return Comparison(rms, eager_rms, 0.0, max_error, eager_max_error, 0.0, unit_roundoff)
    ulp = 2 * unit_roundoff * 2.0 ** math.floor(math.log2(refs.abs().max().item()))
    return Comparison(
        rms=rms,
        eager_rms=eager_rms,
        rms_limit=rms_limit(eager_rms, unit_roundoff, sums),
        max=max_error,
        eager_max=eager_max_error,
        max_limit=2 * eager_max_error + 2 * ulp,
        unit_roundoff=unit_roundoff,
    )


def rms_limit(eager_rms: float, unit_roundoff: float, sums: Sequence[int] = ()) -> float:
    """Return the limit of the rms error, given eager's; arguments as for `compare`.

    >>> rms_limit(eager_rms=0.0, unit_roundoff=2**-8)
    0.0009765625
    """
    chain = 0.3 * math.sqrt(sum(min(n, CHAIN) for n in sums)) * 2.0**-24
    return 1.25 * max(eager_rms, chain) + unit_roundoff / 4


def rms_error(got: Tensor, ref: Tensor) -> float:
    """Return the rms error relative to the reference's rms, in the reference's dtype.

    >>> rms_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    0.2
    """
    return float((got.detach().view(ref.shape) - ref).norm() / ref.norm())


def _pool(
    tensors: Tensor | Sequence[Tensor], like: Tensor | Sequence[Tensor] | None = None
) -> Tensor:
    parts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if like is not None:
        shapes = [tuple(t.shape) for t in parts]
        want = [tuple(t.shape) for t in ([like] if isinstance(like, Tensor) else like)]
        if shapes != want:
            raise ValueError(f"got shapes {shapes}, want the reference's {want}")
    return torch.cat([t.detach().to("cpu", torch.float64).flatten() for t in parts])


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _errors(got: Tensor, ref: Tensor, scale: float) -> tuple[float, float]:
    """Return the rms error relative to `scale` (absolute if scale is 0), and the largest error."""
    error = got - ref
    if not error.numel():
        return 0.0, 0.0
    return _rms(error) / (scale or 1.0), error.abs().max().item()
