"""Rows with adapters of their own, by Triton's kernels, against the float64 reference."""

import pytest

import lora_kernels
from lora_kernels.backends.triton import LIBRARY, TWO_PASS
from lora_kernels.bench.multi import MultiCase
from tests.support import multi
from tests.support.engines import check


@pytest.mark.parametrize("case", multi.some_cases((40, 64)), ids=str)
def test_multi_lora_linear_of_each_case_is_within_tolerance(case: MultiCase) -> None:
    strategy = LIBRARY if case.rows == "mixed" and case.M == 40 else TWO_PASS
    with lora_kernels.backend("triton", strategy):
        check(case)


@pytest.mark.usefixtures("device")
def test_multi_lora_linear_row_overflows_spoils_its_adapter_alone() -> None:
    multi.check_overflow()


@pytest.mark.usefixtures("device")
def test_multi_lora_linear_adapter_overflows_spoils_its_rows_alone() -> None:
    multi.check_isolation()
