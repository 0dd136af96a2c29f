"""Who may open a chdb folder, and where the one who has it serves it to others."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import ClassVar

BRIDGE_USER = "bridge"
"""The user in the URL of a bridge."""
OWNED = (
    "another process owns the embedded database",
    "stop the other process or point RENDER_PLATFORM_CLICKHOUSE_DSN at a server",
)
"""What Unavailable says, and its remedy."""


class FolderLock:
    """The right to open a chdb folder: an flock on `<folder>.lock`, which ends with its process at the latest.

    Its owner may leave in `<folder>.url` where it serves the folder to others. chdb opens one folder a process, so
    the lock is the process's as well: all that use the folder in it share the lock, and the last one lets go.
    """

    _owned: ClassVar[dict[Path, FolderLock]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._descriptor, self._users = folder, descriptor, 0

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Release what is returned, once. None where another process has it; OSError where the file cannot be made."""
        with cls._guard:
            lock = cls._owned.get(folder) or cls._take(folder)
            if lock is not None:
                lock._users += 1
            return lock

    @classmethod
    def _take(cls, folder: Path) -> FolderLock | None:
        descriptor = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            cls.url_file(folder).unlink(missing_ok=True)  # of an owner that was killed: nobody may go there now
        except BlockingIOError:  # another process owns it
            os.close(descriptor)
            return None
        except BaseException:  # whatever else it was: the file is let go of, and the error goes on
            os.close(descriptor)
            raise
        lock = cls._owned[folder] = cls(folder, descriptor)
        return lock

    @staticmethod
    def url_file(folder: Path) -> Path:
        """Where the owner leaves the URL at which it serves the folder, password included."""
        return folder.with_name(f"{folder.name}.url")

    def release(self) -> None:
        with self._guard:
            self._users -= 1
            if not self._users:
                del self._owned[self._folder]
                os.close(self._descriptor)
