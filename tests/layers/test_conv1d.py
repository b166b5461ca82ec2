"""LoRAConv1D's own: the Conv1D that it shares, its start. See test_every_layer.py."""

import torch
from transformers.pytorch_utils import Conv1D

from lora_kernels.layers import LoRAConv1D
from tests.support.assertions import assert_close_derived

K, N, M = 67, 72, 33


def test_from_conv1d_shares_its_base_and_starts_as_it() -> None:
    conv = Conv1D(N, K)
    layer, x = LoRAConv1D.from_conv1d(conv, r=5), torch.randn(M, K)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert not conv.weight.requires_grad
    assert_close_derived(layer(x), conv(x))
    layer.enabled = False
    assert_close_derived(layer(x), conv(x))


def test_layer_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    layer = LoRAConv1D(256, 128)
    assert layer.weight.shape == (256, 128) and not layer.weight.requires_grad
    assert abs(layer.weight.std() / 0.02 - 1) < 0.02 and not layer.bias.any()
