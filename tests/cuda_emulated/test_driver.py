"""The calls of launches to CUDA's runtime and to Python, without the emulator."""

import importlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_kernels import device
from lora_kernels.backends import cuda

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
RUNTIME = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorNoDevice };
inline int current = 0, set = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA-capable device is detected"; }
inline cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  ++set;
  if (device > 1) return cudaErrorNoDevice;
  current = device;
  return cudaSuccess;
}
"""
PROGRAM = """
#include <cstdio>

#include "on_device.h"

int main() {
  for (int device : {0, 1, 2}) {
    set = 0;
    int inside = -1;
    try {
      lora_kernels::gpu::OnDevice on(device, "gemm");
      inside = current;
    } catch (const std::runtime_error& error) {
      std::printf("%s; ", error.what());
    }
    std::printf("inside %d, after %d, set %d\\n", inside, current, set);
  }
}
"""


def test_on_device_current_already_sets_nothing(tmp_path: Path) -> None:
    """To set a device, to what it was too, makes a context on it."""
    compiler = device.compiler()
    assert compiler is not None  # which made the emulator
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", f"-I{tmp_path}", f"-I{CSRC}", str(tmp_path / "main.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "inside 0, after 0, set 0",
        "inside 1, after 0, set 2",
        "gemm: no CUDA-capable device is detected; inside -1, after 0, set 1",
    ]


@pytest.mark.skipif(cuda._load("_cuda")[0] is None, reason="nvcc is not installed")
def test_launch_lets_other_threads_run() -> None:
    """Python switches threads where one lets go alone: a launch of no blocks, which fails."""
    module = importlib.import_module("lora_kernels._cuda")
    no_codes = (0, 0, 0, 0, 0, 0, 6, 0, 0, 0, False)
    others, done, interval = 0, False, sys.getswitchinterval()

    def use_other_device() -> None:
        nonlocal others
        while not done:
            others += 1
            time.sleep(0)

    thread = threading.Thread(target=use_other_device)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        before, end = others, time.monotonic() + 10
        while others == before and time.monotonic() < end:
            with pytest.raises(RuntimeError, match="dequantize: "):
                module.dequantize((no_codes, 0, 0), (0, 0))
        switched = others != before
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert switched
