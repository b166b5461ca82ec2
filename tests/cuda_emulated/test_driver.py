"""The calls of launches to CUDA's runtime and to Python, without the emulator."""

import importlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_kernels.backends import cuda
from lora_kernels.core import device

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
RUNTIME = """
#pragma once
#include <cstddef>
enum cudaError_t { cudaSuccess, cudaErrorNoDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline int current = 0, set = 0, asked = 0, allowed = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no CUDA-capable device is detected"; }
inline cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  ++set;
  if (device > 1) return cudaErrorNoDevice;
  current = device;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  ++asked;
  allowed = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t bytes) {
  ++asked;
  *blocks = bytes > 100000 ? 1 : 2;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  *status = stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = 7;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  ++asked;
  *value = device == 0 ? 132 : 108;
  return cudaSuccess;
}
"""
ON_DEVICE = """
  for (int device : {0, 1, 2}) {
    set = 0;
    int inside = -1;
    try {
      OnDevice on(device, "gemm");
      inside = current;
    } catch (const std::runtime_error& error) {
      std::printf("%s; ", error.what());
    }
    std::printf("inside %d, after %d, set %d\\n", inside, current, set);
  }
"""
QUERIES = """
  const int one = 0, other = 0;
  for (const void* kernel : {(const void*)&one, (const void*)&other})
    for (int device : {0, 1})
      for (int bytes : {1000, 120000, 60000, 120000, 60000, 1000}) {
        asked = 0;
        const int blocks = resident_blocks(kernel, device, 256, bytes);
        allow_shared(kernel, device, bytes, "decode");
        std::printf("%d bytes: %d, asked %d, allowed %d\\n", bytes, blocks, asked, allowed);
      }
"""


CAPTURES = """
  std::printf("%llu, %llu\\n", capture_of(0), capture_of(64));
"""


def printed_by(body: str, folder: Path) -> list[str]:
    """Compile a program over the fake runtime; the lines that it prints."""
    compiler = device.compiler()
    assert compiler is not None  # which made the emulator
    include = '#include <cstdio>\n#include "on_device.h"\n'
    start = "using namespace lora_kernels::gpu;\nint main() {\n"
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "main.cpp").write_text(f"{include}{start}{body}}}\n")
    command = [compiler, "-std=c++17", f"-I{folder}", f"-I{CSRC}", str(folder / "main.cpp")]
    subprocess.run([*command, "-o", str(folder / "main")], check=True)
    done = subprocess.run([folder / "main"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_on_device_current_already_sets_nothing(tmp_path: Path) -> None:
    """To set a device, to what it was too, makes a context on it."""
    assert printed_by(ON_DEVICE, tmp_path) == [
        "inside 0, after 0, set 0",
        "inside 1, after 0, set 2",
        "gemm: no CUDA-capable device is detected; inside -1, after 0, set 1",
    ]


def test_occupancy_and_attributes_are_asked_once(tmp_path: Path) -> None:
    """For each kernel, device and size; and a limit that was raised is never lowered."""
    first = [
        "1000 bytes: {0}, asked 2, allowed {2}",
        "120000 bytes: {1}, asked 3, allowed 120000",
        "60000 bytes: {0}, asked 2, allowed 120000",
        "120000 bytes: {1}, asked 0, allowed 120000",
        "60000 bytes: {0}, asked 0, allowed 120000",
        "1000 bytes: {0}, asked 0, allowed 120000",
    ]
    devices = [(264, 132), (216, 108)] * 2
    want = [
        line.format(*blocks, 120000 if i else 0)
        for i, blocks in enumerate(devices)
        for line in first
    ]
    assert printed_by(QUERIES, tmp_path) == want


def test_number_of_a_capture_is_0_outside_of_one(tmp_path: Path) -> None:
    assert printed_by(CAPTURES, tmp_path) == ["0, 7"]


@pytest.mark.skipif(cuda._load("_cuda")[0] is None, reason="no CUDA kernels were built")
def test_launch_lets_other_threads_run() -> None:
    """Python switches threads where one lets go alone: a launch of no blocks, which fails."""
    module = importlib.import_module("lora_kernels._cuda")
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
            with pytest.raises(RuntimeError, match="reduce: "):
                module.reduce((0, None, 1.0, 0, 0, 0, 1, 1, 1, 1), (0, 0))
        switched = others != before
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert switched
