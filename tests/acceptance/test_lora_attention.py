"""LoRAAttention: adapters on q and v of a self-attention, the rest frozen."""

import math

import torch

from lora_kernels.layers import LoRAAttention
from tests.acceptance.formula import (
    ALPHA,
    R,
    assert_all_same,
    assert_same,
    gradients,
    inputs,
    randomize,
)

WIDTH, HEADS, LENGTH = 24, 4, 9


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def test_output_and_gradients() -> None:
    layer = randomize(LoRAAttention(WIDTH, HEADS, r=R, alpha=ALPHA, targets=("q", "v")))
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == {"qkv_proj.lora_A", "qkv_proj.lora_B"}
    x = inputs(2, LENGTH, WIDTH).requires_grad_()
    y = layer(x, is_causal=True)

    # The projections lie one below the other, and so do the two adapters.
    leaves = {n: p.detach().double().requires_grad_() for n, p in trained.items()}
    (Aq, Av), (Bq, Bv) = leaves["qkv_proj.lora_A"].split(R), leaves["qkv_proj.lora_B"].split(WIDTH)
    Wq, Wk, Wv = layer.qkv_proj.weight.double().split(WIDTH)
    X = x.detach().double().requires_grad_()
    q = heads(X @ Wq.T + ALPHA / R * (X @ Aq.T) @ Bq.T)
    k = heads(X @ Wk.T)
    v = heads(X @ Wv.T + ALPHA / R * (X @ Av.T) @ Bv.T)
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
    want = mixed @ layer.o_proj.weight.double().T
    assert_same(y, want)
    assert_all_same(gradients(y, {"x": x} | trained), gradients(want, {"x": X} | leaves))
