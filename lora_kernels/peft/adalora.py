"""PEFT's AdaLoRA layer with `lora_linear` as its forward: the scaled E is the rank gate.

PEFT still allocates the rank budget, masks E, adds the orthogonality loss and saves. This code
reads parameters and calls no layer.
"""

from __future__ import annotations

from peft.tuners.adalora.layer import SVDLinear

from .linear import Fused
from .read import read_svd_adapter


class FusedSVD(Fused):
    """The mix-in by which `fuse` overrides the forward of an AdaLoRA layer.

    y = x·Wᵀ + bias + Σ ((D(x)·Aᵀ) ⊙ E·s/(ranknum + 1e-5))·Bᵀ, with dropout, stacked adapters and
    dtypes as in `Fused`. E, and ranknum if PEFT trains it, get their gradients through the gate.
    """

    read_adapter = read_svd_adapter
    adapter_kwargs = ()


class FusedSVDLinear(FusedSVD, SVDLinear):
    """PEFT's AdaLoRA layer over `nn.Linear`, or over a base that is called as a module."""
