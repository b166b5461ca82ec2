"""Attributes set on a context by hand are no tensors."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import lora_linear, multi_lora_linear
from lora_kernels.quantization import quantize_4bit
from tests.support.models import hidden


@pytest.mark.parametrize("is_quantized", [False, True])
def test_context_of_a_call_holds_no_tensor(is_quantized: bool) -> None:
    M, N, K, R = 6, 64, 64, 3
    W = torch.randn(N, K)
    base = quantize_4bit(W) if is_quantized else W
    A, B = (torch.randn(s, requires_grad=True) for s in ((R, K), (N, R)))
    x = torch.randn(M, K, requires_grad=True)
    bias, g, c = (torch.ones(n, requires_grad=True) for n in (N, R, N))
    y = lora_linear(x, base, A, B, 2.0, bias, rank_gate=g, column_scale=c, dropout_p=0.1)
    assert not hidden(y)
    assert vars(y.grad_fn).keys() >= {"choice", "options", "bias_dtype", "x_dtype"}
    index = torch.tensor([0, 1, -1, 1, 0, 0])
    y = multi_lora_linear(x, base, [A, A], [B, B], index, [2.0, 0.5], bias, dropout_p=0.1)
    assert not hidden(y)
