"""Sizes of real models, many waves of programs: y and every gradient against float64."""

from typing import Any

import pytest
import torch

import lora_kernels
from lora_kernels.oracle.case import Case, inputs, judge, run
from tests.support.engines import assert_within
from tests.support.problems import bf16, f16, f32

SCALED: Any = {"gate": True, "column_scale": True, "bias": True}


def check(case: Case) -> None:
    with lora_kernels.backend("triton"):
        assert_within(case, judge(case))


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
@pytest.mark.parametrize("M", [1, 16, 1000])
@pytest.mark.parametrize("dtypes", [(bf16, None), (f16, None), (bf16, f32)], ids=str)
def test_lora_linear_of_a_projection_is_within_tolerance(dtypes: Any, M: int, quant: str) -> None:
    check(Case(M, 1024, 4096, 16, *dtypes, quant=quant, device="cuda"))


@pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
def test_lora_linear_of_every_option_is_within_tolerance(dtype: torch.dtype) -> None:
    check(Case(777, 1536, 2048, 64, dtype, **SCALED, device="cuda"))
    check(Case(777, 1536, 2048, 16, dtype, quant="fp4-64", **SCALED, device="cuda"))


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
@pytest.mark.parametrize("M", [1, 16, 4096])
def test_lora_linear_again_has_the_same_bits(M: int, quant: str) -> None:
    args = inputs(Case(M, 4096, 4096, 16, bf16, quant=quant, **SCALED, device="cuda"))
    with lora_kernels.backend("triton"):
        first = run(lora_kernels.lora_linear, args)
        for _ in range(5):
            again = run(lora_kernels.lora_linear, args)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_lora_linear_of_offsets_past_31_bits_is_the_same() -> None:
    """x of 2³¹ elements and more: its last rows come out as they do by themselves."""
    M, K, N = (1 << 31) // 4096 + 300, 4096, 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * M * K:
        pytest.skip("the GPU's memory is too small")
    x = torch.randn(M, K, dtype=bf16, device="cuda")
    W, A, B = (torch.randn(s, dtype=bf16, device="cuda") / 64 for s in ((N, K), (16, K), (N, 16)))
    with lora_kernels.backend("triton"):
        whole = lora_kernels.lora_linear(x, W, A, B)[-256:]
        part = lora_kernels.lora_linear(x[-256:].contiguous(), W, A, B)
    # y is rounded to the one or the other neighbour: 2⁻⁷ of it. So is each of 16 elements of S,
    # at most 4 and off by 2⁻⁹ of that in both, which meets at most 4/64 of B.
    torch.testing.assert_close(whole, part, rtol=2**-7, atol=2 * 16 * 4 * 2**-9 * 4 / 64)
