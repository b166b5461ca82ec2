"""Rows with adapters of their own, by Triton's kernels, against the float64 reference."""

import pytest

import lora_kernels
from lora_kernels.backends.triton import LIBRARY, SPLIT
from lora_kernels.measure.multi import MultiCase
from tests.ops.multi_cases import check, check_overflow, some_cases


@pytest.mark.parametrize("case", some_cases((40, 64)), ids=str)
def test_against_the_reference(case: MultiCase) -> None:
    strategy = LIBRARY if case.rows == "mixed" and case.M == 40 else SPLIT
    with lora_kernels.backend("triton", strategy):
        check(case)


def test_a_row_that_overflows_is_its_adapter_s_alone() -> None:
    with lora_kernels.backend("triton"):
        check_overflow()
