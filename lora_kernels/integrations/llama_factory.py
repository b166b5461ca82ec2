"""LLaMA-Factory's kernel plugin (v1). In its YAML:

    kernel_config:
      name: lora_kernels

LLaMA-Factory imports only the plugins that it carries, so this module starts it, alone or below
torchrun:

    python -m lora_kernels.integrations.llama_factory sft config.yaml
    torchrun --nproc-per-node 2 -m lora_kernels.integrations.llama_factory sft config.yaml
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin

from ..peft import fuse
from .trainer import report_at_first_forward

NAME = "lora_kernels"


@KernelPlugin(NAME).register()  # type: ignore[untyped-decorator]
def apply(model: Any, include_kernels: str | bool | None = None) -> Any:
    """Fuse the LoRA layers of the model, and return it.

    LLaMA-Factory calls this after it has added the adapters. A line on the layers is printed at the
    model's first forward, when LLaMA-Factory has wrapped it.

    Args:
        model: a PEFT model.
        include_kernels: None, or a comma-separated list of what else `fuse` takes: "linears",
            "loss". True or "auto" stand for nothing else.

    Raises:
        ValueError: the model has no LoRA layers; `include_kernels` names something else.
    """
    given = include_kernels if isinstance(include_kernels, str) else "auto"
    names = {name.strip() for name in given.split(",")} - {"auto"}
    if unknown := sorted(names - {"linears", "loss"}):
        raise ValueError(f"include_kernels: got {unknown[0]!r}, want 'linears', 'loss' or both")
    fuse(model, linears="linears" in names, loss="loss" in names)
    report_at_first_forward(model)
    return model


if __name__ == "__main__":
    from llamafactory.v1.launcher import main

    main()
