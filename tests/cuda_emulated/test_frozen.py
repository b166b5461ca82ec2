"""Frozen lora_A or lora_B: the CUDA kernels read nothing that was not saved."""

from typing import Any

import pytest

from lora_kernels.oracle.case import Case, inputs
from tests.autograd import frozen
from tests.support.problems import UNDROPPED, bf16


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kinds", frozen.FROZEN, ids="-".join)
@pytest.mark.parametrize("options", [{}, UNDROPPED], ids=["plain", "all"])
def test_frozen_factors_of_lora_linear(
    options: dict[str, Any], kinds: Any, recompute: bool
) -> None:
    # Beyond 32 columns the kernel of dS alone sums in another order than that of dS and dB.
    args = inputs(Case(6, 32, 64, 3, bf16, **options))
    del args["dy"]
    frozen.check_case(args, kinds, recompute)
