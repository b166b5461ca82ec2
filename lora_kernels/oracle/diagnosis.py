"""What explains the error of a result that misses the tolerance.

A hypothesis is a fault of a kernel. It explains a result if the result is within the tolerance of
what the reference computes with this fault, and if at least half of the error is gone. An
accumulator in 16 bits is judged by the size of its error, in the sum and in a shorter one, because
the error itself depends on the order of the additions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import case as cases
from .case import AnyCase, Case, Expected, dtype_name
from .tolerance import Comparison

BLOCKS = (8, 16, 32, 64, 128)  # terms that a kernel's loop adds at a time
ROUNDED_EVERY = (16, 32, 64)  # terms after which an accumulator may be rounded
AGAIN = "a second run on the same arguments is within the tolerance: results vary from run to run"
CROP = 64  # rows and columns of an output for which hypotheses are computed
# Output -> its sums: their dimension, the operand and its axis whose slice is their terms, and
# their name. S is (x·Aᵀ) ⊙ g, and dS is (dy·B) ⊙ g.
SUMS: dict[str, tuple[tuple[str, str, int, str], ...]] = {
    "y": (
        ("K", "x", 1, "x·Wᵀ and x·Aᵀ"),
        ("K", "weight", 1, "x·Wᵀ"),
        ("K", "lora_A", 1, "x·Aᵀ"),
        ("R", "lora_B", 1, "S·Bᵀ"),
    ),
    "dx": (
        ("N", "dy", 1, "dy·W and dy·B"),
        ("N", "weight", 0, "dy·W"),
        ("N", "lora_B", 0, "dy·B"),
        ("R", "lora_B", 1, "dS·A"),
    ),
    "dA": (("M", "dy", 0, "dSᵀ·x"), ("N", "lora_B", 0, "dy·B")),
    "dB": (("M", "dy", 0, "dyᵀ·S"), ("K", "lora_A", 1, "x·Aᵀ")),
    "dbias": (("M", "dy", 0, "the sum of dy"),),
}
# Output -> the operands whose value 0 leaves a part of it out, and the name of the part.
PARTS = {
    "y": {"scaling": "the LoRA part", "weight": "x·Wᵀ", "bias": "bias"},
    "dx": {"scaling": "the LoRA part", "weight": "dy·W"},
}
# Output -> the axes of the operands that an index of the output selects, and those of dy.
AXES: dict[str, tuple[tuple[tuple[str, int], ...], ...]] = {
    "y": (
        (("x", 0), ("dy", 0)),
        (("weight", 0), ("lora_B", 0), ("bias", 0), ("column_scale", 0), ("dy", 1)),
    ),
    "dx": ((("x", 0), ("dy", 0)), (("x", 1), ("weight", 1), ("lora_A", 1))),
    "dA": ((), (("x", 1), ("weight", 1), ("lora_A", 1))),
    "dB": ((("weight", 0), ("lora_B", 0), ("bias", 0), ("column_scale", 0), ("dy", 1)), ()),
}

Arguments = dict[str, Any]


class Result(NamedTuple):
    """An output of a case that misses: float64 of each seed, stacked as [seeds, *shape]."""

    name: str
    got: Tensor
    ref: Tensor
    dtype: torch.dtype
    verdict: Comparison

    @property
    def scale(self) -> float:
        return _rms(self.ref)


class Fault(NamedTuple):
    """A hypothesis: what it says, and the arguments with which the reference has this fault.

    A rough one has to leave a third of the error, and may leave more than the tolerance.
    """

    text: str
    change: Callable[[Arguments], Arguments]
    is_rough: bool = False

    @property
    def share(self) -> int:
        return 3 if self.is_rough else 2


class Diagnosis(NamedTuple):
    """What explains an error, None if nothing does, and where the largest error is."""

    cause: str | None
    largest: str

    def __str__(self) -> str:
        return self.cause or f"largest error at {self.largest}"


def diagnose(
    case: AnyCase, names: Iterable[str], call: Callable[..., Any] | None = None
) -> dict[str, Diagnosis]:
    """Run `call`, by default the case's op, again; diagnose the named outputs, which missed.

    >>> case = Case(M=6, N=33, K=17, R=3)
    >>> found = diagnose(case, ["y"], lambda scaling, **rest: case.op(scaling=3 * scaling, **rest))
    >>> found["y"].cause
    'the LoRA part is 3.00 times what it should be'
    """
    call = call or case.op
    samples = cases.expected_results(case)
    results = cases.results(samples, call, case)
    found = {}
    for name, verdict in cases.verdicts(results, samples, case).items():
        if name not in names:
            continue
        got = torch.stack([_wide(each[name]) for each in results])
        ref = torch.stack([_wide(sample.ref[name]) for sample in samples])
        result = Result(name, got, ref, results[0][name].dtype, verdict)
        cause = AGAIN if verdict.ok else _cause(result, case, samples, call)
        found[name] = Diagnosis(cause, _largest_error(result))
    return found


def _cause(
    result: Result, case: AnyCase, samples: list[Expected], call: Callable[..., Any]
) -> str | None:
    text = _not_finite(result) or _rounded_result(result) or _wrong_part(result)
    if text is not None:
        return text
    if isinstance(case, Case) and samples[0].args["x"].dim() == 2:
        return _fault(result, case, samples) or _accumulator(result, case, call)
    return _factor(result.name, result.got, result.ref, result.ref, result, 0.0)[1]


# --- where ---------------------------------------------------------------------------------------


def _not_finite(result: Result) -> str | None:
    bad = ~result.got.isfinite()
    if not bad.any():
        return None
    counts = {"NaN": result.got.isnan().sum().item(), "inf": result.got.isinf().sum().item()}
    words = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    first = bad.any(0).nonzero()[0].tolist()
    where = _region(bad.any(0), result.name)
    return f"{words} of {bad.numel()} elements, the first at {first}{where and f': {where}'}"


def _wrong_part(result: Result) -> str | None:
    """Say which rows, columns or elements alone are wrong."""
    error = (result.got - result.ref).abs()
    limit = result.verdict.rms_limit * result.scale
    for wrong in (*_wrong_lines(error, limit), error > result.verdict.max_limit):
        wrong = wrong.any(0)
        others = error[:, ~wrong]
        region = _region(wrong, result.name)
        if region and _rms(others) <= limit and others.max() <= result.verdict.max_limit:
            is_zero = not result.got[:, wrong].any()
            state = "zero" if is_zero else "wrong"
            verb = "is" if wrong.sum() == 1 or _is_one_line(wrong) else "are"
            return f"only {region} {verb} {state}; the rest is within the tolerance"
    return None


def _is_one_line(wrong: Tensor) -> bool:
    lines = [wrong.nonzero()[:, axis].unique().numel() for axis in range(wrong.dim())]
    return 1 in lines and any(n == size for n, size in zip(lines, wrong.shape, strict=True))


def _wrong_lines(error: Tensor, limit: float) -> Iterator[Tensor]:
    """Yield the elements of the wrong rows, then those of the wrong columns."""
    for axis in range(1, error.dim()):
        others = [other for other in range(error.dim()) if other != axis]
        wrong = error.square().mean(others, keepdim=True).sqrt() > 2 * limit
        yield wrong.expand_as(error)


def _region(wrong: Tensor, name: str) -> str:
    """Name the box of all wrong elements, or "" if it is more than half of the output."""
    words, share = [], 1.0
    if not wrong.any():
        return ""
    for axis, size in enumerate(wrong.shape):
        indices = wrong.nonzero()[:, axis].unique().tolist()
        if len(indices) == size:
            continue
        share *= len(indices) / size
        words.append(_indices(_kinds(wrong)[axis], indices, size))
    return f"{' and '.join(words)} of {name}" if words and share <= 0.5 else ""


def _indices(kind: str, indices: list[int], size: int) -> str:
    """
    >>> _indices("row", [64, 65, 66], 67), _indices("row", [1, 3, 5, 7], 9)
    ('rows 64 to 66 (the last 67 mod 8, 16, 32 or 64)', '4 rows of 9 (1, 3, 5, …)')
    """
    first, last, count = indices[0], indices[-1], len(indices)
    if last - first + 1 > count:
        return f"{count} {kind}s of {size} ({', '.join(map(str, indices[:3]))}, …)"
    text = f"{kind} {first}" if count == 1 else f"{kind}s {first} to {last}"
    blocks = [b for b in BLOCKS if last == size - 1 and size % b == count < size]
    return f"{text} (the last {size} mod {_either(blocks)})" if blocks else text


def _either(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _largest_error(result: Result) -> str:
    if not result.got.numel():
        return "none: no elements"
    error = (result.got - result.ref).abs().nan_to_num(math.inf)
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    words = [f"{kind} {i}" for kind, i in zip(_kinds(error[0]), at[1:], strict=True)]
    got, want = result.got[at].item(), result.ref[at].item()
    return f"{', '.join(words)}: {got:.6g}, the reference has {want:.6g}"


def _kinds(t: Tensor) -> tuple[str, ...]:
    names = {1: ("element",), 2: ("row", "column")}
    return names.get(t.dim()) or tuple(f"axis {axis} at" for axis in range(t.dim()))


# --- why -----------------------------------------------------------------------------------------


def _rounded_result(result: Result) -> str | None:
    """Say that the result was rounded to a coarser dtype, if each element is such a number."""
    for narrow in _narrower(result.dtype):
        if narrow is result.dtype:
            continue
        u = torch.finfo(narrow).eps / 2
        is_rounded = bool((result.got.to(narrow).double() == result.got).all())
        if is_rounded and result.got.any() and result.verdict.rms <= 0.78 * u:
            name = dtype_name(narrow)
            return f"each element is a {name} number: the result was rounded to {name}"
    return None


def _narrower(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the 16-bit dtypes that are at most as fine as a dtype."""
    eps = torch.finfo(dtype).eps
    return [d for d in (torch.float16, torch.bfloat16) if torch.finfo(d).eps >= eps]


