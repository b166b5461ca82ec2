"""A block asks for the choice of each of its layers' own calls, and `explain` for the same.

A card's verdict knows a call by its `Problem`, which is that of the layers' own calls.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lora_kernels.bench import baselines
from lora_kernels.core.problem import Problem
from lora_kernels.layers import LoRAGatedMLP, LoRALinear, QLoRALinear
from lora_kernels.peft import explain, fuse
from tests.interop import test_mlp, test_siblings

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
K, H = 64, 128
pytestmark = pytest.mark.usefixtures("gpu_path")


class Case(NamedTuple):
    """Dtypes of x with the base, and of the adapters; and what else a choice depends on."""

    x: torch.dtype
    adapter: torch.dtype
    autocast: bool = False
    four_bit: bool = False
    cast: bool = False  # `cast_adapters`
    config: tuple[tuple[str, Any], ...] = ()


CASES = [
    Case(f64, f64),
    Case(f32, f32),
    Case(bf16, bf16),
    Case(bf16, f32),
    Case(bf16, f32, cast=True),
    Case(f32, f32, autocast=True),
    Case(bf16, f32, autocast=True),
    Case(f32, f32, four_bit=True),
    Case(bf16, f32, four_bit=True),
    Case(bf16, f32, four_bit=True, autocast=True),
    Case(bf16, bf16, config=(("lora_bias", True),)),
    Case(bf16, bf16, config=(("r", 70),)),
]


def rounded(model: Any, case: Case) -> Any:
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(case.adapter)
    return model


def siblings_of(case: Case) -> Any:
    base = "nf4" if case.four_bit else "dense"
    return rounded(test_siblings.build(dtype=case.x, base=base, **dict(case.config)), case)


def mlp_of(case: Case) -> Any:
    module: Any = test_mlp.llama_mlp(sizes=(K, H)).to(case.x)
    for name in ("gate_proj", "up_proj", "down_proj") if case.four_bit else ():
        setattr(module, name, baselines.linear_4bit(getattr(module, name), "nf4"))
    model = test_mlp.get_peft_model(
        nn.Sequential(module),
        test_mlp.LoraConfig(target_modules="all-linear", **{"r": 5} | dict(case.config)),
        autocast_adapter_dtype=False,
    )
    return rounded(model, case)


def call(model: Any, x: torch.Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", bf16) if autocast else contextlib.nullcontext():
        model(x)


@pytest.mark.parametrize("rows", [96, 40])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
@pytest.mark.parametrize("build", [siblings_of, mlp_of])
def test_block_asks_for_the_choices_of_its_layers(
    build: Any, case: Case, rows: int, asked: list[Problem]
) -> None:
    """40 rows are few for siblings, and for `cast_adapters`."""
    if case.four_bit:
        pytest.importorskip("bitsandbytes")
    stock = build(case)
    found: list[set[Problem]] = []
    for blocks in (True, False):
        model = fuse(copy.deepcopy(stock), blocks=blocks, cast_adapters=case.cast)
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(3)).to(case.x)
        asked.clear()
        call(model, x.requires_grad_(), case.autocast)
        found.append({*asked})
    assert found[0] == found[1] and found[0]
    if rows == 96 and not case.autocast:
        asked.clear()
        explain(model := fuse(copy.deepcopy(stock), cast_adapters=case.cast), x_dtype=case.x)
        of_blocks = {problem._replace(rows=0) for problem in asked}
        assert of_blocks == {problem._replace(rows=0) for problem in found[0]}, model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_gated_mlp_asks_for_the_choices_of_its_layers(
    dtype: torch.dtype, cls: Any, autocast: bool, asked: list[Problem]
) -> None:
    sizes = (K, H), (K, H), (H, K)
    mlp = LoRAGatedMLP(*(cls(*each, 5, dtype=dtype, lora_dtype=f32, bias=True) for each in sizes))
    x, found = torch.ones(96, K, dtype=dtype), []
    for hooked in (False, True):
        if hooked:
            mlp.gate.register_forward_hook(lambda *args: None)
        asked.clear()
        call(mlp, x.clone().requires_grad_(), autocast)
        found.append({*asked})
    assert found[0] == found[1] and found[0]
