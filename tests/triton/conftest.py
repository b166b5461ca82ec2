"""Kernels run here on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter; else not at all.

The variable must be set before Triton is imported and holds for a whole process: so these tests
have one of their own (the Makefile's `test`). Without Triton only test_selection.py is left.
"""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

import lora_kernels
from lora_kernels.backends import launches, triton
from tests.support.interpreter import programs_run_in, shuffled_order
from tests.triton.device import DEVICE

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if not (interpreted or torch.cuda.is_available()) or triton.unavailable_reason() is not None:
    collect_ignore_glob = ["test_[!s]*.py"]


@pytest.fixture
def device() -> Iterator[str]:
    """The device of a test's tensors; the triton backend is forced."""
    with lora_kernels.backend("triton"):
        yield DEVICE


@pytest.fixture(autouse=interpreted)
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """A launch's programs run in an order that is drawn from the test's name, as a GPU may run
    them."""
    with programs_run_in(shuffled_order(zlib.crc32(request.node.name.encode()))):
        yield


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """A GPU plans each test's calls first, which tests may watch."""
    launches.forget()
