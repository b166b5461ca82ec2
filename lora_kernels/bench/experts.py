"""`lora-kernels bench --experts`: LoRA on the experts of a mixture, beside the frozen experts alone
(transformers' `grouped_mm`) and PEFT's.

The layers have the shapes of well-known models, scaled to a CPU. "decoding" is one token without
gradients. "4 tenants" is a step in which each quarter of the tokens has an adapter of its own, of
equal weights.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import quantize_experts
from ..oracle.case import dtype_name
from .results import FROZEN, Facts, Row
from .table import Entry, Suite, layer_call, set_checks, timed

RANK, ALPHA, TOKENS, TENANTS = 16, 32, 512, 4


class Shape(NamedTuple):
    """A layer of experts: how many, how many a token takes, hidden and intermediate size."""

    model: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = (
    Shape("mixtral", 8, 2, 1024, 1792),
    Shape("gpt_oss", 32, 4, 960, 960),
    Shape("qwen3_moe", 32, 4, 1024, 512),
    Shape("olmoe", 64, 8, 1024, 512),
    Shape("qwen3_moe", 128, 8, 1024, 384),
)


def experts_module(shape: Shape, dtype: torch.dtype) -> Any:
    """Return a model's experts with random frozen weights, of transformers' class."""
    import importlib

    name = shape.model
    package = f"transformers.models.{name}"
    camel = "".join(part.capitalize() for part in name.split("_"))
    config = getattr(importlib.import_module(f"{package}.configuration_{name}"), f"{camel}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        n_routed_experts=shape.experts,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    module = getattr(importlib.import_module(f"{package}.modeling_{name}"), f"{camel}Experts")(
        config
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module.to(dtype).requires_grad_(False)


def adapted(experts: nn.Module) -> nn.Module:
    """Return the experts with PEFT's adapters, whose lora_B is random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model: Any = get_peft_model(nn.ModuleDict({"experts": experts}), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=RANK**-0.5 / 10)
    adapted: nn.Module = model.base_model.model["experts"]
    return adapted


class Tenants(nn.Module):
    """Experts with several adapters, called with as many equal runs of tokens."""

    def __init__(self, experts: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.experts, self.names = experts, names

    def forward(self, *args: Any) -> Any:
        return self.experts(*args, adapter_names=self.names)


def tenants(experts: nn.Module) -> Tenants:
    """Return PEFT's experts as `fuse` makes them, with three adapters more that equal the first."""
    from ..peft.experts import wrappers_of

    names = ["default", *(f"tenant{i}" for i in range(1, TENANTS))]
    for wrapper in wrappers_of(experts):
        for factors in (wrapper.lora_A, wrapper.lora_B):
            for name in names[1:]:
                factors[name] = copy.deepcopy(factors["default"])
        wrapper.scaling.update(dict.fromkeys(names, wrapper.scaling["default"]))
    return Tenants(fused(experts), names)


def fused(experts: nn.Module) -> nn.Module:
    """Return PEFT's experts as `fuse` makes them."""
    from ..peft import fuse

    return fuse(nn.ModuleDict({"experts": experts}))["experts"]


def entries_of(shape: Shape, dtype: torch.dtype) -> Iterator[Entry]:
    """Yield a step of many tokens, and one token without gradients."""
    base = experts_module(shape, dtype)
    peft = adapted(copy.deepcopy(base))
    ours, quantized = fused(copy.deepcopy(peft)), fused(copy.deepcopy(peft))
    several = tenants(copy.deepcopy(peft))
    quantize_experts(quantized, double_quant=False)
    layers = {FROZEN: base, "ours": ours, "ours, NF4": quantized, "peft": peft}
    oracle, oracle_4bit = _oracle(peft), _oracle(peft)
    _decode(oracle_4bit, base)
    for tokens, mode in ((TOKENS, "step"), (1, "decoding")):
        x = torch.randn(tokens, shape.hidden, dtype=dtype).requires_grad_()
        weights, index = torch.rand(tokens, shape.experts).topk(shape.top_k)
        weights = (weights / weights.sum(1, keepdim=True)).to(dtype)
        called = layers | ({f"ours, {TENANTS} tenants": several} if mode == "step" else {})
        calls = {
            name: layer_call(layer, x, torch.randn_like(x), args=(index, weights))
            for name, layer in called.items()
        }
        with torch.no_grad():
            wide = x.double(), index, weights.double()
            y, y4 = oracle(*wide), oracle_4bit(*wide)
            want = {name: y4 if "NF4" in name else y for name in called if name != FROZEN}
            set_checks(calls, want, "peft", dtype, (shape.hidden, shape.intermediate))
        key = Row(
            what=f"experts {shape.model} {shape.experts} top {shape.top_k}",
            dtype=dtype_name(dtype),
            M=tokens,
            K=shape.hidden,
            N=shape.intermediate,
            R=RANK,
        )
        yield Entry(key=key, calls=calls, modes=[(mode, "warm")])


def _decode(oracle: Any, base: nn.Module) -> None:
    """Replace the weights of the oracle's experts by those that NF4 has of `base`.

    Rows are multiples of 64 long: bitsandbytes decodes blocks that straddle two rows wrongly.
    """
    codes = quantize_experts(copy.deepcopy(base).float(), double_quant=False)
    experts = oracle.get_base_layer()
    for name in ("gate_up_proj", "down_proj"):
        getattr(experts, name).data.copy_(getattr(codes, name).detach())


def _oracle(peft: nn.Module) -> Any:
    """Return PEFT's experts in float64, which `grouped_mm` does not take."""
    oracle: Any = copy.deepcopy(peft).double()
    oracle.get_base_layer().config._experts_implementation = "eager"
    return oracle


def entries(args: argparse.Namespace, facts: Facts) -> Iterator[Entry]:
    """Yield LoRA on mixtures of experts."""
    torch.manual_seed(0)
    for name, shape in itertools.product(args.dtypes, SHAPES):
        yield from entries_of(shape, getattr(torch, name))


SUITE = Suite(
    kind="experts",
    option="experts",
    unused="shapes model rows ranks dropout device baseline",
    rows=timed(entries),
)
