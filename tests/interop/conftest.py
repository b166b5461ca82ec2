"""Models this small are slower on several threads, much slower on a busy machine."""

import pytest

from lora_kernels.backends.forced import Forced
from lora_kernels.choice import choose as selection
from lora_kernels.core.problem import Choice, Problem
from tests.support.threads import threads as threads


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems for which `selection` was asked."""
    choose, asked = selection.choose, []

    def recorder(problem: Problem, requested: Forced | None = None) -> Choice:
        asked.append(problem)
        return choose(problem, requested)

    monkeypatch.setattr(selection, "choose", recorder)
    return asked
