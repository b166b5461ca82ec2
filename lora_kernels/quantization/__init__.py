"""4-bit weights in bitsandbytes' format."""

from .weight4bit import Weight4bit, quantize_4bit

__all__ = ["Weight4bit", "quantize_4bit"]
