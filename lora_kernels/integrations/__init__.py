"""Hooks for the trainers and models of other libraries."""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ..core.device import install_command as _install_command

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_kernels.integrations needs transformers and PEFT: "
        f"{_install_command('finetune')} ({error})"
    ) from error

from .trainer import FuseCallback

if _find_spec("transformers.integrations.moe") is not None:  # transformers 5
    from . import experts as experts  # registers experts_implementation="lora_kernels"
    from .fp8 import packed_fp8 as packed_fp8
    from .mxfp4 import packed_mxfp4 as packed_mxfp4

if _TYPE_CHECKING:
    from .gguf import load_gguf as load_gguf


def __getattr__(name: str) -> object:
    """Import the loader of GGUF files at its first use, since few programs need it."""
    if name != "load_gguf":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not (_find_spec("transformers.quantizers.quantizer_gguf") and _find_spec("gguf")):
        raise ImportError(
            "load_gguf needs transformers 5.18 or newer, and gguf: pip install -U transformers gguf"
        )
    from .gguf import load_gguf

    return load_gguf


__all__ = ["FuseCallback"]
