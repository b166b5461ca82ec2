"""Keep two runs out of one folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from .errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Hold a run's folder for this process, as a context manager.

    The lock is advisory, on the folder itself, so that no file is left behind. The kernel releases
    it when the process ends in any way. Nothing is locked on Windows, on file systems that lock no
    folders (some NFS), and in processes of torchrun other than the first.

    On entry the folder is locked if it exists; `acquire` makes it first.

    Raises UsageError if another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        if self.folder.is_dir():
            self.acquire()
        return self

    def acquire(self) -> None:
        """Make the folder, and lock it unless it is locked already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None or self._descriptor is not None or os.environ.get("RANK", "0") != "0":
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"out: another run is writing to {self.folder}; wait for its end, or give another "
                "folder"
            ) from None
        except OSError:  # the file system cannot lock a folder
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
