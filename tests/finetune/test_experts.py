"""Recipes on a mixture of experts: which parameters are adapted, and a run with a 4-bit base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from lora_kernels.cli import main
from lora_kernels.finetune import UsageError
from lora_kernels.finetune.presets import add_lora_layers
from lora_kernels.layers.experts import is_quantized
from lora_kernels.peft import explain
from lora_kernels.peft.experts import FusedParamWrapper
from lora_kernels.peft.explain_rows import KERNELS
from tests.finetune.tiny import metrics, save_model, squares, wake, write_lines


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    words = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, **heads, **words, **experts, max_position_embeddings=256)
    return wake(MixtralForCausalLM(config))


def adapted(model: Any) -> set[str]:
    """The parameters of the first layer that have an adapter."""
    first = (m for n, m in model.named_modules() if "layers.0." in n)
    return {m.parameter_name for m in first if isinstance(m, FusedParamWrapper)}


@pytest.mark.parametrize(
    ("targets", "parameters"),
    [
        (("q", "up", "down"), {"gate_up_proj", "down_proj"}),
        (("down",), {"down_proj"}),
        (("gate",), {"gate_up_proj"}),
        ("all-linear", {"gate_up_proj", "down_proj"}),
        (("q", "v"), set()),
    ],
)
def test_add_lora_layers_to_experts_adapts_the_projections_of_the_roles(
    targets: Any, parameters: set[str]
) -> None:
    model = add_lora_layers(mixtral(), "chat", targets=targets, dropout=0.0)
    assert adapted(model) == parameters
    rows = [row for row in explain(model).rows if not row.layer.endswith(".gate")]  # the router
    assert all(row.state == KERNELS for row in rows)


def test_add_lora_layers_to_experts_warns_of_a_preset_s_dropout_and_refuses_one_that_is_given() -> (
    None
):
    with pytest.warns(UserWarning, match="PEFT adapts experts without dropout: 0 is used"):
        model = add_lora_layers(mixtral(), "code")
    assert model.peft_config["default"].lora_dropout == 0.0
    with pytest.raises(UsageError, match=r"dropout: got 0\.1, want 0: PEFT adapts experts without"):
        add_lora_layers(mixtral(), "code", dropout=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PEFT")
        model = add_lora_layers(mixtral(), "chat")  # attention alone keeps its dropout
    assert model.peft_config["default"].lora_dropout == 0.05


def test_finetune_of_quantized_experts_trains_their_adapters(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", mixtral())
    data = write_lines(tmp_path / "data.jsonl", squares(8))
    out = tmp_path / "run"
    argv = ["finetune", "--model", str(base), "--data", str(data), "--out", str(out)]
    argv += ["--preset", "code", "--dropout", "0", "--rank", "4", "--quant", "nf4"]
    argv += ["--batch", "4", "--steps", "3", "--lr", "1e-2", "--warmup-steps", "0"]
    assert main(argv) == 0
    losses = [line["loss"] for line in metrics(out)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    trained = [t for name, t in adapter.items() if "experts" in name and "lora_B" in name]
    assert len(trained) == 4 and all(t.any() for t in trained)


def test_add_lora_layers_over_a_4bit_base_quantizes_the_experts(tmp_path: Path) -> None:
    from lora_kernels.finetune.model import load_base

    folder = save_model(tmp_path / "base", mixtral())
    base = load_base(folder, torch.float32, torch.device("cpu"), "fp4")
    model: Any = add_lora_layers(base, "code", dropout=0.0)
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    assert is_quantized(experts, "gate_up_proj") and is_quantized(experts, "down_proj")
    assert experts.parametrizations.down_proj[0].quant_state.quant_type == "fp4"
