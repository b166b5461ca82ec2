"""Silence for libraries that talk beside a command."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """Disable the warnings and progress bars of transformers, PEFT and bitsandbytes."""
    from transformers.utils import logging as transformers_logging

    # PEFT imports bitsandbytes, which reports an optional package that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers warn of each other
