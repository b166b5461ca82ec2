"""Models this small are slower on several threads, much slower on a busy machine."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.backends import decode4bit
from lora_kernels.backends.eager.blocks import Layer
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.choice import choose as selection
from lora_kernels.core.forced import Forced
from lora_kernels.core.packed4bit import Packed4bit
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.peft import direct, groups
from lora_kernels.peft.adapters import Adapter, dropout_p
from lora_kernels.peft.base import readable_weight
from lora_kernels.peft.plan import plan_linear
from lora_kernels.quantization import Weight4bit
from tests.support.threads import threads as threads


@pytest.fixture
def gpu_path() -> Iterator[None]:
    """CPU tensors take the eager backend's GPU path; afterwards no layers share an x."""
    before = dict(decode4bit.bitsandbytes_reasons)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield
    decode4bit.bitsandbytes_reasons.clear()
    decode4bit.bitsandbytes_reasons.update(before)
    assert groups._local.results is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems for which `selection` was asked."""
    choose, asked = selection.choose, []

    def recorder(problem: Problem, requested: Forced | None = None) -> Choice:
        asked.append(problem)
        return choose(problem, requested)

    monkeypatch.setattr(selection, "choose", recorder)
    return asked


def assert_planned(layer: Any, x: Tensor) -> Adapter:
    """The plan says that the layer is fused, with one adapter of plain LoRA, which is returned."""
    adapters, reason, base_reason, is_dora = plan_linear(layer, x.device, x.dtype)
    assert (reason, base_reason, is_dora) == (None, None, False)
    (adapter,) = adapters
    assert not adapter.is_alora
    return adapter


def assert_is(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert all(a is b for a, b in zip(got, want, strict=True))


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
        adapter, base = assert_planned(layer, x), layer.base_layer._parameters
        planned = base["weight"], adapter.lora_A.weight, adapter.lora_B.weight, base["bias"]
        assert_is(state[:4], planned)
        assert state[4:] == (adapter.scaling, dropout_p(adapter.dropout))
        assert adapter.lora_B.bias is None and adapter.diag is None
        return y

    monkeypatch.setattr(direct, "call", checked)


@pytest.fixture(autouse=True)
def blocks_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has only layers that the plan says are fused, with the plan's operands."""
    make_block = direct.make_block

    def checked(layers: Sequence[Any], x: Tensor, activation: str = "") -> Any:
        found = make_block(layers, x, activation)
        if found is not None:
            for layer, operands in zip(layers, found[0].layers, strict=True):
                check_operands(layer, x, operands)
        return found

    monkeypatch.setattr(direct, "make_block", checked)


def check_operands(layer: Any, x: Tensor, operands: Layer) -> None:
    adapter, base = assert_planned(layer, x), layer.base_layer
    assert not dropout_p(adapter.dropout)
    assert_is(operands[1:3], (adapter.lora_A.weight, adapter.lora_B.weight))
    assert not isinstance(base, Conv1D)
    if isinstance(operands.weight, Packed4bit):
        weight, _ = readable_weight(base, x)
        assert isinstance(weight, Weight4bit)
        pairs = zip(operands.weight, weight.codes, strict=True)
        assert all(
            a is b or (torch.equal(a, b) if isinstance(a, Tensor) else a == b) for a, b in pairs
        )  # the tables of MXFP4 and NVFP4 have NaN
    else:
        assert operands.weight is base.weight
    gate = torch.as_tensor(1.0 if operands.rank_gate is None else operands.rank_gate)
    want = torch.as_tensor(adapter.scaling) * (1.0 if adapter.diag is None else adapter.diag)
    # The gate is float32 or wider: the factors are rounded to it, and then their product.
    torch.testing.assert_close(
        (gate * operands.scaling).double().expand(operands.lora_A.shape[0]),
        want.double().expand(operands.lora_A.shape[0]),
        rtol=2.0**-22,
        atol=0.0,
    )
    bias, lora_bias = base.bias, adapter.lora_B.bias
    if lora_bias is None:
        assert operands.bias is bias
    else:
        update = adapter.scaling * lora_bias
        assert operands.bias is not None
        assert torch.equal(operands.bias, update if bias is None else bias + update)
