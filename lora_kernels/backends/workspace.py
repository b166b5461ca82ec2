"""The memory that launches share beyond one call."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import import_extension

MAX_BLOCKS = 384  # of a launch with flags: two for each multiprocessor of the largest GPU
# By device and stream: the flags of calls; the number of the stream's last capture and its flags.
_flags: dict[tuple[int, int], Tensor] = {}
_captured_flags: dict[tuple[int, int], tuple[int, Tensor]] = {}


def is_capturing(device: torch.device) -> bool:
    """Return True if torch's current stream is captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flags(device: torch.device) -> Tensor:
    """Return int32 [2 + MAX_BLOCKS] on the device, which is zero whenever no kernel runs.

    Each kernel leaves its flags zero. Kernels that may run at once must not share them, so each
    stream has its own. A captured graph may be replayed on any stream, beside any call, so it has
    its own of each stream that it captures: its memory, which it fills before their first use.
    """
    if device.type != "cuda":
        return _zeros(device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if not is_capturing(device):
        if key not in _flags:
            _flags[key] = _zeros(device)
        return _flags[key]
    capture, last = _capture_id(key[1]), _captured_flags.get(key)
    if last is None or last[0] != capture:
        # Kept until the stream's next capture: else this one would give the memory out again.
        last = _captured_flags[key] = capture, _zeros(device)
    return last[1]


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(2 + MAX_BLOCKS, dtype=torch.int32, device=device)


def _capture_id(stream: int) -> int:
    """Return the number of the capture that a stream is in. PyTorch has no function for it."""
    number: int = _cuda().capture_id(stream)
    return number


@functools.cache
def _cuda() -> ModuleType:
    return import_extension("_cuda")
