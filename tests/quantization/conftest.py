"""One thread: the mean of the scales is summed in an order that depends on their number."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("bitsandbytes") is None:  # no test, but collected for its doctests
    collect_ignore = ["default_backend.py"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
