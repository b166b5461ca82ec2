"""GPUs that are not here: what `configs` asks of one, and a driver to show Triton."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lora_kernels.backends.triton import launch as launches
from lora_kernels.backends.triton.configs import Tiles
from lora_kernels.core.device import DeviceInfo
from tests.compile_only import machine_code
from tests.compile_only.calls import AnyCall
from tests.compile_only.machine_code import Code

# A100, H100, B200, 5090, MI300X.
TARGETS = {
    "sm80": (DeviceInfo("cuda", 80, 108, 163 << 10), GPUTarget("cuda", 80, 32)),
    "sm90": (DeviceInfo("cuda", 90, 132, 227 << 10), GPUTarget("cuda", 90, 32)),
    "sm100": (DeviceInfo("cuda", 100, 148, 227 << 10), GPUTarget("cuda", 100, 32)),
    "sm120": (DeviceInfo("cuda", 120, 170, 99 << 10), GPUTarget("cuda", 120, 32)),
    "gfx942": (DeviceInfo("hip", 0, 304, 64 << 10), GPUTarget("hip", "gfx942", 64)),
}
# Relatives of those; only the slice is compiled for them: 3090, 4090, B300, Thor, Spark.
RELATIVES = {
    "sm86": (DeviceInfo("cuda", 86, 82, 99 << 10), GPUTarget("cuda", 86, 32)),
    "sm89": (DeviceInfo("cuda", 89, 128, 99 << 10), GPUTarget("cuda", 89, 32)),
    "sm103": (DeviceInfo("cuda", 103, 148, 227 << 10), GPUTarget("cuda", 103, 32)),
    "sm110": (DeviceInfo("cuda", 110, 20, 227 << 10), GPUTarget("cuda", 110, 32)),
    "sm121": (DeviceInfo("cuda", 121, 48, 99 << 10), GPUTarget("cuda", 121, 32)),
}
ALL = TARGETS | RELATIVES


@dataclass(frozen=True)
class Compiled:
    name: str
    config: Tiles
    kernel: Any
    programs: int


@dataclass(frozen=True)
class Found:
    """A kernel that no call before launched: `key` names it, its tiles and the call."""

    key: str
    call: AnyCall
    launch: Compiled
    code: Code


def kernels(target: str, calls: Iterable[AnyCall]) -> Iterator[Found]:
    """Compile the kernels that the calls launch there, each once."""
    known: set[str] = set()
    for call in calls:
        launched: Counter[str] = Counter()
        for launch in compiled(target, call.run):
            tiles = "x".join(map(str, launch.config.blocks.values()))
            launched[launch.name] += 1
            which = f" #{launched[launch.name]}" if launched[launch.name] > 1 else ""
            if launch.kernel.hash not in known:
                known.add(launch.kernel.hash)
                key = f"{launch.name}{which} {tiles} {call}"
                yield Found(key, call, launch, machine_code.read(launch.kernel))


def compiled(target: str, call: Callable[[], None]) -> Iterator[Compiled]:
    """Compile the kernels that `call` would launch there, through the same functions."""
    found: list[Compiled] = []

    def warm_up(
        kernel: Any,
        config: Tiles,
        plan: object = None,
        *,
        grid: tuple[int, ...],
        device: torch.device,
        **arguments: Any,
    ) -> None:
        assert 0 < max(grid[1:], default=1) < 1 << 16 and 0 < grid[0] < 1 << 31, grid
        done = kernel.warmup(grid=grid, **arguments, **launches.options(config))
        found.append(Compiled(kernel.__name__, config, done, math.prod(grid)))

    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(
            get_current_device=lambda: [*ALL].index(target),  # kernels are kept for each
            get_current_stream=lambda device: 0,
            get_current_target=lambda: ALL[target][1],
        )
        driver.set_active(fake)
        patch.setattr(launches, "target", lambda device: ALL[target][0])
        patch.setattr(launches, "run", warm_up)
        call()
    yield from found


VERSION: str = triton.__version__
