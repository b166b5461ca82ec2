"""LoRAAttention: adapters on q and v of a self-attention, the rest frozen."""

import math
from functools import partial

import torch
from torch import Tensor

from lora_kernels.layers import LoRAAttention
from tests.acceptance.formula import ALPHA, R, assert_formula, inputs, randomize

WIDTH, HEADS, LENGTH = 24, 4, 9


def heads(t: Tensor) -> Tensor:
    return t.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def test_output_and_gradients() -> None:
    layer = randomize(LoRAAttention(WIDTH, HEADS, r=R, alpha=ALPHA, targets=("q", "v")))
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == {"qkv_proj.lora_A", "qkv_proj.lora_B"}

    def formula(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        # The projections lie one below the other, and so do the two adapters.
        (Aq, Av), (Bq, Bv) = lora_A.split(R), lora_B.split(WIDTH)
        Wq, Wk, Wv = layer.qkv_proj.weight.double().split(WIDTH)
        q = heads(x @ Wq.T + ALPHA / R * (x @ Aq.T) @ Bq.T)
        k = heads(x @ Wk.T)
        v = heads(x @ Wv.T + ALPHA / R * (x @ Av.T) @ Bv.T)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
        return mixed @ layer.o_proj.weight.double().T

    leaves = {name.rpartition(".")[2]: p for name, p in trained.items()}
    assert_formula(partial(layer, is_causal=True), formula, inputs(2, LENGTH, WIDTH), leaves)
