"""Objects: what the CAS and the log are kept in, and their form as a durable folder.

`ObjectStore` is the contract that each implementation keeps, and that tests/conformance runs on each; `check_store`
asks a store for it at start-up. A folder's reads go through fsspec. Its writes and listings are our own: fsspec's local
files are neither synced nor created once, and its listings leave out what they cannot read.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Protocol

import fsspec

from render_platform.clock import Ids, SystemIds
from render_platform.errors import Missing, SequencerStopped, Unavailable, UsageError

_SCRATCH = ".tmp"
SCRATCH = f"{_SCRATCH}/"
LOCK = f"{_SCRATCH}/lock"
PROBES = f"{_SCRATCH}/probe/"
"""Where the start-up probe writes. `names` and `stats` give what is in `.tmp/` only to those who ask for it."""


class Stat(Protocol):
    """What a store knows of an object without reading it."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def modified_us(self) -> int:
        """When it was written, µs UTC by the store's clock, in whole seconds or finer."""

    @property
    def version(self) -> str:
        """Which writing of the name it is: another one after each write. Empty in listings of some stores."""


class ObjectStore(Protocol):
    """Names are relative, with `/`. Every method raises Unavailable where the store cannot answer.

    For any number of threads at once.
    """

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

    def stats(self, prefix: str = "") -> Iterator[tuple[str, Stat]]:
        """What `names` gives, each with its size and time."""

    def stat(self, path: str) -> Stat:
        """Missing where nothing stands."""

    def delete(self, path: str, seen: Stat) -> bool:
        """Remove the writing that `seen`, from `stat`, describes. False: it was written again since, is gone, or may
        not be removed yet (a retention); what stands is untouched."""


@dataclass(frozen=True, slots=True)
class FileStat:
    size: int
    modified_us: int
    version: str


class FolderObjects:
    """A local folder. `create` = scratch file, fsync, link, fsync of the folder; `replace` = lock, compare, rename.

    `delete` takes the same lock: it never removes what `replace` writes at that moment.
    """

    def __init__(self, root: Path, ids: Ids | None = None) -> None:
        self._root = root
        self._ids = ids or SystemIds()
        self._files = fsspec.filesystem("file", skip_instance_cache=True)
        self._durable: set[Path] = set()
        """Folders whose names were synced by this process, up to the root's."""

    def create(self, path: str, data: bytes) -> bool:
        target = self._root / path
        with _as_unavailable(target):
            self._make_folders(target.parent)
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
            if current != expected or (expected is None and not self.create(path, data)):
                raise SequencerStopped(f"{path} was changed by another writer", "run the command again")
            if expected is None:
                return
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
                path = folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    if path != self._root / _SCRATCH:
                        yield from self._walk(path)
                else:
                    yield str(path.relative_to(self._root))

    def stats(self, prefix: str = "") -> Iterator[tuple[str, FileStat]]:
        for name in self.names(prefix):
            try:
                yield name, self.stat(name)
            except Missing:
                continue  # removed since it was listed

    def stat(self, path: str) -> FileStat:
        with _as_unavailable(self._root / path):
            try:
                found = (self._root / path).lstat()
            except (FileNotFoundError, NotADirectoryError):
                raise Missing(path) from None
        if S_ISDIR(found.st_mode):
            raise Missing(path)
        return FileStat(found.st_size, found.st_mtime_ns // 1_000, f"{found.st_ino}-{found.st_mtime_ns}")

    def delete(self, path: str, seen: Stat) -> bool:
        target = self._root / path
        with _as_unavailable(target), self._lock():
            try:
                if self.stat(path).version != seen.version:
                    return False
            except Missing:
                return False
            # Crash before the folder's fsync: the object may stand again, whole. It is deleted another time.
            target.unlink()
            sync_folder(target.parent)
        return True

    def _make_folders(self, folder: Path) -> None:
        """Durable up to the root. A folder that stands is synced too, once: who made it may have died before that."""
        if folder in self._durable and folder.exists():
            return
        make_folders(folder)
        for one in (folder, *folder.parents):
            sync_folder(one.parent)
            self._durable.add(one)
            if one == self._root:
                break

    def _write_scratch(self, data: bytes) -> Path:
        folder = self._root / _SCRATCH
        self._make_folders(folder)
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
        self._make_folders(self._root / _SCRATCH)
        with (self._root / _SCRATCH / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_store(objects: ObjectStore, ids: Ids, name: str) -> None:
    """The start-up probe: UsageError where the store breaks a promise that the evidence stands on.

    Writes one small object below `.tmp/probe/` and removes it. `name` is what messages call the store.
    """
    path = f"{PROBES}{ids.random(8).hex()}"
    try:
        broken = _broken_promise(objects, path)
    except Missing:
        broken = "does not read back what was written"
    with suppress(Missing):
        objects.delete(path, objects.stat(path))  # a locked one stays until its retention ends: it is in nobody's way
    if broken:
        raise UsageError(
            f"{name} cannot keep evidence: it {broken}",
            "use a local folder, or an S3 store that honours If-None-Match and If-Match (AWS S3, R2, SeaweedFS)",
        )


def _broken_promise(objects: ObjectStore, path: str) -> str:
    """What the store does not keep; empty where it keeps all. Missing where it loses what it took."""
    if not objects.create(path, b"first"):
        return "says that an object stands where none does"
    if objects.read(path) != b"first":
        return "does not read back what was written"
    if path not in objects.names(PROBES):
        return "lists what stood before, not what stands"
    if objects.create(path, b"second") or objects.read(path) != b"first":
        return "lets a second writer overwrite an object"
    try:
        objects.replace(path, b"second", b"other")
        return "replaces an object without comparing it first"
    except SequencerStopped:
        pass
    objects.replace(path, b"third!", b"first")
    good = objects.read(path) == b"third!" and objects.stat(path).size == 6
    return "" if good else "does not read back what was written"


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
