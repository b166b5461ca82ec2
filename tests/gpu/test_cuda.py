"""The CUDA kernels on a GPU: results, graphs, streams, and no launch that waits forever."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import COOPERATIVE, STRATEGIES, TWO_PASS
from lora_kernels.oracle.case import Case, fits_cuda, inputs, judge
from tests.support.engines import assert_within, check
from tests.support.problems import UNDROPPED, bf16, f16, f32

pytestmark = pytest.mark.skipif(
    cuda.unsupported_device_reason("cuda", None) is not None, reason="no CUDA kernels for this GPU"
)


@pytest.mark.parametrize("options", [{}, UNDROPPED], ids=["plain", "full"])
@pytest.mark.parametrize("quant", ["", "nf4-64-nested", "fp4-128"])
@pytest.mark.parametrize("dtypes", [(bf16, None), (f16, None), (bf16, f32)], ids=str)
@pytest.mark.parametrize("M", [1, 9, 16, 65, 300])
def test_lora_linear_of_each_case_is_within_tolerance(
    M: int, dtypes: tuple[Any, ...], quant: str, options: dict[str, Any]
) -> None:
    case = Case(M, 1032, 2112, 61, *dtypes, quant=quant, device="cuda", **options)
    for strategy in STRATEGIES:
        if fits_cuda(case, strategy):
            with lora_kernels.backend("cuda", strategy):
                assert_within((strategy, case), judge(case))


def layer(M: int, seed: int = 0) -> Callable[[], Tensor]:
    """A forward without gradients on tensors that stay where they are."""
    case = Case(M, 1024, 2048, 16, bf16, quant="nf4-64-nested", device="cuda", seed=seed)
    args = inputs(case)
    args.pop("dy")

    def call() -> Tensor:
        with torch.no_grad():
            return lora_kernels.lora_linear(**args)

    return call


@pytest.mark.parametrize(
    ("M", "strategy"), [(4, COOPERATIVE), (16, COOPERATIVE), (16, TWO_PASS), (300, TWO_PASS)]
)
def test_graphs_are_captured_and_replayed(M: int, strategy: str) -> None:
    with lora_kernels.backend("cuda", strategy):
        call = layer(M)
        want = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for _ in range(3):
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, want)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams_for_a_while_keep_their_bits(strategy: str) -> None:
    """Seconds of launches on both: neither hangs, and the bits stay."""
    calls = [layer(4), layer(4, seed=1)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with lora_kernels.backend("cuda", strategy):
        wants = [call() for call in calls]
        torch.cuda.synchronize()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            got: list[list[Tensor]] = [[], []]
            for _ in range(50):
                for stream, call, ys in zip(streams, calls, got, strict=True):
                    with torch.cuda.stream(stream):
                        ys.append(call())
            torch.cuda.synchronize()
            for want, ys in zip(wants, got, strict=True):
                assert all(torch.equal(y, want) for y in ys)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_lora_linear_on_another_device_is_within_tolerance() -> None:
    case = Case(4, 1024, 2048, 16, bf16, device="cuda:1")
    with lora_kernels.backend("cuda"):
        check(case)
    assert torch.cuda.current_device() == 0


def test_launch_that_fails_names_its_kernel() -> None:
    with pytest.raises(RuntimeError, match=r"reduce: \w"):
        cuda.module().reduce((0, None, 1.0, 0, 0, 64, 1, 1, 1, 1), (0, 99))
