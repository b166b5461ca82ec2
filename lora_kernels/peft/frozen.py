"""`nn.Linear` without an adapter whose products for a few rows of x are ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..fastpath import PreparedLinear


class StreamedLinear(nn.Linear):
    """What `fuse(model, linears=True)` makes of a plain `nn.Linear`: on a CPU, without gradients,
    y of a few rows of x reads the weight once, in the order that it lies; all else is PyTorch's.

    x [..., K] -> [..., N], in float32 sums, rounded once to x's dtype.
    """

    _prepared: PreparedLinear | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        if self._prepared is None:
            self._prepared = PreparedLinear()
        parameters = self._parameters
        y = self._prepared(input, parameters["weight"], parameters["bias"])
        return super().forward(input) if y is None else y
