"""Fused kernels for LoRA: W·x + s·B(A·x) in single passes, as ops and drop-in layers."""

__version__ = "0.1.0"

from .choice.choose import backend
from .core import reference
from .functional import (
    dora_norm,
    dropout_mask,
    lora_experts_linear,
    lora_linear,
    multi_lora_linear,
)
from .head import lora_linear_cross_entropy, lora_linear_log_probs
from .qualification import qualify

__all__ = [
    "__version__",
    "backend",
    "dora_norm",
    "dropout_mask",
    "lora_experts_linear",
    "lora_linear",
    "lora_linear_cross_entropy",
    "lora_linear_log_probs",
    "multi_lora_linear",
    "qualify",
    "reference",
]
