"""Programs that run kernels of their own in the emulator of csrc/emulator."""

import subprocess
from pathlib import Path

from lora_kernels.core import device

_CSRC = Path(__file__).parents[2] / "csrc"


def build_program(source: str, folder: Path) -> Path:
    """Compile a program, which includes "cuda/ptx.cuh", with the emulator; return where it is."""
    compiler = device.compiler()
    assert compiler is not None  # which made the emulator
    (folder / "main.cpp").write_text(source)
    sources = [str(folder / "main.cpp"), str(_CSRC / "emulator" / "runtime.cpp")]
    flags = ["-std=c++20", "-w", "-DLORA_KERNELS_EMULATED", f"-I{_CSRC}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "main")], check=True)
    return folder / "main"
