"""4-bit weights in bitsandbytes' format."""

from importlib.util import find_spec

import torch

from ..backends import decode4bit
from .weight4bit import Weight4bit, quantize_4bit

__all__ = ["Weight4bit", "quantize_4bit"]


def _compare_bitsandbytes(device: torch.device) -> str | None:
    """Return why bitsandbytes does not decode on a device; None if its ops agree with ours."""
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from .bitsandbytes import compare

    return compare(device)


decode4bit.compare_bitsandbytes = _compare_bitsandbytes
