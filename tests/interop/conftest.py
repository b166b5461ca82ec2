"""Models this small are slower on several threads, much slower on a busy machine."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import lora_kernels
from lora_kernels.backends import decode4bit
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.choice import choose as selection
from lora_kernels.core.forced import Forced
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.peft import direct, siblings
from lora_kernels.peft.adapters import dropout_p
from lora_kernels.peft.plan import plan_linear
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


@pytest.fixture(autouse=True)
def direct_calls_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct call succeeds only where the plan says fused, with the plan's tensors.

    It holds for every state of a layer that a test of this folder builds.
    """
    call = direct.call

    def checked(layer: Any, x: Tensor) -> Tensor | None:
        y = call(layer, x)
        if y is None:
            return None
        state = direct.read(layer)
        assert state is not None
        adapters, reason, base_reason, is_dora = plan_linear(layer, x.device, x.dtype)
        assert (reason, base_reason, is_dora) == (None, None, False)
        (adapter,) = adapters
        base = layer.base_layer._parameters
        planned = base["weight"], adapter.lora_A.weight, adapter.lora_B.weight, base["bias"]
        assert all(a is b for a, b in zip(state[:4], planned, strict=True))
        assert state[4:] == (adapter.scaling, dropout_p(adapter.dropout))
        assert adapter.lora_B.bias is None and adapter.diag is None and not adapter.is_alora
        return y

    monkeypatch.setattr(direct, "call", checked)
