"""Quantizers in the place of those that transformers uses for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers import auto


@contextmanager
def quantizer_for(method: str, quantizer: type[Any]) -> Iterator[None]:
    """Let `from_pretrained` use `quantizer` for checkpoints of this `quant_method`."""
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    original = quantizers[method]
    quantizers[method] = quantizer
    try:
        yield
    finally:
        quantizers[method] = original
