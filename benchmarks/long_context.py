"""Peaks of training steps at long contexts: `python -m benchmarks.long_context` writes
results/long_context.json.

A random Llama of four layers at the widths of Llama 3.2 1B, with 32,000 words, float32, r = 16 on
all linear layers of the blocks: peaks at 8,192 tokens, each in a process of its own, with gradient
checkpointing and without, and times of a step at 2,048 tokens, in turns. On two cores it takes half
an hour and 14 GB.

- "peft": PEFT's model.
- "trl": the same with TRL's head, which computes no whole logits.
- "ours": `fuse(model, loss=True)`; "tiles": with `mlp_tile_rows="auto"` too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.bench import process_memory, results
from lora_kernels.core.quiet import silence_libraries

FILE = Path(__file__).with_name("results") / "long_context.json"
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
}
NAMES = ("peft", "trl", "ours", "tiles")
TOKENS = (8192,)
TIMED, ROUNDS = 2048, 3


def build(name: str, is_checkpointed: bool) -> Callable[[Tensor], Tensor]:
    """Return a training step's forward and backward, which return the loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_kernels.peft import fuse

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    if name == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    model.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if name in ("ours", "tiles"):
        fuse(model, loss=True, mlp_tile_rows="auto" if name == "tiles" else None)
    more = {"fused_lm_head": True} if name == "trl" else {}

    def step(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return loss.detach()

    return step


def ids_of(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab_size"], (1, tokens), generator=generator)


def peak_of(name: str, tokens: int, is_checkpointed: bool) -> tuple[int, float]:
    """Return the peak bytes of a step above the model's, and the loss."""
    silence_libraries()
    step, cpu = build(name, is_checkpointed), torch.device("cpu")
    step(ids_of(16))  # what is imported and compiled at the first call
    before = process_memory.reset_peak(cpu)
    if before is None:
        raise SystemExit("this system does not report its peak memory")
    loss = step(ids_of(tokens))
    return process_memory.peak(cpu) - before, float(loss)


def times_of() -> dict[str, float]:
    """Return median seconds of a step of each model, in turns after one step each."""
    silence_libraries()
    steps, seconds = {name: build(name, False) for name in NAMES}, dict[str, list[float]]()
    ids = ids_of(TIMED)
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(ids)
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def in_process(call: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description="Measure training steps at long contexts.")
    parser.add_argument("part", choices=("peaks", "times"), nargs="?", help="alone, keep the other")
    part = parser.parse_args().part
    found: dict[str, Any] = json.loads(FILE.read_text()) if part and FILE.exists() else {}
    found["provenance"] = results.provenance(["float32"], "cpu")
    if part != "times":
        found["peaks"] = []
        for tokens, is_checkpointed in itertools.product(TOKENS, (False, True)):
            row: dict[str, Any] = {"tokens": tokens, "checkpointed": is_checkpointed}
            peaks = {name: in_process(peak_of, name, tokens, is_checkpointed) for name in NAMES}
            row["peak"] = {name: peak for name, (peak, _) in peaks.items()}
            row["loss"] = {name: loss for name, (_, loss) in peaks.items()}
            print(row, flush=True)
            found["peaks"].append(row)
    if part != "peaks":
        found["times"] = {"tokens": TIMED, "seconds": in_process(times_of)}
        print(found["times"])
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
