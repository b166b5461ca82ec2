"""Fused kernels for LoRA: W·x + s·B(A·x) in single passes, as ops and drop-in layers."""

__version__ = "0.1.0"

from .functional import lora_linear
from .reference import dropout_mask
from .select import backend

__all__ = ["__version__", "backend", "dropout_mask", "lora_linear"]
