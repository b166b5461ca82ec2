"""The schemas of the ops and the call types list the same fields in the same order."""

from __future__ import annotations

from typing import Any

import pytest

from lora_kernels import ops
from lora_kernels.core import call
from lora_kernels.core.packed4bit import Packed4bit

FORWARD = (call.Operands, call.Spec)
BACKWARD = (call.Operands, call.Saved, call.Spec, call.Needs)
MULTI_FORWARD = (call.MultiOperands, call.MultiSpec)
MULTI_BACKWARD = (call.MultiOperands, call.Saved, call.MultiSpec, call.MultiNeeds)
TYPES: dict[str, tuple[tuple[Any, ...], set[str]]] = {  # types, and fields that an op leaves out
    "lora_linear": (FORWARD, set()),
    "lora_linear_backward": (BACKWARD, {"mask"}),
    "multi_lora_linear": (MULTI_FORWARD, set()),
    "multi_lora_linear_backward": (MULTI_BACKWARD, {"z", "mask"}),
}


@pytest.mark.parametrize("suffix", ["", "_4bit"])
@pytest.mark.parametrize("name", TYPES)
def test_schema_arguments_are_the_fields_of_the_call_types(name: str, suffix: str) -> None:
    types, left_out = TYPES[name]
    want = ["dy"] if name.endswith("backward") else []
    for each in types:
        prefix = "need_" if each in (call.Needs, call.MultiNeeds) else ""
        want += [prefix + field for field in each._fields if field not in left_out]
    if suffix:
        at = want.index("weight")
        want[at : at + 1] = Packed4bit._fields
    schema = getattr(ops, name + suffix)._schema
    assert [argument.name for argument in schema.arguments] == want


def test_grads_have_the_fields_of_needs() -> None:
    assert call.Grads._fields == call.Needs._fields
    assert call.MultiGrads._fields == call.MultiNeeds._fields
