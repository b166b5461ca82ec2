"""A machine with one GPU that is not there, and a cache folder of its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import qualification
from lora_kernels.backends.eager import orders
from lora_kernels.choice import choose as selection
from lora_kernels.choice import verdicts
from lora_kernels.core import device
from lora_kernels.core.device import DeviceInfo
from lora_kernels.qualification import compiling
from tests.support import fake_card, gpus

H100 = replace(gpus.H100, name="Fake H100")


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DeviceInfo]:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "gpu", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(verdicts, "key", lambda index: dict(fake_card.KEY))
    monkeypatch.setattr(qualification, "_visible_device", lambda index: {})
    monkeypatch.setattr(compiling, "compile_ahead", lambda claims, gpu: None)
    monkeypatch.setattr("lora_kernels.backends.cuda.unsupported_device_reason", lambda *at: None)
    monkeypatch.setattr(verdicts, "_current", {})
    monkeypatch.setattr(verdicts, "_is_off", False)
    monkeypatch.setattr(orders, "winners", {})
    selection._choose_by_verdict.cache_clear()
    yield H100
    selection._choose_by_verdict.cache_clear()
