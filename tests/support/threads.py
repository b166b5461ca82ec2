"""A fixture for conftest.py, or for a module, that imports it; threads that come late."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lora_kernels
from lora_kernels.backends.cpu import native
from lora_kernels.quantization import QuantizedWeight


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread unless a test is parametrized with more: small shapes are faster on one, and two
    that wait for each other crawl on a machine that is busy otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def check_late_threads(
    weight: Tensor | QuantizedWeight, M: int, strategy: str, threads: int, dropout_p: float
) -> None:
    """With more threads than cores some come late, and others take from their shares of several
    blocks. The bits of one thread, and never what was left in memory by the call before."""
    N, K = weight.shape
    x, A, B = torch.randn(M, K), torch.randn(5, K), torch.randn(N, 5)
    rng = torch.tensor([3, 4]) if dropout_p else None
    torch.set_num_threads(1)
    with lora_kernels.backend("cpu", strategy):
        want = lora_kernels.lora_linear(x, weight, A, B, dropout_p=dropout_p, rng=rng)
        torch.set_num_threads(threads)
        for turn in range(20):
            sign = (-1) ** turn
            y = lora_kernels.lora_linear(x * sign, weight, A, B, dropout_p=dropout_p, rng=rng)
            assert torch.equal(y, want * sign)


_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_GET_INT = ctypes.CFUNCTYPE(ctypes.c_int)
_THREAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@contextlib.contextmanager
def asked_threads() -> Iterator[list[int]]:
    """List how many threads each kernel asks OpenMP for, if more than one; they get one."""
    module, openmp = native.module, native._openmp()
    assert module is not None and openmp is not None
    asked: list[int] = []

    def run(function: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        _THREAD(function)(data)

    functions = _PARALLEL(run), _GET_INT(lambda: 0), _GET_INT(lambda: 1)
    module.use_openmp(*(ctypes.cast(f, ctypes.c_void_p).value for f in functions))
    try:
        yield asked
    finally:
        module.use_openmp(*openmp)


class LateThread:
    """In place of OpenMP, two threads that share one core: the second one starts when the first one
    has run for `seconds`, and then runs alone, whatever the first one is amid."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started_in_time = False  # in the last call: before the first one had ended
        self._numbers: dict[int, int] = {}
        self._functions = (
            _PARALLEL(self._parallel),
            _GET_INT(lambda: self._numbers[threading.get_ident()]),
            _GET_INT(lambda: 2),
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Run the native kernels' threads so inside the context."""
        module, openmp = native.module, native._openmp()
        assert module is not None and openmp is not None
        module.use_openmp(*(ctypes.cast(f, ctypes.c_void_p).value for f in self._functions))
        try:
            yield
        finally:
            module.use_openmp(*openmp)

    def _parallel(self, function: int, data: int, threads: int, flags: int) -> None:
        assert threads == 2
        core, begun, ended = min(os.sched_getaffinity(0)), threading.Event(), threading.Event()
        first_ran = time.thread_time  # replaced by the first one's

        def first() -> None:
            nonlocal first_ran
            # Any other thread takes the core from this one, between any two instructions.
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
            clock, start = time.pthread_getcpuclockid(threading.get_ident()), time.thread_time()
            first_ran = lambda: time.clock_gettime(clock) - start  # noqa: E731
            begun.set()
            run(0)
            ended.set()

        def second() -> None:
            begun.wait()
            with contextlib.suppress(OSError):  # the clock of a thread that has ended
                while not ended.is_set() and first_ran() < self.seconds:
                    time.sleep(2e-5)
            self.started_in_time = not ended.is_set()
            run(1)

        def run(number: int) -> None:
            self._numbers[threading.get_ident()] = number
            _THREAD(function)(data)

        def on_core(body: Callable[[], None]) -> None:
            os.sched_setaffinity(threading.get_native_id(), {core})
            body()

        both = [threading.Thread(target=on_core, args=(body,)) for body in (second, first)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()


def check_interrupted_thread(
    weight: Tensor | QuantizedWeight, strategy: str, dropout_p: float
) -> None:
    """A thread that is amid another one's rows of the weight is interrupted, and that one ends.
    The bits of one thread, and never what was left in memory by the call before."""
    N, K = weight.shape
    x, A, B = torch.randn(1, K), torch.randn(5, K), torch.randn(N, 5)
    rng = torch.tensor([3, 4]) if dropout_p else None

    def call(sign: int) -> Tensor:
        return lora_kernels.lora_linear(x * sign, weight, A, B, dropout_p=dropout_p, rng=rng)

    def seconds() -> float:
        start = time.thread_time()
        call(1)
        return time.thread_time() - start

    torch.set_num_threads(1)
    late, in_time = LateThread(), 0
    with lora_kernels.backend("cpu", strategy):
        want, alone = call(1), min(seconds() for _ in range(3))
        torch.set_num_threads(2)
        with late.installed():
            for turn in range(200):
                # The first one computes its own half, and then the second one's.
                late.seconds, sign = alone * (0.55 + 0.04 * (turn % 10)), (-1) ** turn
                assert torch.equal(call(sign), want * sign)
                in_time += late.started_in_time
                if in_time == 8:
                    return
    pytest.fail(f"of 200 calls {in_time} were interrupted")
