"""What this machine is: processor, GPUs, versions, compiler. Facts only; info.py says them.

Nothing is asked at import; `gpus` initialises CUDA where there is any.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
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
class Gpu:
    """One device of torch.cuda (ROCm's included)."""

    index: int
    name: str
    capability: str  # "9.0"
    multiprocessors: int
    memory_bytes: int


def cpu() -> Cpu:
    """The processor, its cores and torch's threads.

    >>> from lora_kernels import device
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


def clocks_mhz() -> list[float] | None:
    """What each core runs at now, as /proc/cpuinfo says; None where that is not known.

    A virtual machine says its nominal clock.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")] or None


def gpus() -> list[Gpu]:
    """The GPUs that torch can use, in torch's order; initialises CUDA if there are any."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Gpu(
                index=index,
                name=properties.name,
                capability=f"{properties.major}.{properties.minor}",
                multiprocessors=properties.multi_processor_count,
                memory_bytes=properties.total_memory,
            )
        )
    return found


def version(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it; None where there is none.

    >>> from lora_kernels import device
    >>> device.version("no-such-distribution") is None
    True
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
