"""Fused kernels for LoRA: W·x + s·B(A·x) in single passes, as ops and drop-in layers."""

import os as _os
import sys as _sys
import typing as _typing

from .version import __version__

if _typing.TYPE_CHECKING:
    from .qualification import qualify

try:
    from .choice.choose import backend
    from .ops.dropout import dropout_mask
    from .ops.experts import lora_experts_linear
    from .ops.head import lora_linear_cross_entropy, lora_linear_log_probs
    from .ops.linear import lora_linear
    from .ops.multi import multi_lora_linear
    from .ops.norm import dora_norm
    from .oracle import reference
except KeyboardInterrupt:
    # The command line imports this package, and torch, before any code of its own runs.
    _words = _sys.orig_argv[1:3] or [""]
    if _words != ["-m", "lora_kernels"] and _os.path.basename(_words[0]) != "lora-kernels":
        raise
    print("\nlora-kernels: interrupted", file=_sys.stderr)
    raise SystemExit(130) from None

__all__ = [
    "__version__",
    "backend",
    "dora_norm",
    "dropout_mask",
    "lora_experts_linear",
    "lora_linear",
    "lora_linear_cross_entropy",
    "lora_linear_log_probs",
    "multi_lora_linear",
    "qualify",
    "reference",
]


if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        if name == "qualify":  # of GPUs alone
            from .qualification import qualify

            return qualify
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
