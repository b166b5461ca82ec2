"""gpt-oss in a checkpoint like OpenAI's, with random weights, and a run that trains it.

`python -m tests.support.gpt_oss WAY FOLDER TOKENS STEPS` prints what `run` returns.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lora_kernels.integrations import packed_mxfp4
from lora_kernels.peft import fuse

# `packed_mxfp4` and `fuse`; the same without `fuse`; PEFT over the decoded model.
WAYS = ("fused", "packed", "decoded")
# Of gpt-oss-20b, but for the vocabulary, whose 201,088 rows are no part of a layer.
WIDTHS = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two layers of 8 experts.
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROJECTIONS = ("gate_up_proj", "down_proj")


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> int:
    """Write a gpt-oss of random weights as OpenAI does, and return the bytes of its tensors.

    The experts' parameters [E, K, N] are `*_blocks` [E, N, K/32, 16] and `*_scales` [E, N, K/32].
    """
    config = GptOssConfig(**sizes, architectures=["GptOssForCausalLM"], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = GptOssForCausalLM(config).state_dict()
    state = {}
    for name, like in shapes.items():
        if not name.endswith(PROJECTIONS):
            values = torch.randn(like.shape, generator=generator).mul_(like.shape[-1] ** -0.5)
            if like.dim() == 1:  # norms and biases
                values = values.add_(float("norm" in name))
            state[name] = values.to(dtype)
            continue
        E, K, N = like.shape
        blocks = torch.randint(256, (E, N, K // 32, 16), generator=generator, dtype=torch.uint8)
        # Elements have an rms of 3, and the weights one of about K^-0.5.
        middle = 127 - round(torch.tensor(9.0 * K).log2().item() / 2)
        scales = torch.randint(middle - 1, middle + 2, (E, N, K // 32), generator=generator)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales.to(torch.uint8)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    text = json.dumps(config.to_dict() | {"quantization_config": quantization})
    (folder / "config.json").write_text(text)
    return sum(t.nbytes for t in state.values())


def adapted(base: Any, r: int = 8) -> Any:
    """The model with adapters on the attention and on the experts."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    parameters = [f"mlp.experts.{name}" for name in PROJECTIONS]
    return get_peft_model(
        base, LoraConfig(r=r, target_modules=targets, target_parameters=parameters)
    )


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Append the most bytes that the process has written inside the context, above those before.

    They are anonymous pages, which files that are mapped do not add to.
    """
    before, peak, is_over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    found: list[int] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()
        found.append(max(peak[0], anonymous()) - before)


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def run(way: str, folder: Path, tokens: int, steps: int) -> dict[str, float]:
    """Load and train in one way, and return peaks of bytes and the median seconds a step."""
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()  # starts the thread pools
    with peak_memory() as training:
        with peak_memory() as loading, nullcontext() if way == "decoded" else packed_mxfp4():
            base = AutoModelForCausalLM.from_pretrained(folder)
        model = adapted(base)
        model = (fuse(model) if way == "fused" else model).train()
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        seconds = []
        for seed in range(steps):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, 256, (1, tokens), generator=generator)
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return {
        "loading": loading[0],
        "training": training[0],
        "seconds": statistics.median(seconds[1:] or seconds),
        "loss": float(loss),
    }


if __name__ == "__main__":
    way, folder, tokens, steps = sys.argv[1:]
    print(json.dumps(run(way, Path(folder), int(tokens), int(steps))))
