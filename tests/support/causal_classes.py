"""Small models of transformers' classes of causal language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, MOST_PARAMETERS = 61, 15_000_000
# A number for each setting, by whichever name a configuration has it.
SIZES = {
    1: "n_group topk_group n_shared_experts",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    32: (
        "hidden_size d_model n_embd emb_dim embed_dim embedding_size out_hidden_size "
        "vision_output_dim projector_input_dim projector_output_dim"
    ),
    40: (
        "intermediate_size ffn_dim d_ff ffn_hidden_size n_inner inner_dim decoder_ffn_dim "
        "encoder_ffn_dim dim_ff"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_key_value_heads multi_query_group_num num_experts_per_tok "
        "num_experts_per_token depth "
        "linear_num_key_heads linear_num_value_heads num_ngram_heads"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads linear_num_heads num_experts num_local_experts n_routed_experts"
    ),
    8: (
        "head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim"
    ),
    16: "moe_intermediate_size shared_expert_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
}
LAYER_TYPES = "full_attention", "sliding_attention"
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
MULTIMODAL_ROPE = {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}}
# What else a model needs, by the beginning of its class's name.
MORE: dict[str, dict[str, Any]] = {
    name: settings
    for names, settings in (
        ("Bamba GraniteMoeHybrid", {"mamba_n_heads": 8}),
        ("CodeGen GPTJ", {"rotary_dim": 4}),
        ("CohereCompass", {"rope_parameters": dict.fromkeys(LAYER_TYPES, ROPE)}),
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]]}),
        ("Gemma3n", {"num_kv_shared_layers": 0}),
        ("Kolibri1_1", {"head_dim": 16, "index_num_heads": 2}),
        ("Lfm2Moe", {"layer_types": ["conv", "full_attention"]}),
        ("Mamba2", {"num_heads": 8}),
        ("Mistral4", {"head_dim": 16}),
        ("Qwen2VL Qwen2_5_VL", MULTIMODAL_ROPE),
        ("Qwen3Next Qwen3_5 Qwen3_5Moe", {"layer_types": ["linear_attention", "full_attention"]}),
        ("Reformer", {"is_decoder": True}),
        ("Xmod", {"default_language": "en_XX"}),
        ("Zamba", {"layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 16}),
        ("Zamba2", {"layers_block_type": ["linear_attention", "hybrid"]}),
        ("Zaya", {"num_experts_per_tok": 1}),
    )
    for name in names.split()
}


def causal_classes() -> list[str]:
    """Return the names of all classes of causal language models."""
    names = {name for name in dir(transformers) if name.endswith("ForCausalLM")}
    names |= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return sorted(n for n in names if not n.startswith("Auto") and hasattr(transformers, n))


def small_model(name: str) -> Any:
    """Return a model of the class in training, in float32 and without dropout."""
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    config = small_config(cls.config_class, MORE.get(_beginning(name), {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{name}: got {count:,} parameters, want at most {MOST_PARAMETERS:,}")
    model = cls(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in model.parameters():  # initial zeros would hide a gradient
            if not p.any():
                p.normal_(std=0.1)
    return model.float().train()


def _beginning(name: str) -> str:
    for word in ("ForCausalLM", "ForConditionalGeneration", "ModelWithLMHead"):
        name = name.removesuffix(word)
    return name


def small_config(cls: Any, more: dict[str, Any]) -> Any:
    """Return a configuration with the sizes above, and with no dropout."""
    known = vars(cls())
    sizes = {
        name: number for number, names in SIZES.items() for name in names.split() if name in known
    }
    if "kv_lora_rank" in known:  # its attention has as many heads for keys as for queries
        sizes["num_key_value_heads"] = 4
    parts = {
        name: small_config(type(value), more.get(name, {}))
        for name, value in known.items()
        if isinstance(value, PreTrainedConfig)
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    off = {name: 0.0 for name, value in known.items() if "drop" in name and type(value) is float}
    config = cls(**sizes | tokens | off | more | parts)
    config._attn_implementation, config.use_cache = "eager", False
    return config
