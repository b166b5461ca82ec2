"""`lora-kernels verify` by the Triton kernels."""

import pytest
import torch

from lora_kernels import verify

ENGINE, DTYPES = "triton fused", (torch.float32, None)


@pytest.mark.parametrize("option", ["plain", "everything", "nf4"])
def test_verify_judges_what_the_kernels_take(option: str) -> None:
    found = verify.judge_option(((70, 65, 64, 13),), DTYPES, option, ENGINE)
    assert found is not None and found[0]["ok"], found


@pytest.mark.parametrize("option", ["dropout", "adapters", "experts", "head"])
def test_verify_leaves_out_what_they_refuse(option: str) -> None:
    assert verify.judge_option(((70, 65, 64, 13),), DTYPES, option, ENGINE) is None
