"""A GPU's properties, read from torch and from its data sheet."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.core import device
from lora_kernels.core.device import DeviceInfo
from tests.support.gpus import RTX3090, SERVED


def test_names_decide_between_full_and_half_rate() -> None:
    """TFLOP/s of the data sheets: bfloat16, dense, summed in float32."""
    for capability, name, count, clock, want in (
        (86, "NVIDIA GeForce RTX 3090", 82, 1.695e9, 71e12),
        (86, "NVIDIA A10", 72, 1.695e9, 125e12),
        (86, "NVIDIA RTX A6000", 84, 1.8e9, 154.8e12),
        (89, "NVIDIA GeForce RTX 4090", 128, 2.52e9, 165.2e12),
        (89, "NVIDIA L40S", 142, 2.52e9, 362e12),
        (89, "NVIDIA L4", 58, 2.04e9, 121e12),
        (120, "NVIDIA GeForce RTX 5090", 170, 2.407e9, 209.5e12),
        (90, "NVIDIA H100 80GB HBM3", 132, 1.83e9, 989e12),
    ):
        tensor, _ = device._operations(capability, name)
        assert tensor * count * clock == pytest.approx(want, rel=0.02), name


def properties(**others: Any) -> SimpleNamespace:
    """Properties of a GPU as torch gives them: rates in kHz, the bus in bits."""
    sizes: dict[str, Any] = {"multi_processor_count": 108, "total_memory": 80 << 30, "name": "A100"}
    sizes |= {"shared_memory_per_block_optin": 163 << 10, "memory_bus_width": 5120}
    sizes |= {"major": 8, "minor": 0, "clock_rate": 1_410_000, "memory_clock_rate": 1_593_000}
    return SimpleNamespace(**sizes | others)


@pytest.mark.parametrize(
    ("given", "hip", "want"),
    [
        (
            properties(),
            None,
            DeviceInfo(
                *("cuda", 80, 108, 163 << 10, "A100", 80 << 30, 1.41e9),
                *(2 * 1.593e9 * 640, 2048 * 1.41e9 * 108, 128 * 1.41e9 * 108),
            ),
        ),
        (properties(), "6.4", DeviceInfo("hip", 0, 108, 64 << 10, "A100", 80 << 30)),
        (
            properties(memory_bus_width=0),
            None,
            DeviceInfo(
                *("cuda", 80, 108, 163 << 10, "A100", 80 << 30, 1.41e9),
                *(0.0, 2048 * 1.41e9 * 108, 128 * 1.41e9 * 108),
            ),
        ),
    ],
    ids=["cuda", "hip", "no_bus"],
)
def test_gpu_is_what_torch_says_in_si_units(
    given: SimpleNamespace, hip: str | None, want: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: given)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    device._gpu.cache_clear()
    try:
        assert device.gpu(1) == device.gpu(None) == want
        assert device._gpu.cache_info().currsize == 2  # of GPU 1 and of the current one, 5
    finally:
        device._gpu.cache_clear()


@pytest.mark.parametrize("gpu", [RTX3090, *SERVED], ids=lambda gpu: gpu.name)
def test_gpu_reaches_the_rates_of_its_data_sheet(
    gpu: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the 2 % by which data sheets round, or state another clock."""
    major, minor = divmod(gpu.capability, 10)
    given = properties(
        major=major,
        minor=minor,
        clock_rate=gpu.clock / 1e3,
        multi_processor_count=gpu.multiprocessors,
        name=f"NVIDIA GeForce {gpu.name}" if gpu.name.startswith("RTX") else gpu.name,
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: given)
    device._gpu.cache_clear()
    try:
        found = device.gpu(0)
    finally:
        device._gpu.cache_clear()
    assert found.tensor_flops == pytest.approx(gpu.tensor_flops, rel=0.02)
    assert found.fp32_flops == pytest.approx(gpu.fp32_flops, rel=0.02)


def test_driver_version_is_all_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC 12.2.0"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert device.driver_version.__wrapped__() == "535.129.03"
