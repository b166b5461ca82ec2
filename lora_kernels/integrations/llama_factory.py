"""LLaMA-Factory's kernel plugin (v1). In its YAML:

    kernel_config:
      name: lora_kernels

LLaMA-Factory imports only its own plugins, so this module starts LLaMA-Factory, with or without
torchrun:

    python -m lora_kernels.integrations.llama_factory sft config.yaml
    torchrun --nproc-per-node 2 -m lora_kernels.integrations.llama_factory sft config.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin

from ..peft import fuse
from .trainer import report_at_first_forward

NAME = "lora_kernels"


class LoRAKernel:
    """Fuse the LoRA layers of a model.

    LLaMA-Factory uses the object after adding the adapters. Version 0.9.5 calls it, later versions
    call `apply`. A summary of the layers is printed at the model's first forward, after
    LLaMA-Factory has wrapped the model.
    """

    def __call__(
        self, model: Any, include_kernels: str | bool | None = None, require_logits: bool = True
    ) -> Any:
        """Fuse the LoRA layers of the model, and return it.

        Args:
            model: a PEFT model.
            include_kernels: None, or a comma-separated list of arguments of `fuse` to enable:
                "linears", "loss". True or "auto" enable none.
            require_logits: whether the trainer reads the logits, which "loss" does not compute.
                LLaMA-Factory's trainers do. Version 0.9.5 does not pass this argument.

        Raises:
            ValueError: the model has no LoRA layers; `include_kernels` names something else, or
                "loss" where the logits are read.
        """
        text = include_kernels if isinstance(include_kernels, str) else "auto"
        names = {name.strip() for name in text.split(",")} - {"auto"}
        if unknown := sorted(names - {"linears", "loss"}):
            raise ValueError(f"include_kernels: got {unknown[0]!r}, want 'linears', 'loss' or both")
        if "loss" in names and require_logits:
            raise ValueError(
                "include_kernels: got 'loss', which computes no logits, want none beside a trainer "
                "that computes its loss from logits, as LLaMA-Factory's do"
            )
        fuse(model, linears="linears" in names, loss="loss" in names)
        report_at_first_forward(model)
        return model

    def apply(
        self, model: Any, config: Mapping[str, Any] | None = None, require_logits: bool = True
    ) -> Any:
        """Call the object with the `include_kernels` of the configuration."""
        return self(model, (config or {}).get("include_kernels"), require_logits)


KernelPlugin(NAME).register()(LoRAKernel())


if __name__ == "__main__":
    from llamafactory.v1.launcher import main

    main()
