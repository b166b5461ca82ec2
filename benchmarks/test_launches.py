"""The host's time from a backend's function to its last launch, on drivers that launch nothing:

    pytest benchmarks/test_launches.py --benchmark-columns=min,median,iqr --benchmark-sort=name

"planned" times a call whose plan is cached. "planning" makes a new plan in each call. No GPU is
needed. Reading the device and stream is not in it, nor Triton's launcher in C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_kernels.backends import cuda, launches, triton
from lora_kernels.core.call import Needs, Operands, Spec
from lora_kernels.quantization import quantize_4bit
from tests.support.fake_driver import fake_cuda, fake_triton

BACKENDS = {}
if triton.unavailable_reason() is None:
    BACKENDS["triton", triton.FUSED] = triton, fake_triton
BACKENDS |= {
    ("cuda", strategy): (cuda, fake_cuda) for strategy in (cuda.COOPERATIVE, cuda.TWO_PASS)
}


@pytest.fixture(params=BACKENDS, ids=" ".join)
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[Any, str]]:
    module, driver = BACKENDS[request.param]
    with driver():
        yield module, request.param[1]


@pytest.mark.parametrize("quant", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["planned", "planning"])
def test_launch(
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: tuple[Any, str],
    mode: str,
    direction: str,
    quant: bool,
) -> None:
    module, strategy = backend
    M, N, K, R = (8 if strategy == cuda.COOPERATIVE else 512), 1024, 1024, 16
    x, W, A, B, dy = (
        torch.randn(shape, dtype=torch.bfloat16)
        for shape in ((M, K), (N, K), (R, K), (N, R), (M, N))
    )
    operands = Operands(x, quantize_4bit(W).codes if quant else W, A, B)
    spec, needs = Spec(2.0, 0.0, x.dtype, x.dtype), Needs(True, True, True)
    if mode == "planning":
        monkeypatch.setattr(launches, "MAX_PLANS", 0)
        monkeypatch.setattr(launches, "_caches", [])
    _, saved = module.lora_linear(operands, spec, strategy)
    if direction == "forward":
        call: Any = lambda: module.lora_linear(operands, spec, strategy)  # noqa: E731
    else:
        args = dy, operands, saved, spec, needs, strategy
        call = lambda: module.lora_linear_backward(*args)  # noqa: E731
    for _ in range(3):
        call()
    benchmark(call)
