"""Tests that need a GPU; none is collected without one, and test_cuda.py alone without Triton."""

import pytest
import torch

from lora_kernels.backends import replay, triton

if triton.is_interpreted() or not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif triton.unavailable_reason() is not None:
    collect_ignore_glob = ["test_[!c]*.py"]


@pytest.fixture(autouse=True)
def no_replays() -> None:
    """Each test's calls run as written first, which tests may watch."""
    replay.forget()
