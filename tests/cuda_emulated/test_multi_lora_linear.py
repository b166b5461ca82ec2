"""Rows with adapters of their own, by the CUDA kernels, against the float64 reference."""

import pytest

from lora_kernels.bench.multi import MultiCase
from tests.support import multi
from tests.support.engines import check


@pytest.mark.parametrize("case", multi.some_cases((70, 128)), ids=str)
def test_multi_lora_linear_of_each_case_is_within_tolerance(case: MultiCase) -> None:
    check(case)


def test_multi_lora_linear_row_overflows_spoils_its_adapter_alone() -> None:
    multi.check_overflow()


def test_multi_lora_linear_adapter_overflows_spoils_its_rows_alone() -> None:
    multi.check_isolation()
