"""The judge itself: what it lets pass, and what it must see."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import AnyCase, Case, judge
from lora_kernels.oracle.experts_case import ExpertsCase
from lora_kernels.oracle.multi_case import MultiCase
from lora_kernels.oracle.tolerance import compare, unit_roundoff
from tests.support.assertions import assert_exact

OUTPUTS = {"y", *cases.GRADIENTS.values()} - {"dW"}
U16 = unit_roundoff(torch.bfloat16)


def sample(n: int = 4096) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_admits_three_roundings_and_not_more() -> None:
    ref = sample()
    eager = ref.bfloat16()
    scales = [1.07, 1.19, 1.31, 1.43]  # each factor moves every element to another rounding

    def rounded(times: int) -> torch.Tensor:
        t = ref.bfloat16()
        for scale in scales[: times - 1]:
            t = ((t.double() * scale).bfloat16().double() / scale).to(torch.float64)
        return t

    assert compare(rounded(1), ref, eager, U16).ok
    assert compare(rounded(3), ref, eager, U16).ok
    assert not compare(rounded(5), ref, eager, U16).ok


def test_sums_in_one_chain_are_admitted_whatever_the_library_does() -> None:
    """144 products are added one by one in float32; eager's error here is set to none."""
    x, w = sample(64 * 144).view(64, 144).float(), sample(32 * 144).view(32, 144).float()
    ref = x.double() @ w.double().t()
    y = torch.zeros(64, 32)
    for k in range(144):
        y += x[:, k, None] * w[:, k]
    u = unit_roundoff(torch.float32)
    assert not compare(y, ref, ref, u).ok
    assert compare(y, ref, ref, u, sums=(144,)).rms_limit > compare(y, ref, ref, u).rms
    assert compare(ref, ref, ref, u, sums=(10**6,)).rms_limit < 7 * u  # not any chain


def test_one_wrong_element_is_seen() -> None:
    """The largest error alone shows it: in the rms of 4096 it would pass."""
    ref = sample()
    got = ref.bfloat16().double()
    got[100] += 0.06
    verdict = compare(got, ref, ref.bfloat16(), U16)
    assert verdict.rms < verdict.rms_limit
    assert not verdict.ok


def reference(peak: float = -3.0) -> torch.Tensor:
    """4096 elements 1 and −1, and the largest of all."""
    ref = torch.ones(4096, dtype=torch.float64)
    ref[1::2] = -1.0
    ref[7] = peak
    return ref


def outlier(size: float) -> torch.Tensor:
    """The error of one element, in unit roundoffs. In the rms it counts for a 64th."""
    error = torch.zeros(4096, dtype=torch.float64)
    error[2900] = size
    return error


def errors(size: float, alternate: bool = True) -> torch.Tensor:
    """An error of this rms in every element, in unit roundoffs."""
    error = torch.full((4096,), size, dtype=torch.float64) * reference().square().mean().sqrt()
    error[::2] *= -1.0 if alternate else 1.0
    return error


# Peak of the reference, eager's error and the limit of ours, in unit roundoffs.
LARGEST = [  # one outlier: 2 · eager's + 2 ulp of the largest |reference|
    (3.0, 0.0, 8.0),
    (-3.0, 0.0, 8.0),
    (-2.0, 0.0, 8.0),
    (1.99, 0.0, 4.0),
    (-3.0, 8.0, 24.0),
    (-3.0, -8.0, 24.0),
]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("peak", "of_eager", "limit"), LARGEST)
def test_one_outlier_is_seen_above_its_limit_whatever_its_sign(
    peak: float, of_eager: float, limit: float, sign: float
) -> None:
    ref = reference(peak)
    eager = ref + U16 * outlier(of_eager)
    for share, ok in ((0.99, True), (1.01, False)):
        verdict = compare(ref + U16 * outlier(sign * share * limit), ref, eager, U16)
        assert verdict.rms < verdict.rms_limit and verdict.ok is ok, verdict


RMS = [  # eager's, the lengths of the sums, and the limit of ours: 1.25 · the larger + u/4
    (0.0, (), 0.25),
    (1.0, (), 1.5),
    (0.0, (100,), 4.0),  # the chain's: 0.3 · √100
    (0.0, (36, 64), 4.0),
    (4.0, (100,), 5.25),
    (2.0, (100,), 4.0),
    (0.0, (256,), 6.25),
    (0.0, (257,), 6.25),  # no longer chain
    (0.0, (36, 10**6), 0.25 + 1.25 * 0.3 * 292**0.5),
]


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize(("of_eager", "sums", "limit"), RMS)
def test_rms_error_is_seen_above_its_limit(
    of_eager: float, sums: tuple[int, ...], limit: float, alternate: bool
) -> None:
    ref, u = reference(), unit_roundoff(torch.float32)
    eager = ref + u * errors(of_eager)
    for share, ok in ((0.99, True), (1.01, False)):
        got = ref + u * errors(share * limit, alternate)
        verdict = compare(got, ref, eager, u, sums)
        assert verdict.max < verdict.max_limit and verdict.ok is ok, verdict


