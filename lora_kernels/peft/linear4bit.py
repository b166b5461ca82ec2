"""PEFT's layers over bitsandbytes' 4-bit linear. Imports bitsandbytes, so imported on demand."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit as BaseLinear4bit  # type: ignore[attr-defined]
from bitsandbytes.nn import Params4bit  # type: ignore[attr-defined]
from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from ..backends.library import is_on_gpu_path
from ..core.codes import Codes
from ..quantization.bitsandbytes import cached_weight
from .adalora import FusedSVD
from .base4bit import MergeLoss, quantized_weight, unreadable_4bit
from .linear import Fused
from .mergeable import unmergeable_reason
from .modules import original_forward


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's LoRA layer over bitsandbytes' 4-bit linear.

    merge_loss: the error of merging into a 4-bit weight, which `explain` prints. None if nothing
        is merged, or if the error is unknown, as with DoRA.
    """

    fits_blocks = True
    base_class, base_forward = BaseLinear4bit, original_forward(BaseLinear4bit)
    reads_codes = True
    merge_loss: MergeLoss | None = None

    def read_codes(self, weight: Any, x: Tensor) -> tuple[Codes, torch.dtype | None] | None:
        """Return the base's current codes and the base GEMM's dtype; None for unusual states."""
        base: Any = self._modules["base_layer"]
        if type(weight) is not Params4bit or not base.compute_type_is_set:
            return None
        state = weight.quant_state
        if type(state) is not QuantState or x.dtype is torch.float64:
            return None
        if not x.is_cpu or is_on_gpu_path("cpu"):
            return cached_weight(weight, state).codes, base.compute_dtype
        state_attributes = vars(state)  # bitsandbytes marks repacked weights here
        if state_attributes.get("packing_format_for_cpu") or "original_qshape" in state_attributes:
            return None
        if state.shape != (base.out_features, base.in_features):
            return None
        nested_state, nested = state.state2, state.nested
        codes = Codes(
            packed=weight,
            absmax=state.absmax,
            code=state.code,
            nested_absmax=nested_state.absmax if nested else None,
            nested_code=nested_state.code if nested else None,
            offset=state.offset if nested else None,
            blocksize=state.blocksize,
            nested_blocksize=nested_state.blocksize if nested else 1,
            quant_type=state.quant_type,
        )
        return codes, base.compute_dtype

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does, and measure the error that requantization introduces."""
        if (reason := unmergeable_reason(self)) is not None:
            raise ValueError(f"layer: got {self.layer_name}, {reason}")
        base, previous = self.get_base_layer(), set(self.merged_adapters)
        weight = base._parameters.get("weight")
        is_readable = weight is not None and unreadable_4bit(base, weight.device) is None
        base_weight = quantized_weight(base).dequantize(torch.float32) if is_readable else None
        super().merge(safe_merge, adapter_names)
        new_names = [name for name in self.merged_adapters if name not in previous]
        if not new_names:  # all were merged before
            return
        self.merge_loss = None
        if base_weight is None or any(name in self.lora_variant for name in new_names):
            return
        deltas: list[Tensor] = [self.get_delta_weight(name) for name in new_names]  # type: ignore[no-untyped-call]
        delta = torch.stack(deltas).float().sum(0)
        error = quantized_weight(base).dequantize(torch.float32) - base_weight - delta
        self.merge_loss = MergeLoss(
            float(error.norm() / (base_weight + delta).norm()), float(error.norm() / delta.norm())
        )

    def unmerge(self) -> None:
        super().unmerge()
        self.merge_loss = None


class FusedSVDLinear4bit(FusedSVD, SVDLinear4bit):
    """PEFT's AdaLoRA layer over bitsandbytes' 4-bit linear."""
