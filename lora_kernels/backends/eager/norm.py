"""DoRA's row norm ‖W + s·B·A‖ of the eager backend, the denominator of its column scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.codes import Codes
from ...core.dtypes import stat_dtype, to_dtype
from .. import decoder
from ..library import is_on_gpu_path
from . import products

PANEL = 4 << 20  # bytes of W + s·B·A that are summed at a time
EXPANDED_NORM = 256  # columns from which the norm is made of products on a GPU


def dora_norm(
    weight: Tensor | Codes,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """Return ‖W + s·B·A‖ of each row, B's columns gated: [N] in float32 (float64 for float64).

    On a GPU, for K ≥ `EXPANDED_NORM`: ‖W‖² + s·rowsum(B ⊙ (2·W·Aᵀ + s·B·A·Aᵀ)), which reads W once
    and writes nothing of its size. Its relative error is at most κ·√K·2⁻²⁴,
    κ = (‖W‖ + ‖s·B·A‖)²/norm²; beside a 16-bit W, κ·2⁻¹⁷/√K (rms) is added. κ grows if the update
    nearly cancels a row of W, which is likely by chance only for few columns. Otherwise W + s·B·A
    is summed, a panel of rows at a time.
    """
    dtype = stat_dtype(lora_A.dtype)
    if is_on_gpu_path(lora_A.device.type) and lora_A.shape[1] >= EXPANDED_NORM:
        w = products.dense_weight(weight, lora_A, lora_B, dtype)
        return _norm_from_products(w, lora_A, lora_B, scaling, rank_gate)
    A, B = to_dtype(lora_A, dtype), to_dtype(lora_B, dtype)
    if rank_gate is not None:
        B = B * to_dtype(rank_gate, dtype)
    return _norm_by_panels(weight, A, B, scaling)


def _norm_from_products(
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rank_gate: Tensor | None,
) -> Tensor:
    """Compute the norm of a dense w [N, K] from ‖W‖ and products, without W + s·B·A."""
    dtype = stat_dtype(lora_A.dtype)
    squares = torch.linalg.vector_norm(w, dim=1, dtype=dtype).square_()
    wa, gram = products.shrink(w, lora_A, 0), products.shrink(lora_A, lora_A, 0)
    B = to_dtype(lora_B, dtype)
    if rank_gate is not None:
        B = B * to_dtype(rank_gate, dtype)
    update = torch.addmm(wa, B, gram, beta=2, alpha=scaling)
    rowsum = torch.bmm(update.unsqueeze(1), B.unsqueeze(2)).view(-1)
    return torch.add(squares, rowsum, alpha=scaling).sqrt_()


def _norm_by_panels(weight: Tensor | Codes, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Compute the norm from W + s·B·A, a panel of rows at a time. A [R, K], B [N, R], gated."""
    N, K, dtype = B.shape[0], A.shape[1], A.dtype
    out = torch.empty(N, dtype=dtype, device=A.device)
    step = max(64, PANEL // (K * dtype.itemsize))
    for start in range(0, N, step):
        n = slice(start, min(N, start + step))
        if isinstance(weight, Codes):
            w = decoder.dense(weight, (N, K), dtype, rows=n)
        else:
            w = weight[n].to(dtype)
        update = torch.mm(B[n], A)
        torch.linalg.vector_norm(torch.add(w, update, alpha=scaling), dim=1, out=out[n])
    return out
