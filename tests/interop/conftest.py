"""Models this small are slower on several threads, much slower on a busy machine."""

from collections.abc import Iterator

import pytest

import lora_kernels
from lora_kernels.backends import decode4bit
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.choice import choose as selection
from lora_kernels.core.forced import Forced
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.peft import siblings
from tests.support.threads import threads as threads


@pytest.fixture
def gpu_path() -> Iterator[None]:
    """CPU tensors take the eager backend's GPU path; afterwards no layers share an x."""
    before = dict(decode4bit.bitsandbytes_reasons)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield
    decode4bit.bitsandbytes_reasons.clear()
    decode4bit.bitsandbytes_reasons.update(before)
    assert not siblings._frames.by_siblings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems for which `selection` was asked."""
    choose, asked = selection.choose, []

    def recorder(problem: Problem, requested: Forced | None = None) -> Choice:
        asked.append(problem)
        return choose(problem, requested)

    monkeypatch.setattr(selection, "choose", recorder)
    return asked
