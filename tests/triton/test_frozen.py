"""Frozen lora_A or lora_B: the Triton kernels read nothing that was not saved."""

from typing import Any

import pytest

import lora_kernels
from lora_kernels.choice import choose as selection
from tests.autograd import frozen
from tests.autograd.cases import K, M


@pytest.mark.parametrize("strategy", selection.STRATEGIES["triton"])
@pytest.mark.parametrize("kinds", frozen.FROZEN, ids="-".join)
@pytest.mark.parametrize("option", ["plain", "gate", "column_scale"])
def test_frozen_factors_of_lora_linear(option: str, kinds: Any, strategy: str) -> None:
    with lora_kernels.backend("triton", strategy):
        frozen.check_linear(option, kinds, (M, K))
