"""The memory that a piece of work needs at its peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def held(device: torch.device) -> int | None:
    """Bytes in use now, where the peak is counted anew from; None where the system does not tell.

    On the CPU that is the process's resident memory, whose high-water mark Linux resets on request;
    free heap pages are handed back first, so that memory which an earlier step left behind is not
    taken for memory in use.
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
    """Bytes in use at most since `held`, which has to have told some."""
    return (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_process("VmHWM")
    )


def _of_process(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
