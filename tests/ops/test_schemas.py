"""The schemas of the ops and the call types list the same fields in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels.core import call
from lora_kernels.core.codes import Codes

FORWARD = (call.Operands, call.Spec)
BACKWARD = (call.Operands, call.Spec, call.Needs)
MULTI_FORWARD = (call.MultiOperands, call.MultiSpec)
MULTI_BACKWARD = (call.MultiOperands, call.MultiSpec, call.MultiNeeds)
EXPERTS_FORWARD = (call.ExpertsOperands, call.ExpertsSpec)
EXPERTS_BACKWARD = (call.ExpertsOperands, call.ExpertsSpec, call.ExpertsNeeds)
HEAD = (call.HeadOperands, call.HeadSpec)
NEEDS = (call.Needs, call.MultiNeeds, call.ExpertsNeeds, call.HeadNeeds)
ROWS = ["dlog_probs", "dentropy", "largest_logit", "sum_exp", "entropy"]
# The arguments before the types' fields, and the types.
TYPES: dict[str, tuple[list[str], tuple[Any, ...]]] = {
    "lora_linear": ([], FORWARD),
    "lora_linear_backward": (["dy", "p", "z"], BACKWARD),
    "multi_lora_linear": ([], MULTI_FORWARD),
    "multi_lora_linear_backward": (["dy", "p"], MULTI_BACKWARD),
    "lora_experts": ([], EXPERTS_FORWARD),
    "lora_experts_backward": (["dy", "p"], EXPERTS_BACKWARD),
    "lora_cross_entropy": ([], (*HEAD, call.HeadNeeds)),
    "lora_log_probs": ([], (*HEAD, call.HeadOutputs)),
    "lora_log_probs_backward": (ROWS, (*HEAD, call.HeadNeeds)),
}
GRADS = {
    "lora_linear_backward": call.Grads,
    "multi_lora_linear_backward": call.MultiGrads,
    "lora_experts_backward": call.ExpertsGrads,
    "lora_cross_entropy": call.HeadGrads,
    "lora_log_probs_backward": call.HeadGrads,
}


def schema_of(name: str) -> Any:
    return getattr(torch.ops.lora_kernels, name).default._schema


@pytest.mark.parametrize("suffix", ["", "_quantized"])
@pytest.mark.parametrize("name", TYPES)
def test_schema_arguments_are_the_fields_of_the_call_types(name: str, suffix: str) -> None:
    first, types = TYPES[name]
    want = [*first]
    for call_type in types:
        prefix = "need_" if call_type in NEEDS else ""
        want += [prefix + field for field in call_type._fields]
    if suffix:
        at = want.index("weight")
        want[at : at + 1] = Codes._fields
    if call.HeadSpec not in types or name.endswith("_backward"):
        want.append("choice")
    assert [argument.name for argument in schema_of(name + suffix).arguments] == want


@pytest.mark.parametrize("suffix", ["", "_quantized"])
@pytest.mark.parametrize("name", GRADS)
def test_schema_results_are_the_fields_of_the_gradients(name: str, suffix: str) -> None:
    want = ["loss"] if name == "lora_cross_entropy" else []
    want += [f"grad_{field}" for field in GRADS[name]._fields]
    assert [result.name for result in schema_of(name + suffix).returns] == want


@pytest.mark.parametrize("suffix", ["", "_quantized"])
def test_schema_results_of_log_probs_are_the_statistics(suffix: str) -> None:
    results = schema_of("lora_log_probs" + suffix).returns
    assert [result.name for result in results] == list(call.HeadRows._fields)


def test_grads_have_the_fields_of_needs() -> None:
    assert call.Grads._fields == call.Needs._fields
    assert call.MultiGrads._fields == call.MultiNeeds._fields
    assert call.ExpertsGrads._fields == call.ExpertsNeeds._fields
    assert call.HeadGrads._fields == call.HeadNeeds._fields
