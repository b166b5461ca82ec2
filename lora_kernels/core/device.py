"""Properties of this machine: processor, GPUs, installed versions and compilers.

Importing this module asks for nothing; `gpus` and `gpu` initialise CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cpu:
    """The processor as this process sees it."""

    name: str
    architecture: str
    cores: int  # that this process may run on
    threads: int  # that torch uses
    openmp: str | None  # file of the OpenMP runtime that torch has loaded, where that is known


@dataclass(frozen=True)
class DeviceInfo:
    """The properties of a GPU that a strategy, its tiles or its cost depend on.

    Args:
        kind: "cuda" or "hip".
        capability: the compute capability, 90 for 9.0; 0 for AMD's.
        multiprocessors: the number of streaming multiprocessors, or of compute units.
        shared_memory: bytes that one block may have.
        name: the product's.
        memory: bytes.
        clock: Hz.
        bandwidth: bytes a second.
        tensor_flops: operations a second of dense 16-bit GEMMs summed in float32 on tensor cores.
        fp32_flops: operations a second of float32 on CUDA cores.

    The last four are those of the data sheet, and 0 if they are not known.
    """

    kind: str
    capability: int
    multiprocessors: int
    shared_memory: int
    name: str = ""
    memory: int = 0
    clock: float = 0.0
    bandwidth: float = 0.0
    tensor_flops: float = 0.0
    fp32_flops: float = 0.0


# Operations per clock and multiprocessor: dense 16-bit GEMMs summed in float32 on tensor cores, and
# float32 on CUDA cores (NVIDIA's architecture white papers).
_OPERATIONS = {
    80: (2048, 128),
    86: (1024, 256),
    89: (1024, 256),
    90: (4096, 256),
    100: (8192, 256),
    103: (8192, 256),
    120: (1024, 256),
}
_HALVED = (86, 89, 120)  # GeForce cards sum in float32 at half the rate


def cpu() -> Cpu:
    """The processor, its cores and torch's threads.

    >>> from lora_kernels.core import device
    >>> device.cpu().cores >= 1
    True
    """
    # Python 3.13 has os.process_cpu_count; sched_getaffinity is on Linux alone.
    affinity = getattr(os, "sched_getaffinity", None)
    return Cpu(
        name=_cpu_name(),
        architecture=platform.machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        openmp=_openmp_runtime(),
    )


CGROUP = Path("/sys/fs/cgroup")


def processors() -> int:
    """Return how many processors this process may use at once.

    That is its affinity, or less where its cgroup has a quota, as containers have.

    >>> from lora_kernels.core import device
    >>> 1 <= device.processors() <= device.cpu().cores
    True
    """
    count, root = cpu().cores, CGROUP
    with contextlib.suppress(OSError, ValueError):
        if (root / "cgroup.controllers").exists():
            group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
            own = root / group.lstrip("/")
            folders = [own, *own.parents]
            limits = [f / "cpu.max" for f in folders if f.is_relative_to(root)]
            pairs = [file.read_text().split() for file in limits if file.exists()]
        else:
            names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
            pairs = [[(root / "cpu" / name).read_text().strip() for name in names]]
        quotas = [int(quota) / int(period) for quota, period in pairs if quota not in ("max", "-1")]
        return max(1, min(count, *(int(quota) for quota in quotas))) if quotas else count
    return count


def clocks_mhz() -> list[float] | None:
    """Return each core's clock now, as /proc/cpuinfo says; None if it is unknown.

    A virtual machine says its nominal clock.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")] or None


def gpus() -> list[DeviceInfo]:
    """Return the GPUs that torch can use, in torch's order; initialises CUDA if there are any."""
    return [gpu(index) for index in range(torch.cuda.device_count())] if has_gpu() else []


@functools.cache
def has_gpu() -> bool:
    """Return True if torch can use a GPU."""
    return torch.cuda.is_available()


def gpu(index: int | None) -> DeviceInfo:
    """Return the properties of a GPU of this machine; None stands for the current one."""
    return _gpu(torch.cuda.current_device() if index is None else index)


@functools.cache
def _gpu(index: int) -> DeviceInfo:
    p = torch.cuda.get_device_properties(index)
    count, name, memory = p.multi_processor_count, p.name, p.total_memory
    if torch.version.hip:
        return DeviceInfo("hip", 0, count, 64 << 10, name, memory)
    capability = 10 * p.major + p.minor
    bus, memory_clock = getattr(p, "memory_bus_width", 0), getattr(p, "memory_clock_rate", 0)
    clock = getattr(p, "clock_rate", 0) * 1e3
    tensor, fp32 = (rate * clock * count for rate in _operations(capability, name))
    bandwidth = 2 * memory_clock * 1e3 * bus / 8
    shared_memory = p.shared_memory_per_block_optin
    return DeviceInfo(
        "cuda", capability, count, shared_memory, name, memory, clock, bandwidth, tensor, fp32
    )


def _operations(capability: int, name: str) -> tuple[int, int]:
    """Return the operations per clock and multiprocessor of tensor and CUDA cores; 0 if unknown.

    >>> _operations(89, "NVIDIA GeForce RTX 4090"), _operations(89, "NVIDIA L40S")
    ((512, 256), (1024, 256))
    """
    tensor, fp32 = _OPERATIONS.get(capability, (0, 0))
    halved = capability in _HALVED and "GeForce" in name
    return tensor // 2 if halved else tensor, fp32


def version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None if there is none.

    >>> from lora_kernels.core import device
    >>> device.version("no-such-distribution") is None
    True
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def origin(extra: str = "") -> str:
    """Return the arguments of `pip install` that install this package from where it came (PEP 610).

    The package is on no index, where its name might be another's: without a record this is the
    checkout that holds it, or "." for the reader's.

    extra: of pyproject.toml's optional dependencies.
    """
    try:
        text = importlib.metadata.distribution("lora-kernels").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    extras = f"[{extra}]" if extra else ""
    if text is None:
        root = Path(__file__).parents[2]
        return shlex.quote(f"{root if (root / 'pyproject.toml').is_file() else '.'}{extras}")
    found = json.loads(text)
    url = f"{found['vcs_info']['vcs']}+{found['url']}" if "vcs_info" in found else found["url"]
    if found.get("dir_info", {}).get("editable"):
        return f"-e {shlex.quote(url + extras)}"
    return shlex.quote(f"lora-kernels{extras} @ {url}" if extra else url)


def install_command(extra: str) -> str:
    """Return the command that adds the packages of an extra."""
    return f"pip install {origin(extra)}"


@functools.cache
def driver_version() -> str:
    """Return the version of NVIDIA's driver; of its CUDA API where the system names no other."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
        if found:
            return found[0]
    except OSError:
        pass
    version = ctypes.c_int()
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
            return str(version.value)
        except (OSError, AttributeError):
            continue
    return "unknown"


def compiler() -> str | None:
    """Path of the C++ compiler that the build would take (setup.py's order), or None."""
    # CXX may carry a launcher or flags.
    candidates = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def nvcc() -> str | None:
    """Path of the CUDA compiler that the build would take (setup.py's order), or None."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    names = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, names)), None)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _openmp_runtime() -> str | None:
    """Wheels carry libgomp under its public or a private, hashed name; macOS has libomp."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = {line.split("/", 1)[1] for line in lines if "/" in line}
    names = {Path(file).name for file in files}
    return next((n for n in sorted(names) if n.startswith(("libgomp", "libomp", "libiomp"))), None)
