"""FP8 checkpoints (DeepSeek, Qwen3 FP8) in their own codes, on CPUs and on any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from ..peft.packed import keep_packed
from .quantizer import PackedQuantizer, quantizer_for


@contextmanager
def packed_fp8() -> Iterator[None]:
    """Load FP8 checkpoints packed inside the context, to train adapters on them.

    `from_pretrained` then calls `keep_packed(model, exact_x=True)` on the loaded model: each
    linear layer is an `nn.Linear` whose weight is a `QuantizedTensor` with the codes of the file.
    Without the context transformers decodes the model on CPUs and on GPUs without FP8, to twice
    its size in bfloat16, and on others rounds x to FP8 in each layer. Inside it x is not rounded,
    and results are those of the decoded weights.

    A config that asks to decode (`dequantize=True`) still decodes. Adapters are saved as usual;
    `save_pretrained` of the base model raises ValueError. The context applies to the whole
    process.

    Raises:
        NotImplementedError: in `from_pretrained`, if the model has experts or grouped layers in
            FP8, whose forward needs a GPU with FP8 (sm_89 or newer), and there is none.

    >>> from transformers import AutoModelForCausalLM
    >>> from lora_kernels.integrations import packed_fp8
    >>> with packed_fp8():  # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B-FP8")
    """
    with quantizer_for("fp8", PackedFp8Quantizer):
        yield


class PackedFp8Quantizer(PackedQuantizer, FineGrainedFP8HfQuantizer):
    """transformers' quantizer, with `keep_packed` at the end."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        if not self.is_packed or _has_fp8_gpu():
            return
        for name, module in model.named_modules():
            if type(module) is not FP8Linear and hasattr(module, "activation_scheme"):
                raise NotImplementedError(
                    f"{name}: got {type(module).__name__}, whose forward needs a GPU with FP8. "
                    "Outside of packed_fp8() transformers decodes the checkpoint"
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(  # type: ignore[no-untyped-call]
            model, **kwargs
        )
        return keep_packed(model, exact_x=True) if self.is_packed else model


def _has_fp8_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
