"""The eager backend on a GPU: results, graphs, dropout, and what it reads beside PEFT."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.oracle import case as cases
from lora_kernels.oracle.case import Case, inputs
from tests.support.engines import check
from tests.support.problems import FULL, bf16, f16, f32


def step(M: int, adapter: torch.dtype, quant: str, dropout_p: float) -> Callable[[], list[Tensor]]:
    """A forward and backward on tensors that stay where they are."""
    args = inputs(Case(M, 512, 1024, 16, bf16, adapter, quant=quant, device="cuda"))
    dy = args.pop("dy")
    args |= {"dropout_p": dropout_p, "rng": None}
    wanted = [args[name] for name in ("x", "lora_A", "lora_B")]

    def call() -> list[Tensor]:
        with lora_kernels.backend("eager"):
            y = lora_kernels.lora_linear(**args)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return call


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("M", [3, 70, 600])
def test_eager_on_a_gpu_is_within_the_tolerance(M: int, dtype: torch.dtype, quant: str) -> None:
    for adapter in {dtype, f32}:
        for options in ({}, FULL):
            case = Case(M, 257, 320, 13, dtype, adapter, quant=quant, device="cuda", **options)
            with cases.engine(cases.EAGER_CUDA):
                check(case)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
@pytest.mark.parametrize("adapter", [bf16, f32], ids=str)
@pytest.mark.parametrize("M", [4, 300])
def test_eager_step_is_captured_and_replayed(M: int, adapter: torch.dtype, quant: str) -> None:
    call = step(M, adapter, quant, 0.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = [t.clone() for t in call()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = call()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, got, want))


def test_eager_dropout_is_peft_s_with_the_same_seed() -> None:
    x, W = torch.randn(64, 128, device="cuda"), torch.zeros(128, 128, device="cuda")
    eye = torch.eye(128, device="cuda")
    torch.manual_seed(3)
    with lora_kernels.backend("eager"):
        y = lora_kernels.lora_linear(x, W, eye, eye.clone(), dropout_p=0.4)
    torch.manual_seed(3)
    want = torch.nn.functional.dropout(x, 0.4)
    assert torch.equal(y != 0, want != 0)


@pytest.mark.parametrize("quant", ["", "nf4-64-nested"])
def test_eager_step_takes_no_float32_copy(quant: str) -> None:
    """At most y, dx and the mask beside the dense weight, of 8192×1024×512."""
    call = step(8192, f32, quant, 0.1)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    x, y = 2 * 8192 * 1024, 2 * 8192 * 512
    # D(x) or dx and its masked copy, the mask, y; the weight; [M, R] parts within a quarter of x.
    assert peak < 2 * x + x // 2 + 2 * y + 4 * 512 * 1024 + x // 4
    del results
