"""Check that a file or folder can be written, before a command does any work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def unwritable_reason(path: Path, *, folder: bool = False) -> str | None:
    """Return why `path` cannot be written, or None if it can; leaves nothing behind.

    folder: `path` will be a folder, which may be there already; otherwise a file.

    >>> unwritable_reason(Path("/dev/null/report.json"))
    '/dev/null/report.json cannot be written: /dev/null is not a folder'
    """
    if not folder and path.is_dir():
        return f"{path} cannot be written: it is a folder, want a file"
    place = path if folder else path.parent
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            return f"{path} cannot be written: {place} is not a folder"
        # A file without a name: permission bits say nothing of a read-only or full disk.
        with tempfile.TemporaryFile(dir=place):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            return f"{path} cannot be written: Permission denied"
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return None
