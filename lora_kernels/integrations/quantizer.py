"""What the quantizers that load checkpoints packed have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer


@contextmanager
def quantizer_for(method: str, quantizer: Any) -> Iterator[None]:
    """Let `from_pretrained` make its quantizer of this `quant_method` by `quantizer`."""
    quantizers: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    original = quantizers[method]
    quantizers[method] = quantizer
    try:
        yield
    finally:
        quantizers[method] = original


class PackedQuantizer(HfQuantizer):
    """A mixin for one of transformers' quantizers. It asks for no GPU and saves no base model."""

    quantization_config: Any

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint's codes stay, since its config does not ask to decode them."""
        return bool(self.pre_quantized and not self.quantization_config.dequantize)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_packed:
            super().validate_environment(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        return None, {}

    def is_serializable(self, *_: Any) -> bool:
        return False
