"""PEFT's layers on `lora_kernels.lora_linear`: `fuse`, `unfuse`, `explain`, `check`, …"""

from ..core.device import install_command as _install_command

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lora_kernels.peft needs PEFT: {_install_command('peft')} ({error})"
    ) from error

from .adalora import FusedSVDLinear
from .adapter_state import adapter_weights
from .check import Check, CheckRow, check
from .embedding import FusedEmbedding
from .explain_rows import Row
from .frozen import StreamedLinear
from .linear import FusedLinear
from .merge import merged_weights
from .mixed_batch import row_adapters
from .packed import keep_packed
from .report import Explanation, explain
from .swap import fuse, unfuse

__all__ = [
    "Check",
    "CheckRow",
    "Explanation",
    "FusedEmbedding",
    "FusedLinear",
    "FusedSVDLinear",
    "Row",
    "StreamedLinear",
    "adapter_weights",
    "check",
    "explain",
    "fuse",
    "keep_packed",
    "merged_weights",
    "row_adapters",
    "unfuse",
]
