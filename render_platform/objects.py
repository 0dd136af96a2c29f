"""Objects on a durable folder: what the CAS and the log are kept in.

`ObjectStore` is the contract that each implementation keeps, and that tests/conformance runs on each. Reads go through
fsspec. Writes and listings are our own: fsspec's local files are neither synced nor created once, and its listings
leave out what they cannot read.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import fsspec

from render_platform.clock import Ids, SystemIds
from render_platform.errors import Missing, SequencerStopped, Unavailable

_SCRATCH = ".tmp"


class ObjectStore(Protocol):
    """Names are relative, with `/`. Every method raises Unavailable where the store cannot answer."""

    def create(self, path: str, data: bytes) -> bool:
        """Create once. True: the bytes are durable under their name. False: something already stands there, and is
        untouched. Of two writers at once exactly one gets True. A crash leaves the whole object or none."""

    def read(self, path: str) -> bytes:
        """All bytes; Missing where nothing stands."""

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        """Put `data` where `expected` stands now (None: nothing), atomically and durably; SequencerStopped where
        something else stands."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """Every object's name below a prefix that ends in `/` (or is empty), sorted."""

    def move_aside(self, path: str) -> str:
        """Take a bad object out of its place, keeping its bytes; gives its new name."""


class FolderObjects:
    """A local folder. `create` = scratch file, fsync, link, fsync of the folder; `replace` = lock, compare, rename."""

    def __init__(self, root: Path, ids: Ids | None = None) -> None:
        self._root = root
        self._ids = ids or SystemIds()
        self._files = fsspec.filesystem("file", skip_instance_cache=True)

    def create(self, path: str, data: bytes) -> bool:
        target = self._root / path
        with _as_unavailable(target):
            make_folders(target.parent)
            scratch = self._write_scratch(data)
            try:
                # Crash before the link: a scratch file that nothing names. After it: the whole object stands.
                os.link(scratch, target)
                created = True
            except FileExistsError:
                created = False
            finally:
                scratch.unlink()
            sync_folder(target.parent)  # for either answer: another writer may have died between its link and this
            return created

    def read(self, path: str) -> bytes:
        with _as_unavailable(self._root / path):
            try:
                data: bytes = self._files.cat_file(str(self._root / path))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise Missing(path) from None
            return data

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        target = self._root / path
        with _as_unavailable(target), self._lock():
            current = target.read_bytes() if target.exists() else None
            if current != expected:
                raise SequencerStopped(f"{path} was changed by another writer", "run the command again")
            make_folders(target.parent)
            # Crash before the rename: the old bytes stand. After it: the new ones do.
            self._write_scratch(data).rename(target)
            sync_folder(target.parent)

    def names(self, prefix: str = "") -> Iterator[str]:
        with _as_unavailable(self._root / prefix):
            found = sorted(self._walk(self._root / prefix)) if self._root.exists() else []
        yield from found

    def _walk(self, folder: Path) -> Iterator[str]:
        """Every file below; an error for a folder that cannot be read: unknown is not empty."""
        if folder != self._root and not folder.is_dir():
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    if path != self._root / _SCRATCH:
                        yield from self._walk(path)
                else:
                    yield str(path.relative_to(self._root))

    def move_aside(self, path: str) -> str:
        name = f"quarantine/{path.replace('/', '-')}-{self._ids.random(4).hex()}"
        with _as_unavailable(self._root / path):
            make_folders((self._root / name).parent)
            (self._root / path).rename(self._root / name)
            sync_folder((self._root / name).parent)
            sync_folder((self._root / path).parent)
        return name

    def _write_scratch(self, data: bytes) -> Path:
        folder = self._root / _SCRATCH
        make_folders(folder)
        scratch = folder / self._ids.random(8).hex()
        try:
            with scratch.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        return scratch

    @contextmanager
    def _lock(self) -> Iterator[None]:
        make_folders(self._root / _SCRATCH)
        with (self._root / _SCRATCH / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def make_folders(folder: Path, mode: int = 0o777) -> None:
    """Every missing folder, each durable in the one that holds it. OSError where one cannot be made."""
    for missing in reversed([parent for parent in (folder, *folder.parents) if not parent.exists()]):
        missing.mkdir(mode=mode, exist_ok=True)
        sync_folder(missing.parent)


def sync_folder(folder: Path) -> None:
    """The folder's names are durable on return."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _as_unavailable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{path}: {error.strerror or error}", "check that the folder exists, is writable and has space"
        ) from error
