"""The memory that launches share beyond one call."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BLOCKS = 384  # of a launch with flags: two for each multiprocessor of the largest GPU
_flags: dict[tuple[int, int], Tensor] = {}


def is_capturing(device: torch.device) -> bool:
    """Return True if torch's current stream is captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flags(device: torch.device) -> Tensor:
    """int32[2 + MAX_BLOCKS], zero whenever no kernel runs: one for each stream, since two at once
    would share it; of its own for a graph that is captured, since it may be replayed on any."""
    if device.type != "cuda" or is_capturing(device):
        return torch.zeros(2 + MAX_BLOCKS, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _flags:
        _flags[key] = torch.zeros(2 + MAX_BLOCKS, dtype=torch.int32, device=device)
    return _flags[key]
