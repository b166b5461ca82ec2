"""GPUs that are not here: what `configs` asks of one, and a driver to show Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lora_kernels.backends.triton import launch
from lora_kernels.backends.triton.configs import Config, Target

TARGETS = {
    "sm80": (Target("cuda", 80, 108, 163 << 10), GPUTarget("cuda", 80, 32)),
    "sm90": (Target("cuda", 90, 132, 227 << 10), GPUTarget("cuda", 90, 32)),
    "sm100": (Target("cuda", 100, 148, 227 << 10), GPUTarget("cuda", 100, 32)),
    "sm120": (Target("cuda", 120, 170, 99 << 10), GPUTarget("cuda", 120, 32)),
    "gfx942": (Target("hip", 0, 304, 64 << 10), GPUTarget("hip", "gfx942", 64)),
}


@dataclass(frozen=True)
class Compiled:
    name: str
    config: Config
    kernel: Any


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, name: str) -> None:
        self._device, self._target = list(TARGETS).index(name), TARGETS[name][1]

    def get_current_device(self) -> int:  # kernels are kept for each
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compiled(target: str, call: Callable[[], None]) -> Iterator[Compiled]:
    """What `call` would launch there, compiled through the same functions."""
    found: list[Compiled] = []

    def warm_up(
        kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, *args: Any,
        **meta: Any,
    ) -> None:  # fmt: skip
        assert 0 < max(grid[1:], default=1) < 1 << 16 and 0 < grid[0] < 1 << 31, grid
        done = kernel.warmup(*args, grid=grid, **meta, **launch.options(config))
        found.append(Compiled(kernel.__name__, config, done))

    with pytest.MonkeyPatch.context() as patch:
        driver.set_active(_Driver(target))
        patch.setattr(launch, "target", lambda x: TARGETS[target][0])
        patch.setattr(launch, "run", warm_up)
        call()
    yield from found


VERSION: str = triton.__version__
