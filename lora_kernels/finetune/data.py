"""Read files of data."""

from __future__ import annotations

from pathlib import Path

from . import UsageError
from .checkpoints import translate_errors


def read_file(file: Path, argument: str, wanted: str) -> bytes:
    """Return the file's bytes. Raises UsageError that names the argument if it is missing."""
    if not file.is_file():
        raise UsageError(f"{argument}: there is no file {file}; give {wanted}")
    return file.read_bytes()


def decode_text(raw: bytes, file: Path, argument: str) -> str:
    """Return the file's text. Raises UsageError if it is not UTF-8."""
    with translate_errors(f"{argument}: {file} is not UTF-8 text; convert it", UnicodeDecodeError):
        return raw.decode("utf-8")