def _fault(result: Result, case: Case, samples: list[Expected]) -> str | None:
    """Return the text of the hypothesis that leaves the smallest error, of those that explain it.

    A factor is fitted, so a fault without a free number is preferred.
    """
    wide = [cases.widened(sample.args) for sample in samples]
    cropped = [_crop(args, result.name) for args in wide]
    got = result.got if case.dropout_p else _crop_output(result.got, result.name)
    compute = functools.partial(_outputs, cropped, case, result.name)
    ref = compute(lambda args: {})
    limit = result.verdict.rms_limit
    found: list[tuple[float, str]] = []
    for fault in _faults(result, case, cropped[0]):
        with_fault = compute(fault.change)
        if _explains(got, with_fault, ref, math.inf if fault.is_rough else limit, fault.share):
            found.append((_rms(got - with_fault), fault.text))
    if case.base and case.N == case.K and result.name in ("y", "dx"):
        transposed = [_crop({**args, "weight": args["weight"].mT}, result.name) for args in wide]
        with_fault = _outputs(transposed, case, result.name, lambda args: {})
        if _explains(got, with_fault, ref, limit):
            found.append((_rms(got - with_fault), "W stands in place of Wᵀ, or Wᵀ of W"))
    in_memory = result.ref.mT.reshape(result.ref.shape) if result.ref.dim() > 2 else result.ref
    if _explains(result.got, in_memory, result.ref, limit):
        found.append((_rms(result.got - in_memory), f"the memory of {result.name} is transposed"))
    found = found or [*_factors(result, got, ref, compute, cropped[0], case.scaling)]
    found = found or [*_pairs(result, got, compute, case, cropped[0])]
    return min(found, key=lambda item: item[0])[1] if found else None


