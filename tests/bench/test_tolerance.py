"""The judge itself: what it lets pass, and what it must see."""

import pytest
import torch

from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case, judge
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value: float) -> None:
    ref = sample()
    got = ref.float()
    got[0] = value
    assert not compare(got, ref, ref.float(), unit_roundoff(torch.float32)).ok


def test_zeros_are_exact() -> None:
    zeros = torch.zeros(5, dtype=torch.float64)
    assert compare(zeros, zeros, zeros, U16).ok
    assert not compare(zeros + 1e-30, zeros, zeros, U16).ok
    empty = torch.zeros(0, 3)
    assert compare(empty, empty.double(), empty, U16).ok


def test_pools_seeds() -> None:
    parts = list(sample(512).split(128))
    verdict = compare([p.bfloat16() for p in parts], parts, [p.bfloat16() for p in parts], U16)
    whole = sample(512)
    assert verdict == compare(whole.bfloat16(), whole, whole.bfloat16(), U16)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2).double(), torch.zeros(3, 2), U16)
    with pytest.raises(AssertionError, match=r"dx: 1 of 2 elements differ, the first at \(1,\)"):
        assert_exact(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), "dx")


def test_plain_pytorch_stands_up_to_itself() -> None:
    """If the judged call is the baseline itself, every error is its own limit's four fifths."""
    options = {"gate": True, "column_scale": True, "bias": True, "dropout_p": 0.1}
    verdicts = judge(Case(33, 65, 63, 5, torch.bfloat16, **options), cases.plain_pytorch)
    assert set(verdicts) == OUTPUTS
    assert all(v.ok and v.rms == v.eager_rms for v in verdicts.values())


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_every_output_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cases.run

    def off_by_two_percent(call, args, autocast=None):  # type: ignore[no-untyped-def]
        results = run(call, args, autocast)
        if call is not cases.plain_pytorch and args["x"].dtype is not torch.float64:
            results[name] = results[name] * 1.02
        return results

    monkeypatch.setattr(cases, "run", off_by_two_percent)
    case = Case(33, 65, 63, 5, torch.bfloat16, gate=True, column_scale=True, bias=True)
    wrong = [output for output, verdict in judge(case).items() if not verdict.ok]
    assert wrong == [name]
