"""The row norm by Triton's kernel."""

import pytest

from lora_kernels.backends.triton import configs, launch
from lora_kernels.bench.case import Case
from tests.support.dora_norm import *  # noqa: F403
from tests.support.engines import check_norm


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_dora_norm_in_splits_of_a_row_is_within_tolerance(quant: str, device: str) -> None:
    N, K = 130, 320 + 33
    _, per_split = configs.row_norm(configs.INTERPRETER, N, K, 4)
    assert per_split < K and K % per_split
    check_norm(Case(0, N, K, 5, quant=quant, device=device))


def test_dora_norm_with_64_bit_offsets_is_within_tolerance(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(launch, "is_wide", lambda t: True)
    check_norm(Case(0, 130, 65, 5, quant="nf4-64-nested", device=device))
    test_dora_norm_of_strided_operands_has_the_same_bits(device)  # noqa: F405
