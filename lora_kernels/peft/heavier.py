"""The layers for which PEFT's order of GEMMs moves fewer bytes than ours, which stay PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quantization.tensor import QuantizedTensor
from .modules import is_conv1d, is_linear4bit
from .read import active_names, has_operand


def heavier_reason(layer: Any) -> str | None:
    """Return why PEFT's layer moves fewer bytes than PyTorch's GEMMs in our order; None if not.

    The rule approximates the bytes that `lora-kernels bench --count` counts, for a forward and a
    training step with x in the base's dtype. Our order draws dropout's mask again in the backward,
    and runs the base GEMM of a DoRA with dropout twice. It saves passes over y and adds passes over
    x. So PEFT's order moves fewer bytes if y is narrower than x, or if the ranks are as many as y's
    columns.
    """
    base = layer.get_base_layer()
    if not (isinstance(base, nn.Linear) or is_conv1d(base)):
        return None  # a base called as a module moves the same bytes in both orders
    names = active_names(layer)
    if not names or any(has_operand(layer, name, "has_row_index") for name in names):
        return None  # an aLoRA's bytes depend on its active rows
    four_bit = is_linear4bit(base)
    dtype = (base.compute_dtype or torch.bfloat16) if four_bit else base.weight.dtype
    four_bit = four_bit or isinstance(base.weight, QuantizedTensor)
    A = layer.lora_A[names[0]]
    is_wide = getattr(A, "weight", A).dtype.itemsize > dtype.itemsize
    has_dropout = any(getattr(layer.lora_dropout[name], "p", 0.0) for name in names)
    N, K, ranks = layer.out_features, layer.in_features, [layer.r[name] for name in names]
    uses_dora, R = has_operand(layer, names[0], "magnitude"), sum(ranks)
    if not has_dropout:
        is_heavier = N < K and R > N
    elif is_wide:  # from 64 ranks on, 512 rows of x are copied to float32 for each adapter
        is_heavier = N < K and (R > N or (len(names) > 1 and max(ranks) >= 64))
    elif uses_dora:
        has_many_ranks = (16 if four_bit else 8) * R >= min(N, K)
        is_heavier = N < K or has_many_ranks or dtype is torch.float16
    else:
        is_heavier = N < K and (len(names) > 1 or 8 * R >= N)
    if not is_heavier:
        return None
    description = (
        f"{len(names)} adapters" if len(names) > 1 else "DoRA" if uses_dora else "one adapter"
    )
    return (
        f"PEFT's own forward moves fewer bytes for {description}{' with dropout' * has_dropout}, "
        f"{R} ranks, {K} columns of x and {N} of y"
    )
