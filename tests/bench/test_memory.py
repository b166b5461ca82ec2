"""Bytes held from forward to backward: ours are the formula, and nothing is held beside.

    x [M, K] + P [M, R] in float32 + 16 bytes of dropout state + z [M, N] where c trains

with z in x's dtype. DoRA and AdaLoRA, whose c and g are PyTorch's expressions of their parameters,
also hold a few vectors of N or R elements. Ours is PEFT's layer after `fuse`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_kernels.bench import baselines
from lora_kernels.bench.memory import held, saved
from lora_kernels.peft import fuse

pytest.importorskip("peft")

DROPOUT = 0.1
VARIANTS: dict[str, dict[str, Any]] = {  # options of `peft_layer`
    "plain": {},
    "dropout": {"lora_dropout": DROPOUT},
    "DoRA": {"use_dora": True},
    "gate": {"adalora": True},  # AdaLoRA's, whose E trains
}
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (2, 64)  # batch and length of a Llama's step
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SIZES, R = (24, 33, 47), 5  # M, K, N
M, K, N = SIZES


def minimum(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, *, dropout: bool = False, z: bool = False
) -> int:
    """The bytes of x, P in float32, the dropout state, and z if the column scale trains."""
    return M * K * dtype.itemsize + 4 * M * R + 16 * dropout + M * N * dtype.itemsize * z


def stock(variant: str, dtype: torch.dtype, sizes: tuple[int, int, int], R: int) -> nn.Module:
    """Build PEFT's layer of one of VARIANTS over a linear of that dtype, in training mode."""
    base, options = nn.Linear(*sizes[1:], bias=False, dtype=dtype), VARIANTS[variant]
    layer: nn.Module = baselines.peft_layer(base, [R], adapter_dtype=torch.float32, **options)
    return layer


class Counted(NamedTuple):
    """Bytes of ours and of PEFT's, and the minimum."""

    minimum: int
    bytes: dict[str, int]


def layer_bytes(variant: str, dtype: torch.dtype) -> Counted:
    theirs = stock(variant, dtype, SIZES, R)
    layers = {"ours": fuse(nn.Sequential(copy.deepcopy(theirs)))[0], "peft": theirs}
    x = torch.randn(M, K).to(dtype).requires_grad_()
    least = minimum(M, K, N, R, dtype, dropout=variant == "dropout", z=variant == "DoRA")
    found = {name: sum(held(partial(each, x), each).values()) for name, each in layers.items()}
    return Counted(least, found)


def step_bytes(dtype: torch.dtype) -> Counted:
    """Count the bytes that a Llama with LoRA on all linears holds for its backward.

    The minimum is the sum of three: what the frozen model holds for the gradients of its
    activations; the other inputs of its linear layers (those of q, k and v are one tensor); P in
    float32 and the dropout state of each layer.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    config._attn_implementation = "eager"
    lora = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=DROPOUT, target_modules="all-linear")
    llama: Any = LlamaForCausalLM(config)
    llama.to(dtype)
    ids = torch.randint(config.vocab_size, TOKENS)
    least = _least(llama, ids)
    model: Any = get_peft_model(llama, lora).train()
    forward = partial(model, input_ids=ids, labels=ids)
    peft = sum(held(forward, model).values())
    fuse(model)
    return Counted(least, {"ours": sum(held(forward, model).values()), "peft": peft})


def _least(llama: Any, ids: Tensor) -> int:
    """Return the minimum of `step_bytes`, from a model without adapters."""
    llama.requires_grad_(False)
    inputs: dict[int, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        inputs.setdefault(args[0].untyped_storage().data_ptr(), args[0])
        if not y.requires_grad:  # gradients begin where the first adapters are
            y.requires_grad_()

    layers = [m for m in llama.model.modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(look) for layer in layers]
    there = [*llama.parameters(), *llama.buffers()]
    kept = saved(partial(llama, input_ids=ids, labels=ids), there)
    for handle in handles:
        handle.remove()
    adapters = len(layers) * (4 * ids.numel() * R + 16)
    return adapters + sum(t.untyped_storage().nbytes() for t in (kept | inputs).values())


def vectors(variant: str, dtype: torch.dtype) -> int:
    """Bytes of what PyTorch keeps of the expressions of c and g, which are small.

    DoRA: c, and the norm that the magnitude is divided by, [N] float32 each. AdaLoRA: the gate [R]
    float32, in 16 bits a second [R], and the count of ranks that are left.
    """
    if variant == "DoRA":
        return 2 * 4 * N
    if variant == "gate":
        return 4 * R * (1 if dtype is torch.float32 else 2) + 4
    return 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_hold_the_formula(dtype: torch.dtype, variant: str) -> None:
    row = layer_bytes(variant, dtype)
    want = M * K * dtype.itemsize + M * R * 4  # x, and D(x)·Aᵀ in float32
    want += {"dropout": 16, "DoRA": M * N * dtype.itemsize}.get(variant, 0)
    assert row.minimum == want
    assert row.bytes["ours"] == want + vectors(variant, dtype)
    assert row.bytes["peft"] >= row.minimum


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_else_is_alive(dtype: torch.dtype, variant: str) -> None:
    """The forward leaves y and the saved tensors except x allocated, with and without hooks."""
    layer = fuse(nn.Sequential(stock(variant, dtype, SIZES, R)))[0]
    x = torch.randn(M, K).to(dtype).requires_grad_()
    kept = sum(held(lambda: layer(x), layer).values())  # and a first call, which may make buffers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = layer(x)
    alive = sum(event.self_cpu_memory_usage for event in profiled.events())
    # Of AdaLoRA's E·s PyTorch keeps s, a float64 for which it calls no hook.
    number = 8 if variant == "gate" else 0
    assert alive == y.numel() * y.itemsize + kept + number - x.numel() * x.itemsize


def test_storages_are_counted_once_and_whole() -> None:
    """A view holds all of its storage, two views no more; those of parameters are there anyway."""
    module = nn.Linear(6, 6, bias=False)
    x = torch.randn(8, 12, requires_grad=True)

    def call() -> torch.Tensor:
        left, right = x[:, :6], x[:, 6:]
        return (left * right) @ module.weight

    found = 8 * 12 * 4 + 8 * 6 * 4  # x, left * right
    assert held(call, module) == {"[8, 6] float32": found}
    assert sum(held(call).values()) == found + 6 * 6 * 4


def test_a_small_llama_holds_nothing_above_the_minimum() -> None:
    """The minimum is counted of the frozen model, and by hand of its adapters."""
    pytest.importorskip("transformers")
    for dtype in DTYPES:
        row = step_bytes(dtype)
        assert 0 < row.minimum == row.bytes["ours"] < row.bytes["peft"]