def _outputs(
    wide: list[Arguments], case: Any, name: str, change: Callable[[Arguments], Arguments]
) -> Tensor:
    """Return the reference's output [seeds, *shape] on changed arguments."""
    return torch.stack([cases.run(case.equation, {**args, **change(args)})[name] for args in wide])


def _explains(got: Tensor, with_fault: Tensor, ref: Tensor, limit: float, share: int = 2) -> bool:
    left, before = _rms(got - with_fault), _rms(got - ref)
    return left <= limit * max(_rms(ref), _rms(with_fault)) and left <= before / share


def _faults(result: Result, case: Any, args: Arguments) -> Iterator[Fault]:
    for dimension, operand, axis, name in SUMS.get(result.name, ()):
        if case.base or operand not in ("x", "weight", "dy"):
            yield from _block_faults(dimension, args[operand].shape[axis], operand, axis, name)
    for operand in ("rank_gate", "column_scale"):
        if args.get(operand) is not None and result.name not in ("dg", "dc"):
            yield Fault(
                f"{operand} is not applied", functools.partial(_with_value, {operand: None})
            )
    if case.dropout_p:
        yield Fault(
            "dropout is not applied",
            functools.partial(_with_value, {"dropout_p": 0.0, "rng": None}),
        )
    if result.dtype is torch.float32:
        for name, rounding in ROUNDINGS.items():
            text = f"most of the error is that of operands rounded to {name}"
            yield Fault(text, functools.partial(_with_rounded, rounding), is_rough=True)


