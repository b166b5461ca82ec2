"""The row norm by the CUDA kernel against the float64 reference."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.measure.case import Case, judge_norm

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def check(case: Case) -> None:
    verdict = judge_norm(case)["norm"]
    assert verdict.ok, f"{case}: {verdict}"


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("quant", "dtypes"),
    [
        ("", (f32, None)),
        ("", (bf16, None)),
        ("", (f16, None)),
        ("nf4-64-nested", (f32, None)),
        ("nf4-64-nested", (bf16, f32)),
        ("fp4-32", (bf16, None)),
    ],
    ids=str,
)
def test_dtypes(dtypes: Any, quant: str, gate: bool) -> None:
    check(Case(0, 131, 96, 13, *dtypes, quant=quant, gate=gate))


@pytest.mark.parametrize("rank", [1, 64, 65, 256])
def test_ranks(rank: int) -> None:
    check(Case(0, 130, 65, rank, bf16))


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_shares_of_a_row(quant: str) -> None:
    """Three, the last one short."""
    check(Case(0, 130, 545, 5, f32, quant=quant))


def test_strides() -> None:
    args = [torch.randn(s) for s in ((40, 65), (5, 65), (40, 5))]
    want = lora_kernels.dora_norm(*args)
    assert torch.equal(lora_kernels.dora_norm(*(t.t().contiguous().t() for t in args)), want)
