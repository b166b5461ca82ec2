"""Frozen lora_A or lora_B: the CUDA kernels read nothing that was not saved."""

from typing import Any

import pytest

from tests.autograd import frozen
from tests.autograd.cases import K, M


@pytest.mark.parametrize("kinds", frozen.FROZEN, ids="-".join)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_frozen_factors_of_lora_linear(option: str, kinds: Any) -> None:
    frozen.check_linear(option, kinds, (M, K))
