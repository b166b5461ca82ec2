"""Decode quantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from . import configs, launch
from .decoding import dequantize_kernel

if TYPE_CHECKING:
    from ...core.codes import Codes
    from ..launches import Plan


@launch.planned
def dequantize(plan: Plan, codes: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Decode the weight [N, K], rounded once to `dtype`."""
    (N, K), config = shape, configs.DEQUANTIZE
    tables = codes.nested_code
    experts = 1 if tables is None or tables.dim() == 1 else tables.shape[0]
    N //= experts
    tiles = triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k)
    w = plan.empty(*shape, dtype=dtype)
    launch.run(
        dequantize_kernel,
        config,
        plan,
        grid=tiles if experts == 1 else (*tiles, experts),
        device=plan.device,
        **launch.codes_arguments(codes, K, launch.target(plan.device)),
        w_ptr=w,
        **{"N": N, "K": K, "TABLES": experts > 1, "WIDE": N * K >= 1 << 31},
        **{"BITS": codes.bits, "SHIFT": codes.has_shift},
        LOG2_NESTED=codes.nested_blocksize.bit_length() - 1,
        **config.blocks,
    )
    return w
