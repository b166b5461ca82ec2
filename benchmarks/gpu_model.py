"""Training steps and tokens of a whole model, fused beside PEFT's, in turns in one process.

    python -m benchmarks.gpu_model --json FILE [--device cuda] [--seconds 5] [--tiny]

The model is a Llama of Llama 3.2 1B's layers with random weights, so that nothing is downloaded:
bf16, and NF4 by bitsandbytes if that is installed; LoRA of rank 16 on all linear layers, adapters
in float32 under autocast to bf16, which are PEFT's and Trainer's defaults. The largest step holds
about 17 GB of PEFT's activations; a row that does not fit says so. A step is forward and
backward of a batch. A token is one of `generate`, greedy, after a prompt of 128.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.bench import command, timing
from lora_kernels.bench.results import Facts, Row, environment
from lora_kernels.bench.table import Suite

RANK, PROMPT, TOKENS = 16, 128, 16
BOTH = "PEFT's beside ours"
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


class Step(NamedTuple):
    """A batch of a training step, and whether it is checkpointed."""

    batch: int
    length: int
    is_checkpointed: bool = False


STEPS = (Step(1, 512), Step(4, 2048), Step(4, 2048, is_checkpointed=True))
TINY_STEPS = (Step(1, 8), Step(2, 8, is_checkpointed=True))


def build(base: str, sizes: dict[str, int], device: str) -> Any:
    """Build PEFT's model over a base of "bf16" or "nf4"."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=4096, eos_token_id=None)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if base == "nf4":
        from lora_kernels.finetune.model import quantize

        quantize(model, "nf4", torch.bfloat16, torch.device(device))
    config_of_peft = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(model, config_of_peft)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.01)
    return model


def step_of(model: Any, step: Step) -> Callable[[], object]:
    """Return the call of a training step."""
    base, ids = model.get_base_model(), torch.zeros(step.batch, step.length, dtype=torch.int64)
    ids = ids.to(base.device)
    adapters = [p for p in model.parameters() if p.requires_grad]

    def call() -> object:
        model.train()
        model.enable_input_require_grads()
        if step.is_checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast(base.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, adapters)
        base.gradient_checkpointing_disable()
        return grads

    return call


def generate(model: Any) -> object:
    """Generate TOKENS tokens."""
    model.eval()
    ids = torch.zeros(1, PROMPT, dtype=torch.int64, device=model.get_base_model().device)
    mask, counts = torch.ones_like(ids), {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **counts)


def rows(args: argparse.Namespace, facts: Facts) -> Iterator[Row]:
    """Yield the rows of each base: its steps, and its tokens."""
    from lora_kernels.peft import fuse

    sizes, steps = (TINY, TINY_STEPS) if args.tiny else (SIZES, STEPS)
    for base in ("bf16", "nf4"):
        if base == "nf4" and find_spec("bitsandbytes") is None:
            print("no NF4: bitsandbytes is not installed", flush=True)
            continue
        stock = build(base, sizes, args.device)
        models = {"ours": fuse(copy.deepcopy(stock)), "peft": stock}
        calls = {
            (f"step{', checkpointed' * step.is_checkpointed}", step.batch * step.length): {
                name: step_of(model, step) for name, model in models.items()
            }
            for step in steps
        }
        calls["decoding", 1] = {name: partial(generate, model) for name, model in models.items()}
        for (mode, M), pair in calls.items():
            key: dict[str, Any] = {"K": sizes["hidden_size"], "N": sizes["vocab_size"], "R": RANK}
            row = Row(what="model", dtype=base, M=M, mode=mode, **key)
            try:
                times = timing.interleave(
                    pair, seconds=args.seconds, device=args.device, min_rounds=5
                )
            except torch.OutOfMemoryError:
                row.misses = {BOTH: "out of memory"}  # the other rows may fit
                torch.cuda.empty_cache()
            else:
                of_token = mode == "decoding"
                row.seconds = {n: per_token(t) if of_token else t for n, t in times.items()}
            yield row
        del stock, models, calls


def per_token(times: timing.Times) -> timing.Times:
    """Return the seconds of one token of those that a call generates."""
    *seconds, rounds = astuple(times)
    return timing.Times(*(second / TOKENS for second in seconds), rounds)


SUITE = Suite(
    kind="model",
    option="",
    unused="",
    rows=rows,
    provenance=lambda args: environment(args.device),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(csv=None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--tiny", action="store_true", help="a model for trying the command")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu_model: no GPU that this torch can use", file=sys.stderr)
        return 2
    command.measure(SUITE, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
