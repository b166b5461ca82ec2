"""A card for `lora_kernels.qualify` that is not there: Triton's interpreter and CUDA's emulator."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.backends import cuda
from lora_kernels.choice import choose as selection
from lora_kernels.choice.verdicts import Group, Seconds
from lora_kernels.core.problem import Problem
from lora_kernels.qualification import Claim
from tests.support.emulator import deferred_launches, emulated_stream

NAME = "tests.support.fake_card:FakeCard"
KEY = {"name": "Fake H100", "driver": "1.2"}
# In the environment: a key, and for a claim ("cuda cooperative … dense/memory") what befalls it.
KEY_VARIABLE, FAULTS = "FAKE_CARD_KEY", "FAKE_CARD_FAULTS"
EAGER_SECONDS, SECONDS = Seconds(1e-3, 0.25e-3, False), Seconds(0.5e-3, 0.125e-3)


class FakeCard:
    device = "cpu"
    many = (40, 264, 64)
    whole = (208, 192)
    repeats = 10
    cold_bytes = 1
    broken = False

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        self.repeats = 2  # in a worker, where the interpreter takes a second for a call
        self.right = cuda.lora_linear
        self.faults = dict(
            fault.split("=") for fault in os.environ.get(FAULTS, "").split(";") if fault
        )
        self._befall(self.faults.get("start"))

    def key(self) -> dict[str, str]:
        return KEY | {"driver": os.environ.get(KEY_VARIABLE, KEY["driver"])}

    @contextlib.contextmanager
    def engine(self, group: Group) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if group.backend == "cuda":
                stack.enter_context(cuda.emulate())
            stack.enter_context(selection.backend(group.backend, group.strategy))
            yield

    def before(self, claim: Claim) -> None:
        cuda.lora_linear = self.right  # type: ignore[attr-defined]
        self._befall(self.faults.get(f"{claim.group}/{claim.name}"))

    def _befall(self, fault: str | None) -> None:
        if fault == "hang":
            time.sleep(1000)
        elif fault == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "exit":
            os._exit(0)
        elif fault == "refuse":
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        elif fault == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif fault == "broken":
            self.broken = True
        elif fault == "wrong":
            cuda.lora_linear = self._wrong  # type: ignore[attr-defined]

    def _wrong(self, *args: Any) -> Any:
        y, saved = self.right(*args)
        return y * 1.02, saved

    def free_memory(self) -> None:
        pass

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def concurrently(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        found = []
        with deferred_launches():
            for number, call in enumerate(calls):
                with emulated_stream(number):
                    found.append(call())
        return found

    def replays(self, call: Callable[[], Tensor], count: int) -> Iterator[Tensor]:
        for _ in range(count):
            yield call()

    def clocks(self, name: str, call: Callable[[int], Any], count: int) -> Any:
        call(0)
        seconds = EAGER_SECONDS if name == "eager" else SECONDS
        device, host = (lambda s=s: count * s for s in seconds[:2])
        return SimpleNamespace(device=device, host=host, is_captured=seconds.is_captured)


def problem(group: Group, rows: int, columns: int, inner: int, rank: int = 16) -> Problem:
    """A call of the group: M, N, K and R."""
    dtype, adapter = getattr(torch, group.dtype), getattr(torch, group.adapter)
    dtypes = dtype, adapter, adapter, dtype
    return Problem("cuda", *dtypes, rank, rows, group.weight == "4bit", columns, inner)
