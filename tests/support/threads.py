"""A fixture for conftest.py, or for a module, that imports it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread unless a test is parametrized with more: small shapes are faster on one, and two
    that wait for each other crawl on a machine that is busy otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)
