"""The row norm by Triton's kernel against the float64 reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.backends.triton import configs, launch
from lora_kernels.measure.case import Case, judge_norm
from tests.triton.device import DEVICE

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


def check(case: Case) -> None:
    with lora_kernels.backend("triton"):
        verdict = judge_norm(replace(case, device=DEVICE))["norm"]
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


def test_shares_of_a_row() -> None:
    N, K = 130, 320 + 33
    _, share = configs.row_norm(configs.INTERPRETER, N, K, 4)
    assert share < K and K % share
    for quant in ("", "nf4-64-nested"):
        check(Case(0, N, K, 5, f32, quant=quant))


def test_strides_and_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_wide", lambda t: True)
    check(Case(0, 130, 65, 5, f32, quant="nf4-64-nested"))
    args = [torch.randn(s, device=DEVICE) for s in ((40, 65), (5, 65), (40, 5))]
    with lora_kernels.backend("triton"):
        want = lora_kernels.dora_norm(*args)
        got = lora_kernels.dora_norm(*(t.t().contiguous().t() for t in args))
    assert torch.equal(got, want)
