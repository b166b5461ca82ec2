"""The values behind 4-bit codes (NF4, FP4) and behind the 8-bit codes of nested scales.

Every tensor here equals bitsandbytes' in every bit. Each call returns a tensor of its own, so that
weights share no memory (safetensors refuses to save tensors that do).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

QUANT_TYPES = ("nf4", "fp4")

_VALUES = {
    # Quantiles of a normal distribution, in order of value.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign bit over three others that are not in order of value. Code 8 is +0: bitsandbytes'
    # table is written in integers, which have no negative zero.
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
}  # fmt: skip

# The codes by rising value. Between FP4's two zeros the smaller code comes first, so that the
# values just above 0 take code 8 and 0 itself code 0.
_ORDER = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


def code(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of the 16 codes, float32[16]. Raises ValueError where the type is neither.

    >>> code("fp4")[:4]
    tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    return torch.tensor(_VALUES[_checked(quant_type)], dtype=torch.float32, device=device)


def order(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 codes by rising value, uint8[16]: `code(t)[order(t).long()]` is sorted.

    >>> order("fp4").tolist()
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]
    """
    return torch.tensor(_ORDER[_checked(quant_type)], dtype=torch.uint8, device=device)


def thresholds(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Midway between neighbours in `order`, float32[15]; a value above (not on) one goes up.

    >>> thresholds("nf4")[-2:]
    tensor([0.6428, 0.8615])
    """
    # On the CPU whatever the device: the midpoints are rounded to float32.
    values = code(quant_type)[order(quant_type).long()]
    return ((values[:-1] + values[1:]) / 2).to(device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic map, float32[256], rising from −0.993 to 1.

    Decade 10^(e−6) to 10^(e−7), e in 0..6, is cut into 2^e equal parts. Their middles are taken
    with either sign; then 0 and 1.

    >>> values = dynamic_map()
    >>> values.shape, values[127].item(), values[-1].item()
    (torch.Size([256]), 0.0, 1.0)
    """
    return _dynamic_map().to(device, copy=True)


@functools.cache
def _dynamic_map() -> Tensor:
    decades = []
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32, device="cpu")
        decades.append(10.0 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return torch.cat([positive, -positive, ends]).sort().values


def _checked(quant_type: str) -> str:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: got {quant_type!r}, want 'nf4' or 'fp4'")
    return quant_type
