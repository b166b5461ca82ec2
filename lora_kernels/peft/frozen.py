"""`nn.Linear` without an adapter, with the native GEMV for a few rows of x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import direct


class StreamedLinear(nn.Linear):
    """The class that `fuse(model, linears=True)` gives an `nn.Linear` without an adapter.

    On a CPU, without gradients and for a few rows of x, the native GEMV reads the weight once, in
    memory order. PyTorch runs all other calls.

    x [..., K] -> [..., N]. The GEMV sums in float32 and rounds once to x's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._parameters
        # DataParallel's replicas and FSDP1 keep the weight as a plain attribute.
        is_stored = "weight" in parameters and "bias" in parameters
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_stored:
            return super().forward(input)
        y = direct.call(input, parameters["weight"], None, None, parameters["bias"], 0.0)
        return super().forward(input) if y is None else y
