"""`lora-kernels bench --experts`: LoRA on the experts of a mixture, beside the frozen experts alone
(transformers' `grouped_mm`) and PEFT's.

The layers have the shapes of well-known models, scaled to a CPU. "forward" is one token without
gradients, as in decoding.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import quantize_experts
from ..oracle import tolerance
from ..oracle.case import dtype_name
from . import baselines
from .baselines import Forward, Layers
from .results import FROZEN, Facts, Row, Suite

RANK, ALPHA, TOKENS = 16, 32, 512


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
    of = f"transformers.models.{name}"
    camel = {"gpt_oss": "GptOss", "qwen3_moe": "Qwen3Moe"}.get(name, name.capitalize())
    config = getattr(importlib.import_module(f"{of}.configuration_{name}"), f"{camel}Config")(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    module = getattr(importlib.import_module(f"{of}.modeling_{name}"), f"{camel}Experts")(config)
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
    found: nn.Module = model.base_model.model["experts"]
    return found


def fused(experts: nn.Module) -> nn.Module:
    """Return PEFT's experts as `fuse` makes them."""
    from ..peft import fuse

    return fuse(nn.ModuleDict({"experts": experts}))["experts"]


def rows(shape: Shape, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    """Time a step of many tokens, and one token without gradients."""
    base = experts_module(shape, dtype)
    peft = adapted(copy.deepcopy(base))
    ours, quantized = fused(copy.deepcopy(peft)), fused(copy.deepcopy(peft))
    quantize_experts(quantized, double_quant=False)
    layers = {FROZEN: base, "ours": ours, "ours, NF4": quantized, "peft": peft}
    for tokens, mode in ((TOKENS, "step"), (1, "forward")):
        x = torch.randn(tokens, shape.hidden, dtype=dtype)
        weights, index = torch.rand(tokens, shape.experts).topk(shape.top_k)
        weights = (weights / weights.sum(1, keepdim=True)).to(dtype)
        calls: Layers = {
            name: (_routed(layer, index, weights), baselines.trained(layer))
            for name, layer in layers.items()
        }
        with torch.no_grad():
            want = _oracle(peft)(x.double(), index, weights.double())
            errors = baselines.errors({name: calls[name] for name in ("ours", "peft")}, x, want)
        row = Row(
            what=f"experts {shape.model} {shape.experts} top {shape.top_k}",
            dtype=dtype_name(dtype),
            M=tokens,
            K=shape.hidden,
            N=shape.intermediate,
            R=RANK,
            mode=mode,
        )
        u = tolerance.unit_roundoff(dtype)
        row.judge(errors, errors["peft"], u, (shape.hidden, shape.intermediate))
        if mode == "step":
            yield row.time(baselines.steps(calls, x.requires_grad_(), torch.randn_like(x)), seconds)
            continue
        with torch.no_grad():
            row.time({name: partial(call, x) for name, (call, _) in calls.items()}, seconds)
        yield row


def _routed(layer: Any, index: Tensor, weights: Tensor) -> Forward:
    return lambda x: layer(x, index, weights)


def _oracle(peft: nn.Module) -> Any:
    """Return PEFT's experts in float64, which `grouped_mm` does not take."""
    oracle: Any = copy.deepcopy(peft).double()
    oracle.get_base_layer().config._experts_implementation = "eager"
    return oracle


class Experts(Suite):
    """LoRA on mixtures of experts."""

    kind, option = "experts", "experts"
    unused = "shapes model rows ranks dropout device baseline"

    def rows(self, args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
        torch.manual_seed(0)
        for name, shape in itertools.product(args.dtypes, SHAPES):
            yield from rows(shape, getattr(torch, name), args.seconds)
