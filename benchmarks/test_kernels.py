"""Each op by itself on each instruction set and strategy: `pytest benchmarks --benchmark-only`.

Warm, on torch's thread count. For peers, floors and checked results: `lora-kernels bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_kernels import dora_norm, lora_linear
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case

SHAPES = [(256, 2048, 2048, 16), (512, 2048, 5632, 16)]  # M, K, N, R
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_quant = pytest.mark.parametrize("quant", ["", "nf4-64-nested"])


@pytest.fixture(params=cases.engines())
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with cases.engine(request.param):
        yield request.param


@every_shape
@every_dtype
@every_quant
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_lora_linear(
    benchmark: Any, engine: str, mode: str, quant: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    M, K, N, R = shape
    args = cases.inputs(Case(M, N, K, R, dtype, quant=quant))
    if mode == "step":
        benchmark(lambda: cases.run(lora_linear, args))
    else:
        args.pop("dy")
        benchmark(lambda: lora_linear(**args))


@every_shape
@every_dtype
@every_quant
def test_dora_norm(
    benchmark: Any, engine: str, quant: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    M, K, N, R = shape
    args = cases.inputs(Case(M, N, K, R, dtype, quant=quant))
    benchmark(lambda: dora_norm(args["weight"], args["lora_A"], args["lora_B"], 2.0))
