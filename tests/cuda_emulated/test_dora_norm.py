"""The row norm by the CUDA kernel."""

import pytest

from lora_kernels.bench.case import Case
from tests.support.dora_norm import *  # noqa: F403
from tests.support.engines import check_norm


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_in_splits_of_a_row_is_within_tolerance(quant: str) -> None:
    """Three, the last one short."""
    check_norm(Case(0, 130, 545, 5, quant=quant))
