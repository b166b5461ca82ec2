"""`nn.Linear` without an adapter, with the native GEMV for a few rows of x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import direct
from ..quantization.tensor import QuantizedTensor


class StreamedLinear(nn.Linear):
    """The class that `fuse(model, linears=True)` gives an `nn.Linear` without an adapter.

    On a CPU, without gradients and for a few rows of x, the native GEMV reads the weight once, in
    memory order. Our kernels read the codes of a packed weight, for any rows of x. PyTorch runs all
    other calls.

    x [..., K] -> [..., N]. The GEMV sums in float32 and rounds once to x's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        parameters = self._parameters
        # DataParallel's replicas and FSDP1 keep the weight as a plain attribute.
        is_stored = "weight" in parameters and "bias" in parameters
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_stored:
            return super().forward(input)
        weight: Tensor | None = parameters["weight"]
        bias = parameters["bias"]
        if type(weight) is QuantizedTensor:
            y = self._read_codes(input, weight, bias)
        else:
            y = direct.call(input, weight, None, None, bias, 0.0)
        return super().forward(input) if y is None else y

    def _read_codes(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
        """Return the result of the kernels over codes; None if PyTorch must compute it."""
        if not x.is_cpu or x.dtype is not weight.dtype or x.dtype is torch.float64:
            return None
        A, B = zero_adapter(x, *weight.shape)
        return direct.call(x, weight.quantized.codes, A, B, bias, 0.0)


def zero_adapter(x: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return an adapter of rank 1 without an effect, since kernels over codes have one."""
    return x.new_zeros(1, K), x.new_zeros(N, 1)
