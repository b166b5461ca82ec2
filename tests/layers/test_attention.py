import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.layers import LoRAAttention, LoRAGroup, LoRALinear
from tests.support.assertions import assert_close_derived

L, HIDDEN, HEADS = 7, 24, 3


def make_attention(**kwargs):
    attention = LoRAAttention(HIDDEN, HEADS, r=5, alpha=3, dtype=torch.float64, **kwargs)
    for module in attention.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)
    return attention


def merged_attention(attention, hidden, **kwargs):
    """The textbook's: every adapter merged into its weight, one head after the other."""

    def project(x, proj):
        weight = proj.weight
        if isinstance(proj, LoRAGroup):
            updates = []
            for name in proj.members:
                _, _, A, B = proj.member(name)
                updates.append(torch.zeros(HIDDEN, HIDDEN) if A is None else B @ A)
            weight = weight + proj.alpha / proj.r * torch.cat(updates)
        elif isinstance(proj, LoRALinear):
            weight = weight + proj.alpha / proj.r * proj.lora_B @ proj.lora_A
        return F.linear(x, weight, proj.bias)

    qkv = project(hidden, attention.qkv_proj).chunk(3, dim=-1)
    heads = zip(*(y.chunk(HEADS, dim=-1) for y in qkv), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, **kwargs) for q, k, v in heads]
    return project(torch.cat(outs, dim=-1), attention.o_proj)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(L, L).fill_diagonal_(1) > 0.5},
    "additive": {"attn_mask": torch.randn(L, L, dtype=torch.float64)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("targets", "bias", "batch"),
    [
        (("q", "v"), False, (2,)),
        (("k",), True, ()),
        (("o",), True, ()),
        (("q", "k", "v", "o"), True, (2, 3)),
    ],
)
def test_equals_attention_over_merged_weights(mask, targets, bias, batch):
    attention = make_attention(targets=targets, bias=bias)
    hidden = torch.randn(*batch, L, HIDDEN, dtype=torch.float64, requires_grad=True)
    y, want = attention(hidden, **MASKS[mask]), merged_attention(attention, hidden, **MASKS[mask])
    assert y.shape == hidden.shape
    leaves = [hidden, *(p for p in attention.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.square().sum(), leaves)
    want_grads = torch.autograd.grad(want.square().sum(), leaves)
    # Both in float64 (u = 1.1e-16); sums of at most 7·24 terms and scores below 100 that a softmax
    # amplifies leave less than 168 · 100 · u = 2e-12 of the norm.
    assert_close_derived([y, *grads], [want, *want_grads], 2e-12)


def test_only_adapters_train():
    attention = LoRAAttention(HIDDEN, HEADS, targets=("q", "o"), bias=True)
    assert attention.qkv_proj.targets == ("q",) and type(attention.o_proj) is LoRALinear
    assert attention.qkv_proj.lora_B.shape == (HIDDEN, 8)
    trainable = {name for name, p in attention.named_parameters() if p.requires_grad}
    assert trainable == {f"{p}_proj.lora_{m}" for p in ("qkv", "o") for m in "AB"}
    attention = LoRAAttention(HIDDEN, HEADS, targets=("o",))
    assert type(attention.qkv_proj) is nn.Linear
    trainable = {name for name, p in attention.named_parameters() if p.requires_grad}
    assert trainable == {f"o_proj.lora_{m}" for m in "AB"}


def test_options_reach_the_projections():
    sizes, dtypes = (HIDDEN, HEADS), {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16}
    options = {"r": 5, "alpha": 3, "dropout": 0.25, "bias": True, "init": "gaussian"}
    attention = LoRAAttention(*sizes, **options, **dtypes)
    assert attention.qkv_proj.extra_repr() == (
        "in_features=24, out_features=72, bias=True, r=5, alpha=3, dropout=0.25, "
        "members={'q': 24, 'k': 24, 'v': 24}, targets=('q', 'v')"
    )
    assert attention.qkv_proj.init == "gaussian"
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert "num_heads=3, targets=('q', 'v')" in repr(attention)
    meta = LoRAAttention(HIDDEN, HEADS, device="meta")  # o_proj has no adapter
    assert all(p.is_meta for p in meta.parameters())
