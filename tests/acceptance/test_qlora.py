"""QLoRA: a frozen 4-bit base, decoded as it is multiplied, under a trainable adapter."""

import torch
from torch import Tensor, nn

from lora_kernels.layers import QLoRALinear
from lora_kernels.quantization import quantize_4bit
from tests.acceptance.formula import ALPHA, M, N, R, assert_formula, inputs, randomize

K = 64
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def decoded(weight: torch.Tensor) -> torch.Tensor:
    """Through NF4 in blocks of 64 and back, written out: the nearest value of 16, times the largest
    of the block."""
    blocks = weight.detach().reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = ((blocks / scale)[..., None] - table).abs().argmin(-1)
    return (table[nearest] * scale).view_as(weight)


def test_output_and_gradients() -> None:
    linear = nn.Linear(K, N)
    W, bias = decoded(linear.weight).double(), linear.bias.detach().double()
    layer = QLoRALinear.from_linear(linear, r=R, alpha=ALPHA, quant_type="nf4", double_quant=False)
    randomize(layer)

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ W.T + bias + ALPHA / R * (x @ lora_A.T) @ lora_B.T

    assert_formula(layer, formula, inputs(M, K))


def test_a_quarter_of_the_bytes_that_training_leaves_alone() -> None:
    linear = nn.Linear(512, 512, bias=False)
    held = quantize_4bit(linear.weight.detach())
    assert held.nbytes < 0.14 * linear.weight.nbytes
    layer = randomize(QLoRALinear.from_linear(linear, r=R, alpha=ALPHA))
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(inputs(M, 512)).square().mean().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]) is not name.startswith("lora_"), name
