"""`dora_norm`, for DoRA's column scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import linear as cpu
from ..backends.eager import norm as eager
from ..backends.protocol import NormBackend
from ..choice import choose as selection
from ..core.codes import Codes
from ..core.dtypes import stat_dtype
from ..core.problem import Problem
from ..quantization import QuantizedWeight
from . import context
from .arguments import (
    check_devices,
    check_dtypes,
    check_number,
    check_tensor,
    check_vector,
    matrix_shape,
)
from .registry import define, tensors_of

BACKENDS: dict[str, NormBackend] = {"eager": eager, "cpu": cpu}


@torch.no_grad()
def dora_norm(
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    rank_gate: Tensor | None = None,
) -> Tensor:
    """Return the norm of each row of W + (B ⊙ g)·A, g = scaling · rank_gate.

    DoRA's column scale is magnitude / norm. The norm is a constant: it has no gradient. The sum is
    not stored.

    Args:
        weight: [N, K], float32, bfloat16, float16 or float64, or a `QuantizedWeight`.
        lora_A: [R, K], float64 only if all tensors are.
        lora_B: [N, R], as lora_A.
        scaling: alpha / r.
        rank_gate: [R] or None.

    Returns:
        float32 [N]; float64 for float64.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names the argument.
        RuntimeError: a forced backend cannot run here.

    >>> import torch
    >>> from lora_kernels.ops.norm import dora_norm
    >>> dora_norm(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), scaling=2.0)
    tensor([3.6056, 1.0000])
    """
    R, K = matrix_shape("lora_A", lora_A, "[R, K]")
    N, _ = matrix_shape("lora_B", lora_B, "[N, R]")
    if lora_B.shape[1] != R:
        raise ValueError(f"lora_B: got shape {list(lora_B.shape)}, want [N, {R}] for rank {R}")
    if not isinstance(weight, QuantizedWeight):
        check_tensor("weight", weight, "a tensor or a QuantizedWeight")
    if tuple(weight.shape) != (N, K):
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, want [{N}, {K}] for lora_A "
            f"{list(lora_A.shape)} and lora_B {list(lora_B.shape)}"
        )
    storage = weight.packed if isinstance(weight, QuantizedWeight) else weight
    check_devices("lora_A", lora_A, weight=storage, lora_B=lora_B)
    dtypes = {"lora_A": lora_A.dtype, "lora_B": lora_B.dtype}
    check_dtypes("lora_A", lora_A.dtype, **dtypes)
    if isinstance(weight, QuantizedWeight):
        if lora_A.dtype is torch.float64:
            raise TypeError(
                f"lora_A: got {lora_A.dtype}, want float32, bfloat16 or float16 beside a 4-bit "
                "weight"
            )
    else:
        check_dtypes("lora_A", lora_A.dtype, weight=weight.dtype)
    if rank_gate is not None:
        check_vector("rank_gate", rank_gate, R, lora_A, "lora_A")
    others = (lora_A, lora_B, check_number("scaling", scaling), rank_gate)
    base = weight.codes if isinstance(weight, QuantizedWeight) else weight
    if context.can_bypass_dispatcher(*tensors_of((base, lora_A, lora_B, rank_gate))):
        return _dora_norm(base, *others)
    norm: Tensor
    norm = _NORM.dense(base, *others) if isinstance(base, Tensor) else _NORM.packed(*base, *others)
    return norm


def _dora_norm(
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """Compute the norms without the dispatcher."""
    assert weight is not None
    device_type, index = context.device_of(lora_A)
    weight_dtype = torch.float32 if isinstance(weight, Codes) else weight.dtype
    dtypes = weight_dtype, lora_A.dtype, lora_B.dtype, torch.float32
    choice = selection.choose_norm(
        Problem(device_type, *dtypes, lora_A.shape[0], device_index=index)
    )
    norm: Tensor
    with context.no_autocast(lora_A):
        norm = BACKENDS[choice.backend].dora_norm(weight, lora_A, lora_B, scaling, rank_gate)
    return norm


def _dora_norm_fake(
    weight: Tensor | Codes | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    return lora_A.new_empty(lora_B.shape[0], dtype=stat_dtype(lora_A.dtype))


_NORM = define(
    "dora_norm",
    "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? rank_gate) -> Tensor",
    _dora_norm,
    _dora_norm_fake,
)
