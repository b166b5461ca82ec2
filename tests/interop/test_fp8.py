"""FP8 checkpoints of transformers, trained packed on a CPU as PEFT trains them decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.quantizers import auto

pytest.importorskip("transformers.core_model_loading")
from lora_kernels.integrations import packed_fp8
from lora_kernels.peft import explain, fuse
from lora_kernels.peft.explain_rows import KERNELS
from lora_kernels.quantization.tensor import QuantizedTensor
from tests.support.assertions import assert_as_exact, assert_bitwise_equal, assert_close_derived
from tests.support.peft_models import in_float64, loss_and_gradients, randomize

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MOE = SIZES | {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
BLOCK = 64
IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(2))


def write_checkpoint(folder: Path, config: PreTrainedConfig, has_blocks: bool = True) -> Path:
    """Write a model of random weights whose linear layers are in FP8."""
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2 or "embed" in name or "lm_head" in name:
            state[name] = tensor.clone()
            continue
        N, K = tensor.shape[-2:]
        shape = (-(-N // BLOCK), -(-K // BLOCK)) if has_blocks else ()
        scale = 0.5 + torch.rand((*tensor.shape[:-2], *shape))
        state[name] = (tensor * 8).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale / 8
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK] if has_blocks else None,
        "modules_to_not_convert": ["lm_head"],
    }
    text = json.dumps(config.to_dict() | {"quantization_config": quantization})
    (folder / "config.json").write_text(text)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["blocks", "a tensor"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("fp8"), LlamaConfig(**SIZES), has_blocks=request.param
    )


def load(folder: Path, **options: Any) -> Any:
    with packed_fp8():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_decoded(folder: Path, dtype: torch.dtype) -> Any:
    """As transformers decodes it, by its own code."""
    block = AutoConfig.from_pretrained(folder).quantization_config["weight_block_size"]
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(base: Any, seed: int) -> Any:
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    randomize(model, seed=seed)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_checkpoint_has_the_bits_of_the_decoded_one(
    checkpoint: Path, dtype: torch.dtype
) -> None:
    known = auto.AUTO_QUANTIZER_MAPPING["fp8"]
    packed = load(checkpoint, dtype=dtype)
    assert auto.AUTO_QUANTIZER_MAPPING["fp8"] is known
    decoded = load_decoded(checkpoint, dtype)
    wanted = dict(decoded.named_parameters())
    count = 0
    for name, got in packed.named_parameters():
        assert not isinstance(got, QuantizedTensor) or not got.requires_grad
        count += isinstance(got, QuantizedTensor)
        assert_bitwise_equal(got + 0, wanted.pop(name))
    assert count == 14 and not wanted
    assert_close_derived(packed(IDS).logits, decoded(IDS).logits, layers=8)


def test_packed_checkpoint_trains_as_peft_over_the_decoded_one(checkpoint: Path) -> None:
    seeds = range(4)
    peft = [adapted(load_decoded(checkpoint, torch.bfloat16), seed) for seed in seeds]
    refs = [loss_and_gradients(in_float64(model), IDS) for model in peft]
    packed = [adapted(load(checkpoint), seed) for seed in seeds]
    wanted = [loss_and_gradients(model, IDS) for model in peft]
    assert len(refs[0]) == 21  # 20 matrices, and the loss
    assert_as_exact([loss_and_gradients(model, IDS) for model in packed], refs, wanted)
    for model in packed:
        fuse(model)
        rows = explain(model).rows
        assert len(rows) == 10 and {row.state for row in rows} == {KERNELS}
    assert_as_exact([loss_and_gradients(model, IDS) for model in packed], refs, wanted)


def test_base_is_not_saved_and_the_adapter_is(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(load(checkpoint), 0)
    with pytest.raises(ValueError, match="not serializable"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_config_that_asks_to_decode_decodes(checkpoint: Path) -> None:
    with packed_fp8():
        model = load_decoded(checkpoint, torch.bfloat16)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_experts_without_a_gpu_are_refused_before_their_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = write_checkpoint(tmp_path, Qwen3MoeConfig(**MOE))
    with pytest.raises(NotImplementedError, match=r"mlp\.experts: got FP8Experts"):
        load(folder)
