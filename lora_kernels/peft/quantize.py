"""Quantize a model in memory to bitsandbytes' 4 bits, as transformers loads it for QLoRA."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..layers import quantize_experts
from ..layers.experts import unsupported_reason
from .modules import is_linear4bit


def quantize(
    base: nn.Module, quant_type: str, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace linear layers by bitsandbytes' `Linear4bit`, and quantize experts, in place.

    The output embedding or classifier is kept. The format is that of transformers' models for
    QLoRA: blocks of 64 with double quantization.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    head = cast(Any, base).get_output_embeddings() or classifier(base)
    codes: Any = {"requires_grad": False, "quant_type": quant_type}
    how = {"compute_dtype": compute_dtype, "quant_type": quant_type, "device": "meta"}
    for name, linear in list(base.named_modules()):
        if type(linear) is not nn.Linear or linear is head:
            continue
        bias = linear.bias
        layer = Linear4bit(linear.in_features, linear.out_features, bias=bias is not None, **how)  # type: ignore[no-untyped-call]
        layer.weight = Params4bit(linear.weight.detach(), module=layer, **codes)
        layer.bias = bias
        base.set_submodule(name, layer.to(device))
    if any(unsupported_reason(module) is None for module in base.modules()):
        quantize_experts(base, quant_type)
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    rewrite_codes(base, False)


def classifier(model: nn.Module) -> nn.Module | None:
    """Return the head of transformers' `...ForSequenceClassification`, or None."""
    return getattr(model, "classifier", getattr(model, "score", None))


def rewrite_codes(model: nn.Module, allowed: bool) -> nn.Module:
    """Set whether bitsandbytes may repack codes for its CPU kernel, and return the model.

    By default bitsandbytes repacks codes permanently, and rounds their scales, in the first forward
    in eval mode without gradients. This happens on processors with AVX-512 BF16.
    """
    if layers := linears_4bit(model):
        from bitsandbytes.functional import has_avx512bf16

        for layer in layers:
            able: bool = has_avx512bf16()  # type: ignore[no-untyped-call]
            layer.support_avx512bf16_for_cpu = allowed and able
    return model


def linears_4bit(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if is_linear4bit(m)]
