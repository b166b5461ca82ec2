"""GPUs by their data sheets, and tensors that say that they are on one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_kernels.bench.qualify import SHEETS
from lora_kernels.core.device import DeviceInfo


def from_sheet(
    name: str, capability: int, count: int, shared_kib: int, *rates: float
) -> DeviceInfo:
    """rates: clock, bandwidth, FLOP/s of tensor and of CUDA cores."""
    return DeviceInfo("cuda", capability, count, shared_kib << 10, name, 0, *rates)


A100, RTX4090, H100, B200 = SHEETS.values()
RTX3090 = from_sheet("RTX 3090", 86, 82, 99, 1.695e9, 0.936e12, 71e12, 35.6e12)
RTX5090 = from_sheet("RTX 5090", 120, 170, 99, 2.41e9, 1.79e12, 210e12, 105e12)
SERVED = [A100, RTX4090, H100, B200, RTX5090]


class OnCuda:
    """A CPU tensor that says that it is on a GPU, for the look at verdicts."""

    is_cuda = True

    def __init__(self, t: Tensor) -> None:
        self._t = t

    def __getattr__(self, name: str) -> Any:
        return getattr(self._t, name)
