"""PEFT's layers over bitsandbytes' 4-bit linear. Imports bitsandbytes, so imported on demand."""

from __future__ import annotations

import torch
from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from .adalora import FusedSVD
from .base4bit import MergeLoss, unreadable_4bit, weight4bit
from .linear import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's LoRA layer over bitsandbytes' 4-bit linear.

    merge_loss: the error of merging into a 4-bit weight, which `explain` prints. None if nothing
    is merged, or if the error is unknown, as with DoRA.
    """

    shares_x = True
    merge_loss: MergeLoss | None = None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does, and measure the error that requantization introduces."""
        base, known = self.get_base_layer(), set(self.merged_adapters)
        weight = base._parameters.get("weight")
        readable = weight is not None and unreadable_4bit(base, weight.device) is None
        before = weight4bit(base).dequantize(torch.float32) if readable else None
        super().merge(safe_merge, adapter_names)
        added = [name for name in self.merged_adapters if name not in known]
        if not added:  # they are merged already
            return
        self.merge_loss = None
        if before is None or any(name in self.lora_variant for name in added):
            return
        deltas: list[Tensor] = [self.get_delta_weight(name) for name in added]  # type: ignore[no-untyped-call]
        delta = torch.stack(deltas).float().sum(0)
        error = weight4bit(base).dequantize(torch.float32) - before - delta
        self.merge_loss = MergeLoss(
            float(error.norm() / (before + delta).norm()), float(error.norm() / delta.norm())
        )

    def unmerge(self) -> None:
        super().unmerge()
        self.merge_loss = None


class FusedSVDLinear4bit(FusedSVD, SVDLinear4bit):
    """PEFT's AdaLoRA layer over bitsandbytes' 4-bit linear."""
