"""The values behind 4-bit codes and behind the 8-bit codes of scales.

Those of NF4 and FP4 equal bitsandbytes' in every bit. Each call returns a tensor of its own, so
that weights share no memory (safetensors refuses to save tensors that do).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core.codes import BITSANDBYTES_TYPES as BITSANDBYTES_TYPES

E2M1_TYPES = ("mxfp4", "nvfp4")
QUANT_TYPES = (*BITSANDBYTES_TYPES, *E2M1_TYPES)
_POWERS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The elements that may share a scale.
BLOCKSIZES = {"nf4": _POWERS, "fp4": _POWERS, "mxfp4": (32,), "nvfp4": (16,)}
# E2M1 of the OCP: a sign bit, two of the exponent and one of the mantissa. Code 8 is -0.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

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
    "mxfp4": _E2M1,
    "nvfp4": _E2M1,
}  # fmt: skip

# The codes by rising value. Between FP4's two zeros the smaller code comes first, so that the
# values just above 0 take code 8 and 0 itself code 0.
_ORDER = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


def code(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of the 16 codes, float32[16]. Raises ValueError where there is no such type.

    >>> code("fp4")[:4]
    tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    check_type(quant_type)
    return torch.tensor(_VALUES[quant_type], dtype=torch.float32, device=device)


def order(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 codes of NF4 or FP4 by rising value, uint8[16]: `code(t)[order(t).long()]` is sorted.

    >>> order("fp4").tolist()
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]
    """
    return torch.tensor(_ORDER[quant_type], dtype=torch.uint8, device=device)


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


def e8m0(device: torch.device | str = "cpu") -> Tensor:
    """The scales of MXFP4's bytes, float32[256]: 2^(i - 127), and NaN for 255 (OCP MX 1.0, 5.4.1).

    >>> e8m0()[[126, 127, 255]]
    tensor([0.5000, 1.0000,    nan])
    """
    exponents = torch.arange(-127, 129, dtype=torch.float64, device="cpu")
    values = torch.exp2(exponents).float()  # float32 holds 2^-127 as a subnormal
    values[255] = torch.nan
    return values.to(device)


def e4m3(device: torch.device | str = "cpu") -> Tensor:
    """The values of NVFP4's bytes, float32[256]: float8_e4m3fn, whose byte 128 is -0.

    >>> e4m3()[[1, 56, 126, 127]]
    tensor([1.9531e-03, 1.0000e+00, 4.4800e+02,        nan])
    """
    values = torch.arange(256, dtype=torch.uint8, device="cpu")
    return values.view(torch.float8_e4m3fn).float().to(device)


def int8(device: torch.device | str = "cpu") -> Tensor:
    """The values of signed bytes, float32[256]: 0 to 127, and -128 to -1.

    >>> int8()[[0, 127, 128, 255]]
    tensor([   0.,  127., -128.,   -1.])
    """
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).float()


def check_type(quant_type: str) -> None:
    """Raise ValueError unless it is one of `QUANT_TYPES`, which have a codebook here."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: got {quant_type!r}, want 'nf4', 'fp4', 'mxfp4' or 'nvfp4'")
