"""axolotl's plugin. In its YAML:

plugins:
  - lora_kernels.integrations.axolotl.FusePlugin
lora_kernels_loss: true  # as `fuse`'s `loss`

The other keys are lora_kernels_linears, lora_kernels_qualify and lora_kernels_exact_merge.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..peft import fuse
from .trainer import LayerReport, VerdictLog

# axolotl's own LoRA kernels, which replace the same forwards as `fuse`. axolotl enables unset ones
# while it validates the configuration.
OWN_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class FuseArgs(BaseModel):
    """The keys that the plugin adds to axolotl's configuration: `fuse`'s arguments."""

    lora_kernels_linears: bool = False
    lora_kernels_loss: bool = False
    lora_kernels_qualify: Literal["cached", "now", "off"] = "cached"
    lora_kernels_exact_merge: Literal["host", "device"] | None = None
    lora_kernels_mlp_tile_rows: int | Literal["auto"] | None = None


class FusePlugin(BasePlugin):  # type: ignore[misc]
    """Fuse the LoRA layers of the model that axolotl trains.

    `fuse` runs after axolotl has added or loaded the adapter. A summary of the layers is printed
    when training starts, as by `FuseCallback`.

    Raises:
        ValueError: one of axolotl's own LoRA kernels is on in the configuration, or the model has
            no LoRA layers.
    """

    def register(self, cfg: Any) -> None:
        """Disable axolotl's own kernels in the user's configuration, before it is validated."""
        for name in OWN_KERNELS:
            if cfg.get(name):
                raise ValueError(f"{name}: got true, want false beside lora_kernels' plugin")
            cfg[name] = False

    def get_input_args(self) -> str:
        return f"{FuseArgs.__module__}.{FuseArgs.__name__}"

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        arguments = FuseArgs.model_validate(
            {name: cfg.get(name) for name in FuseArgs.model_fields if cfg.get(name) is not None}
        )
        fuse(
            model,
            arguments.lora_kernels_linears,
            arguments.lora_kernels_loss,
            arguments.lora_kernels_qualify,
            exact_merge=arguments.lora_kernels_exact_merge,
            mlp_tile_rows=arguments.lora_kernels_mlp_tile_rows,
        )

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [VerdictLog(), LayerReport()]
