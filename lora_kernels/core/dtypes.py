"""Dtypes: of sums, their numbers in native code, and the conversion of a tensor's."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers of the kernels' dtypes in C++ and CUDA.
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def to_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t in `dtype`. `Tensor.to` takes as long as a launch where it has nothing to do.

    >>> x = torch.ones(2)
    >>> to_dtype(x, torch.float32) is x
    True
    """
    return t if t.dtype is dtype else t.to(dtype)


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of P, dg, dc and dbias: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
