"""The row norm of W + (B ⊙ g)·A against the float64 reference.

The tests here run where a directory imports them; its fixture `device` forces the backend.
"""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.oracle.case import Case
from tests.support.engines import check_norm

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


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
def test_dora_norm_of_dtypes_is_within_tolerance(
    dtypes: Any, quant: str, gate: bool, device: str
) -> None:
    check_norm(Case(0, 131, 96, 13, *dtypes, quant=quant, gate=gate, device=device))


@pytest.mark.parametrize("rank", [1, 64, 65, 256])
def test_dora_norm_of_ranks_is_within_tolerance(rank: int, device: str) -> None:
    check_norm(Case(0, 130, 65, rank, bf16, device=device))


def test_dora_norm_of_strided_operands_has_the_same_bits(device: str) -> None:
    args = [torch.randn(s, device=device) for s in ((40, 65), (5, 65), (40, 5))]
    got = lora_kernels.dora_norm(*(t.t().contiguous().t() for t in args))
    assert torch.equal(got, lora_kernels.dora_norm(*args))
