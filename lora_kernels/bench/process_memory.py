"""Measure the peak memory of a computation."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> int | None:
    """Reset the peak, and return the bytes in use; None if the system does not report them.

    On the CPU these are the resident memory of the process and its high-water mark, which Linux
    resets on request. Free heap pages are returned to the system first, so they do not count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _read_process_status("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def peak(device: torch.device) -> int:
    """Return the peak bytes in use since `reset_peak`, which must not have returned None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read_process_status("VmHWM")


def _read_process_status(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
