"""Models this small are slower on several threads, much slower on a busy machine."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import decoder
from lora_kernels.backends.library import as_on_gpu
from lora_kernels.choice import choose as selection
from lora_kernels.core.codes import Codes
from lora_kernels.core.forced import Forced
from lora_kernels.core.problem import Choice, Problem
from lora_kernels.core.record import PLAIN, Record, operands_of
from lora_kernels.peft import direct, groups
from lora_kernels.peft.base import readable_weight
from lora_kernels.peft.read import read_call
from lora_kernels.quantization import QuantizedWeight
from tests.support.threads import threads as threads


@pytest.fixture
def gpu_path() -> Iterator[None]:
    """CPU tensors take the eager backend's GPU path; afterwards no layers share an x."""
    before = dict(decoder.bitsandbytes_reasons)
    with as_on_gpu(), lora_kernels.backend("eager"):
        yield
    decoder.bitsandbytes_reasons.clear()
    decoder.bitsandbytes_reasons.update(before)
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


def read_one(layer: Any, x: Tensor) -> Record:
    """The one record by which the layer's call is computed here, with the base's weight."""
    records = read_call(layer, x.device, x.dtype)
    assert not isinstance(records, str), records
    (record,) = records
    assert {*operands_of(record)} <= {"dropout_p", "scaling", "lora_bias", "rank_gate"}
    return record


def assert_is(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert all(a is b for a, b in zip(got, want, strict=True))


@pytest.fixture(autouse=True)
def direct_calls_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct call succeeds only where the general reader has the same plain record.

    It holds for every state of a layer that a test of this folder builds.
    """
    call = direct.call

    def checked(layer: Any, x: Tensor) -> Tensor | None:
        y = call(layer, x)
        if y is None:
            return None
        state, record = direct.read(layer), read_one(layer, x)
        assert state is not None
        assert_is(state[:4], record[:4])
        assert state[4:] == record[4:PLAIN]
        assert {*operands_of(record)} <= {"dropout_p"}
        return y

    monkeypatch.setattr(direct, "call", checked)


@pytest.fixture(autouse=True)
def blocks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has only layers that the general reader reads, with the operands of their records."""
    make_block = direct.make_block

    def checked(layers: Sequence[Any], x: Tensor, activation: str = "") -> Any:
        found = make_block(layers, x, activation)
        if found is not None:
            for layer, operands in zip(layers, found[0].layers, strict=True):
                check_operands(layer, x, operands)
        return found

    monkeypatch.setattr(direct, "make_block", checked)


def check_operands(layer: Any, x: Tensor, operands: Record) -> None:
    record, base = read_one(layer, x), layer.base_layer
    assert not record.dropout_p and not operands.dropout_p
    assert_is(operands[1:3], (record.lora_A, record.lora_B))
    if isinstance(operands.weight, Codes):
        weight, _ = readable_weight(base, x)
        assert isinstance(weight, QuantizedWeight)
        pairs = zip(operands.weight, weight.codes, strict=True)
        assert all(
            a is b or (torch.equal(a, b) if isinstance(a, Tensor) else a == b) for a, b in pairs
        )  # the tables of MXFP4 and NVFP4 have NaN
    else:
        assert operands.weight is base.weight
    gate = torch.as_tensor(1.0 if operands.rank_gate is None else operands.rank_gate)
    want = torch.as_tensor(record.scaling) * (1.0 if record.rank_gate is None else record.rank_gate)
    # The gate is float32 or wider: the factors are rounded to it, and then their product.
    torch.testing.assert_close(
        (gate * operands.scaling).double().expand(operands.lora_A.shape[0]),
        want.double().expand(operands.lora_A.shape[0]),
        rtol=2.0**-22,
        atol=0.0,
    )
    bias = base.bias
    if record.lora_bias is None:
        assert operands.bias is bias
    else:
        update = record.scaling * record.lora_bias
        assert operands.bias is not None
        assert torch.equal(operands.bias, update if bias is None else bias + update)
