"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def held(device: torch.device) -> int | None:
    """Return the bytes in use now and reset the peak; None if the system does not tell.

    On the CPU that is the process's resident memory, whose high-water mark Linux resets on request.
    Free heap pages are handed back first: what an earlier step left behind is not in use.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _of_process("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def peak(device: torch.device) -> int:
    """Return the most bytes in use since `held`, which must not have returned None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM")


def _of_process(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
