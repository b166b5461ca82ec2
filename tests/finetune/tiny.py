"""A tokenizer of bytes with a chat template, and models that fit it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from lora_kernels.finetune.checkpoints import newest_checkpoint

TEMPLATE = (
    "{% for m in messages %}<im>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<im>", "<end>"]


def tokenizer(template: str | None = TEMPLATE, merges: Iterable[tuple[str, str]] = ()) -> Any:
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    merges = list(merges)
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]:
        vocab.setdefault(token, len(vocab))
    core = Tokenizer(models.BPE(vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
    )
    made.chat_template = template
    return made


def wake(model: nn.Module) -> nn.Module:
    """At the usual start of 0.02 a width of 64 passes next to nothing on."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | Conv1D):
                fan_in = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
                layer.weight.normal_(std=fan_in**-0.5)
    return model


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    settings = {**sizes, **words, "max_position_embeddings": 256}
    return wake(LlamaForCausalLM(LlamaConfig(**settings | changes)))


def gpt2(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    rest = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    settings = {**sizes, **rest, "bos_token_id": None, "eos_token_id": 1}
    return wake(GPT2LMHeadModel(GPT2Config(**settings | changes)))


def bert(hidden: int = 64, inner: int = 128, layers: int = 2, positions: int = 64) -> Any:
    """An encoder without a head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    config = BertConfig(**sizes, max_position_embeddings=positions, pad_token_id=0)
    return BertForSequenceClassification(config).bert


def chat(*contents: str) -> dict[str, Any]:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


def squares(count: int) -> list[Any]:
    return [chat(f"{i} squared?", f"It is {i * i}.") for i in range(count)]


def write_lines(file: Path, records: Iterable[Any]) -> Path:
    """JSON lines; a str is a line as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_gguf(file: Path, kind: str = "Q8_0", **changes: Any) -> Path:
    """A Llama of two layers as a GGUF file, with a tokenizer of bytes and a template.

    kind: the type of its linear weights.
    """
    from tests.support.gguf_files import write

    sizes = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes | {"max_position_embeddings": 256} | changes)
    return write(file, config, "llama", kind, words=tokenizer(merges=[("a", "b")]))


def save_model(folder: Path, model: Any, words: Any = None) -> Path:
    """A model's folder, with a tokenizer."""
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def metrics(out: Path) -> list[dict[str, Any]]:
    """A run's training steps, from Trainer's log in its newest checkpoint or beside it."""
    folder = newest_checkpoint(out) or out
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copy the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
