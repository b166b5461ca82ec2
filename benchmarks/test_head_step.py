"""SmolLM2's training step with LoRA on `lm_head`: its own loss, and `fuse(model, loss=True)`.

    pytest benchmarks/test_head_step.py --benchmark-columns=min,median,iqr

4 × 512 tokens in float32, vocabulary 49,152. Both models have the same weights and adapters; the
test checks that their losses agree. Needs SmolLM2, which `make demo` installs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_kernels.finetune.demo import demo_model
from lora_kernels.finetune.model import load_base
from lora_kernels.peft import fuse


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    base = load_base(demo_model(), torch.float32, torch.device("cpu"))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"])
    stock = get_peft_model(base, config)
    fused = fuse(copy.deepcopy(stock))
    return {
        "PEFT": stock,
        "fuse(model)": fused,
        "fuse(model, loss=True)": fuse(copy.deepcopy(stock), loss=True),
    }


@pytest.mark.parametrize("name", ["PEFT", "fuse(model)", "fuse(model, loss=True)"])
def test_step(benchmark: Any, models: dict[str, Any], name: str) -> None:
    ids = torch.randint(0, 49152, (4, 512), generator=torch.Generator().manual_seed(0))

    model = models[name].train()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return float(loss)

    loss = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    with torch.no_grad():
        want = float(models["PEFT"](input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(want, rel=1e-5)
