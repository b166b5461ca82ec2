"""Models this small are slower on several threads, much slower on a busy machine."""

from collections.abc import Iterator

import pytest
import torch

from lora_kernels import selection
from lora_kernels.core.problem import Choice, Problem


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems for which `selection` was asked."""
    choose, asked = selection.choose, []

    def recorder(problem: Problem) -> Choice:
        asked.append(problem)
        return choose(problem)

    monkeypatch.setattr(selection, "choose", recorder)
    return asked