def _block_faults(dimension: str, size: int, operand: str, axis: int, name: str) -> Iterator[Fault]:
    """Yield the hypotheses that the first or the last block of a sum is missing or added twice."""
    last: dict[int, list[int]] = {}
    for block in BLOCKS:
        remainder = size % block
        if 0 < remainder < size:
            last.setdefault(remainder, []).append(block)
        elif not remainder and block < size:
            last.setdefault(block, [])
    slices = [(size - count, size, blocks) for count, blocks in last.items()]
    slices += [(0, block, []) for block in BLOCKS if block < size]
    verbs = ("lack", "add twice") if " and " in name else ("lacks", "adds twice")
    for start, stop, blocks in slices:
        count, end = stop - start, "last" if start else "first"
        terms = f"the {end} {count} of {size} terms"
        why = f" ({dimension} mod {_either(blocks)})" if blocks else ""
        for factor, verb in zip((0.0, 2.0), verbs, strict=True):
            change = functools.partial(_with_scaled_slice, operand, axis, start, stop, factor)
            yield Fault(f"{name} {verb} {terms}{why}", change)


def _with_value(values: Arguments, args: Arguments) -> Arguments:
    return values


def _with_scaled_slice(
    operand: str, axis: int, start: int, stop: int, factor: float, args: Arguments
) -> Arguments:
    """Return the operand with a slice of it times a factor, a leaf as before."""
    t = args[operand].detach().clone()
    t.narrow(axis, start, stop - start).mul_(factor)
    return {operand: t.requires_grad_(args[operand].requires_grad)}


def _to_tf32(t: Tensor, added: int) -> Tensor:
    bits = t.float().view(torch.int32)
    return ((bits + added) & ~0x1FFF).view(torch.float32).double()


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda t: t.to(torch.bfloat16).double(),
    "float16": lambda t: t.to(torch.float16).double(),
    "TF32": lambda t: _to_tf32(t, 0x1000),
    "TF32, towards 0": lambda t: _to_tf32(t, 0),
}


def _with_rounded(rounding: Callable[[Tensor], Tensor], args: Arguments) -> Arguments:
    names = ("x", "weight", "lora_A", "lora_B", "dy")
    return {
        name: rounding(args[name].detach()).requires_grad_(args[name].requires_grad)
        for name in names
    }


