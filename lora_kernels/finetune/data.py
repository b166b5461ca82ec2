"""Read files of data."""

from __future__ import annotations

import codecs
from pathlib import Path

from .checkpoints import translate_errors
from .errors import UsageError


def read_file(file: Path, argument: str, wanted: str) -> bytes:
    """Return the file's bytes without a byte order mark. Raises UsageError if it is missing."""
    if file.is_dir():
        raise UsageError(f"{argument}: {file} is a folder; give the files in it, {wanted}")
    if not file.is_file():
        raise UsageError(f"{argument}: there is no file {file}; give {wanted}")
    return file.read_bytes().removeprefix(codecs.BOM_UTF8)


def decode_text(raw: bytes, file: Path, argument: str) -> str:
    """Return the file's text. Raises UsageError if it is not UTF-8."""
    with translate_errors(f"{argument}: {file} is not UTF-8 text; convert it", UnicodeDecodeError):
        return raw.decode("utf-8")


def is_json(file: Path) -> bool:
    """Return True for JSON lines. Files with any other suffix are plain text."""
    return file.suffix in (".jsonl", ".json")
