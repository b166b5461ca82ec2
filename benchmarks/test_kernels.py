"""Each native kernel by itself: `pytest benchmarks --benchmark-only`.

Warm, on torch's thread count. GB/s is counted from the operands' and results' bytes, each once.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_kernels.backends import native
from lora_kernels.measure import case as cases

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SHAPES = [(256, 2048, 2048, 16), (512, 2048, 5632, 16), (2048, 4096, 4096, 16)]  # M, K, N, R

pytestmark = pytest.mark.skipif(native.module is None, reason="the native kernels were not built")


@pytest.fixture(params=cases.engines()[1:] or ["none"])
def isa(request: pytest.FixtureRequest):
    with cases.engine(request.param):
        yield request.param


def shrink(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    x, a = torch.randn(M, K).to(dtype), torch.randn(R, K).to(dtype)
    p, d = torch.empty(M, R), DTYPES[dtype]
    arguments = (
        x.data_ptr(), d, K, M, K, a.data_ptr(), d, K, R, 1.0, 0, 0, p.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return _call("shrink", arguments, x, a, p)


def expand(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    y, b = torch.zeros(M, N).to(dtype), torch.randn(N, R).to(dtype)
    s, d = torch.randn(M, R), DTYPES[dtype]
    arguments = (
        y.data_ptr(), d, N, M, N, s.data_ptr(), R, b.data_ptr(), d, 1, R, 0.0, 0, 0, 0, 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return _call("expand", arguments, y, y, b, s)  # y is read and written


def backward_pair(
    M: int, K: int, N: int, R: int, dtype: torch.dtype
) -> tuple[Callable[[], None], int]:
    dy, b = torch.randn(M, N).to(dtype), torch.randn(N, R).to(dtype)
    s, ds, db, d = torch.randn(M, R), torch.empty(M, R), torch.empty_like(b), DTYPES[dtype]
    arguments = (
        dy.data_ptr(), d, N, M, N, b.data_ptr(), d, R, 1, R, s.data_ptr(), 0, 0, 1.0, 1.0,
        ds.data_ptr(), db.data_ptr(), d, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return _call("backward_pair", arguments, dy, b, s, ds, db)


def grad_a(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    x, dxa = torch.randn(M, K).to(dtype), torch.randn(M, R)
    da, d = torch.empty(R, K).to(dtype), DTYPES[dtype]
    arguments = (
        x.data_ptr(), d, K, M, K, dxa.data_ptr(), R, 0, 0, da.data_ptr(), d,
        torch.get_num_threads(),
    )  # fmt: skip
    return _call("grad_a", arguments, x, dxa, da)


def _call(
    name: str, arguments: tuple[float, ...], *tensors: Tensor
) -> tuple[Callable[[], None], int]:
    kernel = getattr(native.module, name)

    def call(_keep: tuple[Tensor, ...] = tensors) -> None:  # the kernel sees addresses alone
        kernel(*arguments)

    return call, sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [shrink, expand, backward_pair, grad_a])
def test_kernel(benchmark, isa: str, make, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    call, moved = make(*shape, dtype)
    benchmark(call)
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
