"""The check of `lora_experts_linear` against its float64 reference."""

from __future__ import annotations

from lora_kernels.bench.experts_case import ExpertsCase as ExpertsCase
from lora_kernels.bench.experts_case import inputs as inputs
from lora_kernels.bench.experts_case import judge
from tests.support.engines import assert_within


def check(case: ExpertsCase) -> None:
    """Judge y and every gradient of the case."""
    assert_within(case, judge(case))
