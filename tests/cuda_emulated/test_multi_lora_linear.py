"""Rows with adapters of their own, by the CUDA kernels, against the float64 reference."""

import pytest

from lora_kernels.measure.multi import MultiCase
from tests.ops.multi_cases import check, check_overflow, some_cases


@pytest.mark.parametrize("case", some_cases((70, 128)), ids=str)
def test_against_the_reference(case: MultiCase) -> None:
    check(case)


def test_a_row_that_overflows_is_its_adapter_s_alone() -> None:
    check_overflow()