@pytest.mark.parametrize("wrong", ["ours", "eager", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_excuses_nothing(value: float, wrong: str) -> None:
    ref = sample()
    got, eager = ref.float(), ref.float()
    for t, name in ((got, "ours"), (eager, "eager")):
        t[0] = value if wrong in (name, "both") else t[0]
    assert not compare(got, ref, eager, unit_roundoff(torch.float32)).ok


@pytest.mark.parametrize("error", [1e-30, -1e-30, -1e-300])
def test_zeros_are_exact(error: float) -> None:
    zeros = torch.zeros(5, dtype=torch.float64)
    assert compare(zeros, zeros, zeros, U16).ok
    one = zeros.clone()
    one[4] = error
    assert not compare(one, zeros, zeros, U16).ok
    assert not compare(one, zeros, one, U16).ok  # eager's error does not excuse it
    empty = torch.zeros(0, 3)
    assert compare(empty, empty.double(), empty, U16).ok


def test_pools_seeds() -> None:
    parts = list(sample(512).split(128))
    verdict = compare([p.bfloat16() for p in parts], parts, [p.bfloat16() for p in parts], U16)
    whole = sample(512)
    assert verdict == compare(whole.bfloat16(), whole, whole.bfloat16(), U16)
    for number in range(4):  # a fault of any one is seen
        got = [p * 1.02 if i == number else p for i, p in enumerate(parts)]
        assert not compare(got, parts, [p.bfloat16() for p in parts], U16).ok


@pytest.mark.parametrize(
    ("p_elements", "sizes", "smallest"),
    [
        (4096, (4096, 256), 256),
        (4096, (4096, 255), 255),
        (4096, (5, 4096), 5),  # a gate of 5 ranks
        (4096, (4096, 0), 4096),  # no elements are nothing to pool
        (3, (4096,), 3),
        (1, (1,), 1),
        (0, (0,), 256),
    ],
)
def test_draws_of_small_results_are_as_many_as_their_smallest_needs(
    p_elements: int, sizes: tuple[int, ...], smallest: int
) -> None:
    seeds: list[int] = []

    def make(case: Case) -> cases.Expected:
        seeds.append(case.seed)
        return cases.Expected({}, {str(n): torch.zeros(n) for n in sizes}, {})

    found = cases.expected(Case(1, 1, 1, 1, seed=7), p_elements, make)
    assert len(found) == math.ceil(256 / smallest) and seeds == [7 + i for i in range(len(found))]


def test_shapes_must_agree() -> None:
    ref, wrong = torch.zeros(3, 2).double(), torch.zeros(2, 3)
    for got, eager in ((wrong, ref), (ref, wrong), ([ref], [ref, ref])):
        with pytest.raises(ValueError, match="shapes"):
            compare(got, ref, eager, U16)
    with pytest.raises(AssertionError, match=r"dx: 1 of 2 elements differ, the first at \(1,\)"):
        assert_exact(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), "dx")


def test_plain_pytorch_stands_up_to_itself() -> None:
    """If the judged call is the baseline itself, every error is its own limit's four fifths."""
    options = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.1}
    verdicts = judge(Case(33, 65, 63, 5, torch.bfloat16, **options), cases.plain_pytorch)
    assert set(verdicts) == OUTPUTS
    assert all(v.ok and v.rms == v.eager_rms for v in verdicts.values())


def outputs_missed(
    case: AnyCase, name: str, change: Callable[[torch.Tensor], torch.Tensor], patch: Any
) -> list[str]:
    """Return the outputs of the case's op that miss the tolerance if one of them is changed."""
    run = cases.run

    def changed(call: Any, args: dict[str, Any], autocast: Any = None) -> dict[str, torch.Tensor]:
        results = run(call, args, autocast)
        if call is case.op:
            results[name] = change(results[name])
        return results

    patch.setattr(cases, "run", changed)
    return [output for output, verdict in judge(case).items() if not verdict.ok]


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_every_output_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(33, 65, 63, 5, torch.bfloat16, gate=True, column_scale=True, bias=True)
    assert outputs_missed(case, name, lambda t: t * 1.02, monkeypatch) == [name]


WIDE = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *((Case(33, 65, 63, 5, gate=True, **WIDE), name) for name in ("dA", "dB", "dg")),
        *((MultiCase(33, 65, 63, **WIDE), name) for name in ("dA", "dB")),
        *((ExpertsCase((3, 0, 20), 65, 63, 5, **WIDE), name) for name in ("dA", "dB")),
    ],
    ids=str,
)
def test_float32_results_beside_a_bfloat16_x_are_held_to_float32(
    case: AnyCase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounding to float16 errs by 0.42 · 2⁻¹¹, which u/4 = 2⁻¹⁰ of bfloat16 would excuse."""
    assert outputs_missed(case, name, lambda t: t.half().float(), monkeypatch) == [name]
