"""LoRAConv1D against LoRALinear on the transposed weight."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.layers import LoRAConv1D, LoRALinear, load_lora_weights, save_lora_weights
from tests.support.assertions import assert_bitwise_equal, assert_close_derived

K, N, M = 67, 72, 33


def layers() -> tuple[LoRAConv1D, LoRALinear, Conv1D]:
    torch.manual_seed(0)
    conv = Conv1D(N, K)
    nn.init.normal_(conv.weight, std=0.2)
    nn.init.normal_(conv.bias)
    layer = LoRAConv1D.from_conv1d(conv, r=5, alpha=7)
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
        layer.lora_B.normal_()
    twin = LoRALinear.from_linear(linear, r=5, alpha=7)
    twin.load_state_dict({**twin.state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    return layer, twin, conv


def test_from_conv1d_shares_its_base_and_starts_as_it() -> None:
    conv = Conv1D(N, K)
    layer, x = LoRAConv1D.from_conv1d(conv, r=5), torch.randn(M, K)
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert not conv.weight.requires_grad
    assert_close_derived(layer(x), conv(x))
    layer.enabled = False
    assert_close_derived(layer(x), conv(x))


def test_y_and_every_gradient_are_those_of_a_linear() -> None:
    layer, twin, _ = layers()
    x = torch.randn(2, M, K, requires_grad=True)
    dy = torch.randn(2, M, N)
    got, want = (
        [y, *torch.autograd.grad(y, [x, each.lora_A, each.lora_B], dy)]
        for each in (layer, twin)
        for y in [each(x)]
    )
    assert_close_derived(got, want)


def test_adapter_saved_and_loaded_over_the_same_base(tmp_path: Path) -> None:
    layer, _, conv = layers()
    x = torch.randn(M, K)
    with torch.no_grad():
        y = layer.eval()(x)
        assert_bitwise_equal(layer(x), y)  # a second token
        save_lora_weights(layer, tmp_path / "adapter.safetensors")
        fresh = LoRAConv1D.from_conv1d(conv, r=5, alpha=7).eval()
        load_lora_weights(fresh, tmp_path / "adapter.safetensors")
        assert_bitwise_equal(fresh(x), y)


def test_layer_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    layer = LoRAConv1D(256, 128)
    assert layer.weight.shape == (256, 128) and not layer.weight.requires_grad
    assert abs(layer.weight.std() / 0.02 - 1) < 0.02 and not layer.bias.any()


def test_from_conv1d_refuses_what_is_not_stock() -> None:
    with pytest.raises(TypeError, match="conv: got Linear, want exactly transformers' Conv1D"):
        LoRAConv1D.from_conv1d(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="linear: want a Conv1D"):
        LoRAConv1D.from_linear(nn.Linear(4, 4))
    conv = Conv1D(4, 4)
    conv.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(TypeError, match="conv: got one with hooks"):
        LoRAConv1D.from_conv1d(conv)