def _factors(
    result: Result,
    got: Tensor,
    ref: Tensor,
    compute: Callable[[Callable[[Arguments], Arguments]], Tensor],
    args: Arguments,
    scaling: float,
) -> Iterator[tuple[float, str]]:
    """Yield the error that is left and the text, for factors that explain the result."""
    parts = {result.name: ref}
    for operand, name in PARTS.get(result.name, {}).items():
        value = args.get(operand)
        if value is None or (isinstance(value, Tensor) and not value.any()):
            continue
        zero = torch.zeros_like(value) if isinstance(value, Tensor) else 0.0
        parts[name] = ref - compute(functools.partial(_with_value, {operand: zero}))
    for name, part in parts.items():
        left, text = _factor(name, got, ref, part, result, scaling)
        if text is not None:
            yield left, text + (_whole_sum(result.name, name, args) if "missing" in text else "")


def _pairs(
    result: Result,
    got: Tensor,
    compute: Callable[[Callable[[Arguments], Arguments]], Tensor],
    case: Any,
    args: Arguments,
) -> Iterator[tuple[float, str]]:
    """Yield the error that is left and the text, for a fault and a factor that explain the result
    together."""

    def compute_both(fault: Fault, change: Callable[[Arguments], Arguments]) -> Tensor:
        def both(args: Arguments) -> Arguments:
            first = fault.change(args)
            return first | change({**args, **first})

        return compute(both)

    for fault in _faults(result, case, args):
        if not fault.is_rough:
            with_fault, both = compute(fault.change), functools.partial(compute_both, fault)
            for left, text in _factors(result, got, with_fault, both, args, case.scaling):
                yield left, f"{fault.text}, and {text}"


def _whole_sum(output: str, name: str, args: Arguments) -> str:
    """Say that all terms of a short sum are what its length leaves after whole blocks."""
    for dimension, operand, axis, part in SUMS.get(output, ()):
        size = args[operand].shape[axis]
        blocks = [block for block in BLOCKS if block > size]
        if part == name and blocks:
            return f": all {size} terms, which are {dimension} mod {_either(blocks)}"
    return ""


def _factor(
    name: str, got: Tensor, ref: Tensor, part: Tensor, result: Result, scaling: float
) -> tuple[float, str | None]:
    """Fit got = ref + (factor − 1) · part; return the error that is left, and what it says."""
    square = part.square().sum().item()
    if not square:
        return math.inf, None
    factor = 1 + ((got - ref) * part).sum().item() / square
    with_fault = ref + (factor - 1) * part
    if not _explains(got, with_fault, ref, result.verdict.rms_limit):
        return math.inf, None
    return _rms(got - with_fault), f"{name} {_factor_in_words(factor, scaling)}"


def _factor_in_words(factor: float, scaling: float) -> str:
    """
    >>> _factor_in_words(0.0001, 1.25), _factor_in_words(1.25, 1.25)
    ('is missing', 'is 1.25 times what it should be: the scaling, 1.25, applied twice?')
    """
    if abs(factor) < 0.005:
        return "is missing"
    digits = 2 if abs(factor - 1) > 0.05 else 3
    text = f"is {factor:.{digits}f} times what it should be"
    if scaling and abs(factor - scaling) < 0.005:
        return f"{text}: the scaling, {scaling:g}, applied twice?"
    if scaling and abs(factor - 1 / scaling) < 0.005:
        return f"{text}: the scaling, {scaling:g}, not applied?"
    return text


# --- accumulators --------------------------------------------------------------------------------


