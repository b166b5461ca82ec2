"""GGUF files of random models, in any type of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

# Where the blocks of each type have their scales in float16, and what they are with a mean of 0.
_ONE = ((0, 1.0),)
HALVES: dict[str, tuple[tuple[int, float], ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), _ONE),
    **{"Q4_1": (*_ONE, (2, -7.5)), "Q5_1": (*_ONE, (2, -15.5))},
    **{"Q4_K": (*_ONE, (2, 7.5)), "Q5_K": (*_ONE, (2, 15.5)), "Q2_K": ((80, 1.0), (82, 1.5))},
    **{"Q3_K": ((108, 1.0),), "Q6_K": ((208, 1.0),), "TQ2_0": ((64, 1.0),), "MXFP4": ()},
}
DENSE: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
WIDTH = 256  # a block of the K-quants
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": LlamaConfig(**SIZES),  # llama.cpp writes it as a Llama
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, head_dim=64, sliding_window=16),
    "gemma3": Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, head_dim=64, sliding_window=16),
    "phi3": Phi3Config(**SIZES),
    "lfm2": Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}
ARCHITECTURES = {"mistral": "llama"}
MIXTURE = Qwen3MoeConfig(
    **SIZES, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH
)


def hybrid() -> Any:
    """Qwen3.5's layers: linear attention, whose rows llama.cpp moves, and full attention."""
    return AutoConfig.for_model(
        "qwen3_5_text",
        **SIZES,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        full_attention_interval=2,
        layer_types=["linear_attention", "full_attention"],
        tie_word_embeddings=True,
    )


def random_blocks(kind: str, N: int, K: int, rms: float, rng: np.random.Generator) -> np.ndarray:
    """Return rows of random blocks, uint8 [N, bytes of a row], which decode to this rms."""
    quant = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[quant]
    blocks = rng.integers(0, 256, (N * K // elements, nbytes), dtype=np.uint8)
    if kind == "MXFP4":
        # The codes' rms is 5.1, and a scale is 2^(byte - 128).
        blocks[:, 0] = 128 + round(np.log2(rms / 5.1)) + rng.integers(-1, 2, len(blocks))
    for factor in (1.0, None):
        if factor is None:
            decoded = gguf.dequantize(blocks[:4096], quant)
            factor = rms / np.sqrt(np.square(decoded, dtype=np.float64).mean())
        spread = factor * rng.uniform(0.8, 1.2, len(blocks))
        for at, value in HALVES[kind]:
            halves = (spread * value).astype(np.float16)
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(N, -1)


def llama3_factors(factor: float, head: int = 64, base: float = 10000.0) -> np.ndarray:
    """Return Llama 3's factors of rotary frequencies, as llama.cpp computes them: [head / 2]."""
    frequencies = base ** -(np.arange(0, head, 2) / head)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / factor + smooth)
    long = np.where(wavelengths > 8192, factor, between)
    return np.where(wavelengths < 8192 / 4, 1.0, long).astype(np.float32)


def write(
    file: Path,
    config: PreTrainedConfig,
    architecture: str,
    kind: str = "Q4_K",
    *,
    embedding: str = "Q8_0",
    words: Any = None,
    name: str = "tiny",
    seed: int = 0,
    change: Any = None,
) -> Path:
    """Write a random model of a configuration, its linear weights in blocks of one type.

    Args:
        architecture: llama.cpp's name.
        kind: of the linear weights, such as "Q4_K" or "F32".
        embedding: the type of the embeddings.
        words: a tokenizer of bytes, of tests/finetune/tiny.py; None: made-up tokens.
        change: a function of the writer and of the tensors {name: (array, type)}, called before
            they are written.
    """
    rng = np.random.default_rng(seed)
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_sizes(writer, config)
    _add_words(writer, config, words)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for key, t in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "experts" in key:
            block = key.partition(".experts")[0].rpartition("layers.")[2].partition(".")[0]
            parts = ("down",) if "down" in key else ("gate", "up")
            E, N, K = t.shape[0], t.shape[1] // len(parts), t.shape[2]
            for part in parts:
                rows = random_blocks(kind, E * N, K, K**-0.5, rng).reshape(E, N, -1)
                tensors[f"blk.{block}.ffn_{part}_exps.weight"] = rows, kind
            continue
        at = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if key.endswith("dt_bias"):
            at = f"blk.{key.split('.')[2]}.ssm_dt.bias"
        assert at is not None, key
        if t.dim() == 3:  # a convolution's, which llama.cpp stores without its channel
            kernel = rng.standard_normal((t.shape[0], t.shape[2]))
            tensors[at] = kernel.astype(np.float32), "F32"
            continue
        if t.dim() == 1:
            start = 0.0 if key.endswith("bias") else -1.0 if key.endswith("A_log") else 1.0
            noise = start + 0.1 * rng.standard_normal(len(t))
            tensors[at] = noise.astype(np.float32), "F32"
            continue
        stored = kind if key in linear and "lm_head" not in key else embedding
        # The model's own scale, and more of the head's so that logits differ.
        rms = t.shape[1] ** -0.5
        if stored in DENSE:
            tensors[at] = (rms * rng.standard_normal(t.shape)).astype(DENSE[stored]), stored
        else:
            tensors[at] = random_blocks(stored, *t.shape, rms=rms, rng=rng), stored
    if change is not None:
        change(writer, tensors)
    for at, (array, stored) in tensors.items():
        quant = gguf.GGMLQuantizationType[stored]
        writer.add_tensor(at, array, raw_dtype=None if stored in DENSE else quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    kv = config.num_key_value_heads
    if config.model_type == "lfm2":
        kv = [kv if kind == "full_attention" else 0 for kind in config.layer_types]
        writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or config.norm_eps)
    writer.add_rope_freq_base(10000.0)
    if config.model_type == "qwen3_5_text":
        value_heads, value_size = config.linear_num_value_heads, config.linear_value_head_dim
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(value_heads)
        writer.add_ssm_inner_size(value_heads * value_size)
        writer.add_full_attention_interval(config.full_attention_interval)
        writer.add_rope_dimension_sections([3, 3, 2, 0])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    share = 0.25 if config.model_type == "qwen3_5_text" else 1.0
    writer.add_rope_dimension_count(int(share * head))
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _add_words(writer: Any, config: Any, words: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    if words is None:
        tokens = [f"t{i}" for i in range(config.vocab_size)]
        special = {0, 1, 2}
    else:
        tokens = words.convert_ids_to_tokens(range(len(words)))
        special = set(words.all_special_ids)
        writer.add_chat_template(words.chat_template)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges(["a b"])
    for kind, number in (("eos", 1 if words else 2), ("bos", 1), ("pad", 0), ("unk", 0)):
        getattr(writer, f"add_{kind}_token_id")(number)
