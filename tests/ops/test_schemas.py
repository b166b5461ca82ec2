"""The schemas of the ops and the call types list the same fields in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels.core import call
from lora_kernels.core.packed4bit import Packed4bit

FORWARD = (call.Operands, call.Spec)
BACKWARD = (call.Operands, call.Saved, call.Spec, call.Needs)
MULTI_FORWARD = (call.MultiOperands, call.MultiSpec)
MULTI_BACKWARD = (call.MultiOperands, call.Saved, call.MultiSpec, call.MultiNeeds)
EXPERTS_FORWARD = (call.ExpertsOperands, call.ExpertsSpec)
EXPERTS_BACKWARD = (call.ExpertsOperands, call.Saved, call.ExpertsSpec, call.ExpertsNeeds)
HEAD = (call.HeadOperands, call.HeadSpec)
NEEDS = (call.Needs, call.MultiNeeds, call.ExpertsNeeds, call.HeadNeeds)
ROWS = ["dlog_probs", "dentropy", "largest_logit", "sum_exp", "entropy"]
# The arguments before the types' fields, the types, and fields of `Saved` that an op leaves out.
TYPES: dict[str, tuple[list[str], tuple[Any, ...], set[str]]] = {
    "lora_linear": ([], FORWARD, set()),
    "lora_linear_backward": (["dy"], BACKWARD, {"mask"}),
    "multi_lora_linear": ([], MULTI_FORWARD, set()),
    "multi_lora_linear_backward": (["dy"], MULTI_BACKWARD, {"z", "mask"}),
    "lora_experts": ([], EXPERTS_FORWARD, set()),
    "lora_experts_backward": (["dy"], EXPERTS_BACKWARD, {"z", "mask"}),
    "lora_cross_entropy": ([], (*HEAD, call.HeadNeeds), set()),
    "lora_log_probs": ([], (*HEAD, call.HeadOutputs), set()),
    "lora_log_probs_backward": (ROWS, (*HEAD, call.HeadNeeds), set()),
}


@pytest.mark.parametrize("suffix", ["", "_4bit"])
@pytest.mark.parametrize("name", TYPES)
def test_schema_arguments_are_the_fields_of_the_call_types(name: str, suffix: str) -> None:
    first, types, left_out = TYPES[name]
    want = [*first]
    for each in types:
        prefix = "need_" if each in NEEDS else ""
        skipped = left_out if each is call.Saved else set()
        want += [prefix + field for field in each._fields if field not in skipped]
    if suffix:
        at = want.index("weight")
        want[at : at + 1] = Packed4bit._fields
    if call.HeadSpec not in types or name.endswith("_backward"):
        want.append("choice")
    schema = getattr(torch.ops.lora_kernels, name + suffix).default._schema
    assert [argument.name for argument in schema.arguments] == want


def test_grads_have_the_fields_of_needs() -> None:
    assert call.Grads._fields == call.Needs._fields
    assert call.MultiGrads._fields == call.MultiNeeds._fields
    assert call.ExpertsGrads._fields == call.ExpertsNeeds._fields
    assert call.HeadGrads._fields == call.HeadNeeds._fields
