"""PEFT's layers of a model that transformers has loaded in 4 bits; imported where there is one."""

from __future__ import annotations

from peft.tuners.adalora.bnb import SVDLinear4bit
from peft.tuners.lora.bnb import Linear4bit

from .adalora import FusedSVD
from .linear import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's LoRA layer over bitsandbytes' 4-bit linear."""


class FusedSVDLinear4bit(FusedSVD, SVDLinear4bit):
    """PEFT's AdaLoRA layer over it."""
