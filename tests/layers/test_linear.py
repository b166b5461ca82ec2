"""LoRALinear's own, and LoRAConv1D's: starts, dtypes, masks and the base that they share.

Properties of every layer are in test_every_layer.py.
"""

import pytest
import torch
from torch import nn

from lora_kernels.layers import LoRAConv1D, LoRALinear
from tests.support.models import KINDS

make = KINDS["linear_bias"].make


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


def test_layer_starts_as_its_base():
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    torch.manual_seed(0)
    layer = LoRALinear(12, 10, r=3, bias=True)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.count_nonzero(layer.lora_B) == 0 and torch.count_nonzero(layer.lora_A) == 36
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


def test_trainable_bias_gets_a_gradient():
    layer, x = make(), integers(5, 12)
    layer(x).sum().backward()
    assert layer.bias.grad is None and layer.weight.grad is None
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((10,), 5.0))


class Masks(nn.Module):
    """Two layers whose outputs are their dropout masks of ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (LoRALinear(16, 16, r=16, alpha=16, dropout=0.5) for _ in range(2))
        for layer in (self.a, self.b):
            nn.init.zeros_(layer.weight)
            nn.init.eye_(layer.lora_A)
            nn.init.eye_(layer.lora_B)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_masks_differ_between_calls_and_layers(mode):
    model, x = Masks(), torch.ones(8, 16)
    run = model if mode == "eager" else torch.compile(model, fullgraph=True, backend=mode)
    with torch.set_grad_enabled(mode != "inductor"):  # whose backward would take as long to build
        masks = [*run(x), *run(x)]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == [0, 2]
        # 128 fair coins agree throughout with probability 2^-128.
        assert not any(torch.equal(mask, other) for other in masks[:i])


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "want"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype_is_float32_unless_given(dtype, lora_dtype, want):
    layer = make(dtype=dtype, lora_dtype=lora_dtype)
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert layer.lora_A.dtype is layer.lora_B.dtype is want
    y = layer(integers(5, 12).to(dtype))
    y.sum().backward()
    assert y.dtype is dtype and layer.lora_A.grad.dtype is layer.lora_B.grad.dtype is want


def test_from_linear_checks_its_arguments_before_freezing():
    linear = nn.Linear(12, 10)
    with pytest.raises(ValueError, match="r: got 0"):
        LoRALinear.from_linear(linear, r=0)
    assert linear.weight.requires_grad


def test_conv1d_layer_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    layer = LoRAConv1D(256, 128)
    assert layer.weight.shape == (256, 128) and not layer.weight.requires_grad
    assert abs(layer.weight.std() / 0.02 - 1) < 0.02 and not layer.bias.any()
