"""Tests that need a GPU; none is collected without one, and test_cuda.py alone without Triton."""

import pytest
import torch

from lora_kernels.backends import launches, triton

if triton.is_interpreted() or not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif triton.unavailable_reason() is not None:
    collect_ignore_glob = ["test_[!c]*.py"]


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Each test's calls are planned first, which tests may watch."""
    launches.forget()
