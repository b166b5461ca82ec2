"""Layers with adapters, on `lora_kernels.lora_linear`."""

from .attention import LoRAAttention
from .linear import LoRALinear
from .quantized import MergedLayer, QLoRALinear
from .state import (
    LoRAParameterCount,
    count_lora_parameters,
    load_lora_weights,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_lora_weights,
)

__all__ = [
    "LoRAAttention",
    "LoRALinear",
    "LoRAParameterCount",
    "MergedLayer",
    "QLoRALinear",
    "count_lora_parameters",
    "load_lora_weights",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "save_lora_weights",
]
