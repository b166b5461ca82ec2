"""QLoRA on a mixture of experts with real weights and prose: SmolLM2's MLPs, upcycled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lora_kernels.cli import main
from lora_kernels.finetune.demo import demo_model
from lora_kernels.finetune.merge import dequantize
from lora_kernels.finetune.model import load_base, load_tokenizer
from tests.finetune.tiny import metrics

LAYERS, EXPERTS, TOP_K = 6, 4, 2
PROSE = Path(__file__).parents[2] / "LICENSE"


def upcycle(dense: Any) -> MixtralForCausalLM:
    """Return a mixture whose experts are copies of the first layers' MLPs, each with some noise."""
    old = dense.config
    names = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads"
    names += " rms_norm_eps max_position_embeddings bos_token_id eos_token_id pad_token_id"
    settings = {name: getattr(old, name) for name in names.split()}
    settings |= {"num_hidden_layers": LAYERS, "tie_word_embeddings": True}
    settings |= {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    model: Any = MixtralForCausalLM(MixtralConfig(**settings))
    weights = dense.state_dict()
    model.load_state_dict({n: t for n, t in weights.items() if ".mlp." not in n}, strict=False)
    with torch.no_grad():
        for layer, of in zip(model.model.layers, dense.model.layers, strict=False):
            gate_up = torch.cat([of.mlp.gate_proj.weight, of.mlp.up_proj.weight])
            for stack, weight in (
                (layer.mlp.experts.gate_up_proj, gate_up),
                (layer.mlp.experts.down_proj, of.mlp.down_proj.weight),
            ):
                stack.copy_(weight + 0.01 * weight.std() * torch.randn_like(stack))
            layer.mlp.gate.weight.normal_(std=0.02)
    return model


@pytest.mark.proof
def test_finetune_of_upcycled_experts_learns_prose(tmp_path: Path) -> None:
    torch.manual_seed(0)
    demo, cpu = demo_model(), torch.device("cpu")
    folder, out = tmp_path / "mixture", tmp_path / "run"
    upcycle(dequantize(load_base(demo, torch.float32, cpu))).save_pretrained(folder)
    load_tokenizer(demo).save_pretrained(folder)
    argv = ["finetune", "--model", str(folder), "--data", str(PROSE), "--out", str(out)]
    argv += ["--target-modules", "q", "v", "gate", "up", "down", "--dropout", "0", "--rank", "8"]
    argv += [
        "--quant",
        "nf4",
        "--batch",
        "2",
        "--steps",
        "12",
        "--lr",
        "1e-3",
        "--warmup-steps",
        "0",
    ]
    assert main(argv) == 0
    losses = [line["loss"] for line in metrics(out)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
