"""The emulator of csrc/emulator: streams of launches, and programs with kernels of their own."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_kernels.backends import cuda
from lora_kernels.backends.cuda import launch
from lora_kernels.core import device

_CSRC = Path(__file__).parents[2] / "csrc"


def emulator_unavailable_reason() -> str | None:
    """Return why there is no emulator; None if there is one."""
    return cuda._load("_emulator")[1]


@contextlib.contextmanager
def emulated_stream(number: int) -> Iterator[None]:
    """Run emulated launches inside the context on the stream of that number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_stream", number)
        yield


@contextlib.contextmanager
def deferred_launches() -> Iterator[None]:
    """Defer emulated launches inside the context to its end.

    Launches of one stream run in order, and interleave with those of other streams.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_waiting", [])
        yield
        cuda.module().synchronize()
        launch.traffic.extend(cuda.module().read_traffic())


def build_program(source: str, folder: Path) -> Path:
    """Compile a program, which includes "cuda/ptx.cuh", with the emulator; return where it is."""
    compiler = device.compiler()
    assert compiler is not None  # which made the emulator
    (folder / "main.cpp").write_text(source)
    sources = [str(folder / "main.cpp"), str(_CSRC / "emulator" / "runtime.cpp")]
    flags = ["-std=c++20", "-w", "-DLORA_KERNELS_EMULATED", f"-I{_CSRC}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "main")], check=True)
    return folder / "main"
