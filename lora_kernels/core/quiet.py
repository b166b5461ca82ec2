"""Silence for libraries that talk beside a command."""

from __future__ import annotations

import logging
import warnings


def silence_imports() -> None:
    """Disable the warnings of libraries that PEFT and accelerate import; call before they do.

    bitsandbytes reports an optional package that it lacks, DeepSpeed on stdout that there is no
    GPU.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets the level at its import


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def silence_libraries() -> None:
    """Disable the warnings and progress bars of transformers and PEFT."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers warn of each other
