"""Comparisons of results: the same numbers, or numbers within a derived tolerance.

`got` and `want` are tensors, or mappings or sequences of such, of the same structure and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.oracle import tolerance

# In float64, what is left of a difference between two orders of the same sums: fewer than 2**8
# terms in each, through a few layers, is well under 2**20 unit roundoffs. A scaling, a mask or a
# term left out moves these results by more than 2**-10.
FLOAT64_RTOL = 2.0**-33


def assert_bitwise_equal(got: Any, want: Any, name: str = "result") -> None:
    """AssertionError unless dtypes, shapes and all numbers are the same (0 equals −0, no NaN)."""
    for at, a, b in _pairs(got, want, name):
        assert torch.equal(a, b), f"{at}: {int((a != b).sum())} of {b.numel()} elements differ"


def derived_rtol(dtype: torch.dtype, terms: int = 2**8, layers: int = 2) -> float:
    """How far two orders of the same sums may be apart, relative to the result's norm.

    A sum of n terms errs by at most about √n unit roundoffs of the dtype (see tolerance), in either
    order, and each of the layers adds its own error to the one before.
    """
    if dtype is torch.float64:
        return FLOAT64_RTOL
    return 2 * layers * math.sqrt(terms) * tolerance.unit_roundoff(dtype)


def assert_close_derived(
    got: Any, want: Any, rtol: float | None = None, *, terms: int = 2**8, layers: int = 2
) -> None:
    """AssertionError unless the error's norm is within `derived_rtol`, or `rtol`, of each norm.

    rtol: for errors that are not only of the order of sums; its derivation stands at the call.
    """
    for at, a, b in _pairs(got, want, "result"):
        limit = derived_rtol(b.dtype, terms, layers) if rtol is None else rtol
        a, b = a.double(), b.double()
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= limit, f"{at}: relative error {error:.3g}, want at most {limit:.3g}"


def assert_close_to_reference(
    got: Mapping[str, Any],
    ref: Mapping[str, Any],
    eager: Mapping[str, Any],
    roundoff: Callable[[str, torch.dtype], float],
    sums: Callable[[str], tuple[int, ...]] = lambda name: (),
) -> None:
    """Each result has eager's dtype and little more is lost than eager loses (see tolerance).

    roundoff: of a result's name and dtype, the coarsest unit roundoff on its way. A result is a
    tensor, or a list of tensors to pool.
    """
    assert got.keys() == ref.keys() == eager.keys()
    for name in ref:
        dtypes = [t.dtype for t in _list(got[name])]
        assert dtypes == [t.dtype for t in _list(eager[name])], name
        u = roundoff(name, dtypes[0])
        verdict = tolerance.compare(got[name], ref[name], eager[name], u, sums(name))
        assert verdict.ok, f"{name}: {verdict}"


Results = Mapping[str, Tensor]


def assert_as_exact(
    got: Results | Sequence[Results],
    ref: Results | Sequence[Results],
    peer: Results | Sequence[Results],
) -> None:
    """AssertionError unless `got` has the peer's dtypes and loses little more beside float64 `ref`.

    Each is the results of one model by name, or those of several draws of it. The rms errors of all
    tensors, each relative to its own size, are pooled: a model's tensors do not err independently,
    since a few early roundings move all that follow. The ratio of two such errors scatters by 1/√n
    for n roundings that count. Twice the limit of `tolerance`, 2.5 times the peer's error, is four
    standard errors at n = 19. One layer has more; a language model of two layers has 5, as its
    ratio scattered by 0.45 over 96 models, so that it needs four draws. Their geometric mean
    counts, as the most badly conditioned draw alone would decide another. One draw in 5,000 was 16
    limits off, by one early rounding; no draw is 32 limits off, where a wrong term is 10⁴ off.
    """
    several = [[t] if isinstance(t, Mapping) else [*t] for t in (got, ref, peer)]
    excess = [_excess(*draw) for draw in zip(*several, strict=True)]
    mean = math.exp(sum(math.log(max(e, 2.0**-9)) for e in excess) / len(excess))
    assert mean <= 2 and max(excess) <= 32, f"rms errors of {excess} times the limits, mean {mean}"


def _excess(got: Results, ref: Results, peer: Results) -> float:
    """The rms error of all tensors over its limit beside the peer's."""
    assert got.keys() == ref.keys() == peer.keys()
    squares, dtypes = [0.0, 0.0], {t.dtype for t in got.values()}
    for name, want in ref.items():
        pair = got[name].detach(), peer[name].detach()
        assert pair[0].dtype is pair[1].dtype, f"{name}: {pair[0].dtype}, want {pair[1].dtype}"
        assert pair[0].shape == pair[1].shape == want.shape, name
        if not want.any():
            assert_exact(pair[0], want, name)
            continue
        errors = [tolerance.rms_error(t.double(), want.detach()) for t in pair]
        squares = [total + e * e for total, e in zip(squares, errors, strict=True)]
    ours, theirs = (math.sqrt(total / len(ref)) for total in squares)
    return ours / tolerance.rms_limit(theirs, tolerance.unit_roundoff(*dtypes))


def assert_exact(got: Tensor, want: Tensor, name: str = "result") -> None:
    """AssertionError unless both hold the same numbers in the same shape; dtypes may differ.

    NaN equals NaN; 0 equals −0.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    a, b = got.detach().double(), want.detach().double()
    wrong = ~((a == b) | (a.isnan() & b.isnan()))
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, "
            f"the first at {at}: {a[at].item()}, want {b[at].item()}"
        )


def _list(found: Tensor | list[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def _pairs(got: Any, want: Any, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors of both, with where they are; AssertionError where structures differ."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor), f"{name}: got {type(got).__name__}, want a tensor"
        assert got.dtype is want.dtype, f"{name}: got {got.dtype}, want {want.dtype}"
        assert got.shape == want.shape, f"{name}: got {got.shape}, want {want.shape}"
        yield name, got.detach(), want.detach()
    elif isinstance(want, Mapping):
        assert got.keys() == want.keys(), f"{name}: got {[*got]}, want {[*want]}"
        for key in want:
            yield from _pairs(got[key], want[key], str(key))
    elif want is None:
        assert got is None, f"{name}: want none"
    else:
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            yield from _pairs(a, b, f"{name}[{i}]")


def assert_bytes(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes: packed bytes seen as bfloat16 may be NaN."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert (got[name].dtype, got[name].shape) == (t.dtype, t.shape), name
        a, b = (each.contiguous().flatten().view(torch.uint8) for each in (got[name], t))
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ"
