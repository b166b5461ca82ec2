"""Hooks for the trainers of other libraries."""

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_kernels.integrations needs transformers and PEFT: "
        f"pip install 'lora-kernels[finetune]' ({error})"
    ) from error

from .trainer import FuseCallback

__all__ = ["FuseCallback"]