def _accumulator(result: Result, case: Case, call: Callable[..., Any]) -> str | None:
    """Say that the error has the size of an accumulator in 16 bits, in this sum and a shorter one.

    A constant relative error may have the size of one in this sum, but not in both.
    """
    dimension = {"y": "K", "dx": "N", "dA": "M", "dB": "M"}.get(result.name)
    if dimension is None or case.dropout_p or not (case.base or dimension == "M"):
        return None
    size = getattr(case, dimension)
    short = max(64, size // 16 // 64 * 64)
    if size < 4 * short:
        return None
    shorter = replace(case, **{dimension: short})
    verdict = cases.judge(shorter, call)[result.name]
    long_sum, short_sum = (_terms(each, result.name) for each in (case, shorter))
    found: list[tuple[float, str]] = []
    for dtype, block in itertools.product(_narrower(result.dtype), ROUNDED_EVERY):
        wanted = _accumulated_error(long_sum, dtype, block, result)
        wanted_short = _accumulated_error(short_sum, dtype, block, result)
        if wanted < 1.4 * wanted_short or not _is_as_large(verdict, wanted_short):
            continue
        if _is_as_large(result.verdict, wanted):
            text = (
                f"has the size of an accumulator in {dtype_name(dtype)}, rounded every {block} "
                f"terms of {dimension}: {in_words(wanted)}, and {in_words(wanted_short)} where "
                f"{dimension} is {short}"
            )
            found.append((abs(math.log(result.verdict.rms / wanted)), text))
    return min(found)[1] if found else None


def _is_as_large(verdict: Comparison, wanted: float) -> bool:
    """Return True if the error is 0.8 to 1.25 of the wanted one, with eager's or without."""
    return 0.8 * wanted <= verdict.rms <= 1.25 * math.hypot(wanted, verdict.eager_rms)


def _terms(case: Case, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operands [I, terms] and [terms, J] of an output's long sum, and the output [I, J].

    I and J are at most CROP.
    """
    args = _crop(cases.widened(cases.expected_results(case)[0].args), name)
    args = {n: value.detach() if isinstance(value, Tensor) else value for n, value in args.items()}
    x, W, A, B = (args[n] for n in ("x", "weight", "lora_A", "lora_B"))
    gate = args["scaling"] * (1.0 if args["rank_gate"] is None else args["rank_gate"])
    scale = 1.0 if args["column_scale"] is None else args["column_scale"]
    dz = args["dy"] * scale
    if name == "y":
        bias = 0.0 if args["bias"] is None else args["bias"]
        return x, W.T * scale, (x @ W.T + x @ A.T * gate @ B.T) * scale + bias
    if name == "dB":
        S = x @ A.T * gate
        return dz.T, S, dz.T @ S
    dS = dz @ B * gate
    return (dz, W, dz @ W + dS @ A) if name == "dx" else (dS.T, x, dS.T @ x)


def _accumulated_error(
    terms: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, block: int, result: Result
) -> float:
    """Return the relative rms error of an output whose long sum is rounded after each block."""
    a, b, output = terms
    total = torch.zeros_like(output)
    for start in range(0, a.shape[1], block):
        part = slice(start, start + block)
        total = (total + a[:, part] @ b[part]).to(dtype).double()
    rounded = (output + (total - a @ b)).to(result.dtype).double()
    return _rms(rounded - output) / _rms(output)


def in_words(error: float) -> str:
    """
    >>> in_words(1.0), in_words(0.0123), in_words(0.0016)
    ('100 %', '1.23 %', '1.6e-03')
    """
    return f"{100 * error:.3g} %" if 0.01 <= error < 10 else f"{error:.1e}"


# --- tensors -------------------------------------------------------------------------------------


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _evenly(size: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, CROP)).round().long()


def _crop(args: Arguments, name: str) -> Arguments:
    """Return the arguments for at most CROP rows and columns of an output, or all with dropout.

    Only the argument whose gradient the output is requires a gradient.
    """
    args = {n: value.detach() if isinstance(value, Tensor) else value for n, value in args.items()}
    axes_of = () if args["rng"] is not None else AXES.get(name, ())
    for axes in axes_of:
        for operand, axis in axes:
            if (t := args.get(operand)) is not None:
                args[operand] = t.index_select(axis, _evenly(t.shape[axis]).to(t.device))
    for operand, gradient in cases.GRADIENTS.items():
        if gradient == name:
            args[operand] = args[operand].clone().requires_grad_()
    return args


def _crop_output(t: Tensor, name: str) -> Tensor:
    """Crop an output [seeds, *shape] as `_crop` crops its arguments."""
    for axis, axes in enumerate(AXES.get(name, ()), start=1):
        if axes:
            t = t.index_select(axis, _evenly(t.shape[axis]))
    return t
