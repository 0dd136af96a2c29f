"""A disk under the library's own FolderObjects: what was not synced may be gone, or half there, after the power went.

A file's bytes and a folder's names each exist twice: as programs see them, and as they are on the platter. `fsync`
makes the second like the first. When the power goes, each change that was not synced has come to the platter or not,
by itself, in any order; of bytes a beginning may have.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from render_platform import objects
from render_platform.objects import FolderObjects
from tests.simulation.world import World


class File:
    def __init__(self, number: int) -> None:
        self.data, self.synced, self.modified_us, self.number = b"", b"", 0, number

    def settle(self, rng: random.Random) -> None:
        if self.data != self.synced:
            kept = rng.choice((self.synced, self.data[: rng.randrange(len(self.data) + 1)], self.data))
            self.data = self.synced = kept


Names = dict[str, File | None]
"""A folder's names; None is a folder."""
_ABSENT = object()


class Disk:
    def __init__(self, world: World) -> None:
        self.world = world
        self._seen: dict[str, Names] = {"": {}}
        self._platter: dict[str, Names] = {"": {}}
        self._numbers = 0
        self.on_change: Callable[[str, bytes], None] = lambda _path, _data: None
        """Told of each name that stands for other bytes than before."""

    def path(self, name: str) -> DiskPath:
        return DiskPath(self, name)

    def files(self, folder: str) -> dict[str, bytes]:
        """Everything below a folder, as programs see it, by its name in there."""
        found = {}
        for at in sorted(self._seen):
            if at == folder or at.startswith(f"{folder}/"):
                for name, file in self._seen[at].items():
                    if file is not None:
                        found[f"{at}/{name}"[len(folder) + 1 :]] = file.data
        return found

    def remove(self, path: str) -> None:
        """As an operator does, and nothing strikes."""
        folder, _, name = path.rpartition("/")
        del self._seen[folder][name]

    def sync_all(self) -> None:
        for folder, names in self._seen.items():
            self._platter[folder] = dict(names)
            for file in names.values():
                if file is not None:
                    file.synced = file.data

    def lose_power(self, rng: random.Random) -> None:
        """What is on the platter is what there is."""
        left: dict[str, Names] = {}
        self._settle("", left, rng)
        self._seen = left
        self._platter = {folder: dict(names) for folder, names in left.items()}

    def _settle(self, folder: str, left: dict[str, Names], rng: random.Random) -> None:
        seen, platter = self._seen.get(folder, {}), self._platter.get(folder, {})
        kept: Names = {}
        for name in sorted(seen.keys() | platter.keys()):
            new, old = seen.get(name, _ABSENT), platter.get(name, _ABSENT)
            chosen = new if new is old or rng.random() < 0.5 else old
            if chosen is not _ABSENT:
                kept[name] = cast("File | None", chosen)
        left[folder] = kept
        for name, file in kept.items():
            if file is None:
                self._settle(f"{folder}/{name}", left, rng)
            else:
                file.settle(rng)

    # What programs call.

    def find(self, path: str) -> File | None:
        """The file at a path; FileNotFoundError where nothing is, None for a folder."""
        folder, _, name = path.rpartition("/")
        names = self._seen.get(folder)
        if path and (names is None or name not in names):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return names[name] if path and names is not None else None

    def exists(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return not path or name in self._seen.get(folder, ())

    def cat_file(self, path: str) -> bytes:
        """fsspec's name for it."""
        self.world.read(f"read {path}", _failed)
        file = self.find(path)
        if file is None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return file.data

    def change(self, what: str, do: Callable[[], None]) -> None:
        self.world.write(what, do, _failed)

    def make_folder(self, path: str) -> None:
        folder, _, name = path.rpartition("/")

        def do() -> None:
            if not self.exists(path):
                self._seen[folder][name] = None
                self._seen[path] = {}

        self.change(f"mkdir {path}", do)

    def make_file(self, path: str, *, exclusive: bool) -> File:
        folder, _, name = path.rpartition("/")

        def do() -> None:
            if exclusive:
                self._require_absent(path)
            if not self.exists(path):
                self._numbers += 1
                self._seen[folder][name] = File(self._numbers)

        self.change(f"open {path}", do)
        return cast("File", self.find(path))

    def link(self, source: str, path: str) -> None:
        """A second name for a file, where nothing stands."""
        folder, _, name = path.rpartition("/")

        def do() -> None:
            self._require_absent(path)
            file = cast("File", self.find(source))
            self._seen[folder][name] = file
            self.on_change(path, file.data)

        self.change(f"link {path}", do)

    def _require_absent(self, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def unname(self, path: str) -> None:
        folder, _, name = path.rpartition("/")

        def do() -> None:
            self.find(path)
            del self._seen[folder][name]

        self.change(f"unlink {path}", do)

    def rename(self, path: str, target: str) -> None:
        """Both names change in one step."""
        (folder, _, name), (into, _, new) = path.rpartition("/"), target.rpartition("/")

        def do() -> None:
            file = cast("File", self.find(path))
            del self._seen[folder][name]
            self._seen[into][new] = file
            self.on_change(target, file.data)

        self.change(f"rename {target}", do)

    def sync_folder(self, path: str) -> None:
        self.change(f"fsync {path}/", lambda: self._platter.__setitem__(path, dict(self._seen[path])))

    def list(self, path: str) -> list[tuple[str, bool]]:
        """(name, whether it is a folder), in any order."""
        self.world.read(f"list {path}", _failed)
        found = [(name, file is None) for name, file in sorted(self._seen[path].items())]
        self.world.chance.shuffle(found)
        return found


def _failed(_kind: str) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class OpenFile:
    """An open file; also its own file descriptor."""

    def __init__(self, disk: Disk, path: str, file: File) -> None:
        self._disk, self._path, self._file, self._holds = disk, path, file, False

    def write(self, data: bytes) -> None:
        def do() -> None:
            self._file.data += data
            self._file.modified_us = self._disk.world.us

        self._disk.change(f"write {self._path}, {len(data)} bytes", do)

    def flush(self) -> None:
        pass

    def fileno(self) -> OpenFile:
        return self

    def sync(self) -> None:
        self._disk.change(f"fsync {self._path}", lambda: setattr(self._file, "synced", self._file.data))

    def lock(self) -> None:
        self._holds = True
        self._disk.world.locked += 1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._holds:
            self._disk.world.locked -= 1


class DiskPath:
    """As much of pathlib.Path as FolderObjects uses."""

    __slots__ = ("disk", "text")

    def __init__(self, disk: Disk, text: str) -> None:
        self.disk, self.text = disk, text

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiskPath) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __truediv__(self, name: str) -> DiskPath:
        return DiskPath(self.disk, f"{self.text}/{name}".rstrip("/"))

    @property
    def parent(self) -> DiskPath:
        return DiskPath(self.disk, self.text.rpartition("/")[0])

    @property
    def parents(self) -> Iterator[DiskPath]:
        at = self
        while at.text:
            at = at.parent
            yield at

    def relative_to(self, root: DiskPath) -> str:
        return self.text[len(root.text) + 1 :]

    def exists(self) -> bool:
        return self.disk.exists(self.text)

    def is_dir(self) -> bool:
        return self.exists() and self.disk.find(self.text) is None

    def mkdir(self, mode: int = 0, exist_ok: bool = False) -> None:
        self.disk.make_folder(self.text)

    def open(self, mode: str) -> OpenFile:
        return OpenFile(self.disk, self.text, self.disk.make_file(self.text, exclusive=mode == "xb"))

    def read_bytes(self) -> bytes:
        return self.disk.cat_file(self.text)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists():
            self.disk.unname(self.text)

    def rename(self, target: DiskPath) -> None:
        self.disk.rename(self.text, target.text)

    def lstat(self) -> SimpleNamespace:
        self.disk.world.read(f"stat {self.text}", _failed)
        file = self.disk.find(self.text)
        if file is None:
            return SimpleNamespace(st_mode=0o040755)
        ns = file.modified_us * 1_000
        return SimpleNamespace(st_mode=0o100644, st_size=len(file.data), st_mtime_ns=ns, st_ino=file.number)


class DiskFolder(FolderObjects):
    """The library's store in a folder of the disk; it reads through fsspec, here from the disk."""

    def __init__(self, disk: Disk, name: str, ids: Any) -> None:
        super().__init__(cast("Any", disk.path(name)), ids)
        self._files = disk


# The operating system's calls in render_platform.objects. What is no path of a Disk goes to the machine.


def _link(source: Any, target: Any) -> None:
    if not isinstance(target, DiskPath):
        os.link(source, target)
        return
    target.disk.link(source.text, target.text)


def _fsync(handle: Any) -> None:
    if isinstance(handle, OpenFile):
        handle.sync()
    elif isinstance(handle, DiskPath):
        handle.disk.sync_folder(handle.text)
    else:
        os.fsync(handle)


def _open(path: Any, flags: int) -> Any:
    return path if isinstance(path, DiskPath) else os.open(path, flags)


def _close(handle: Any) -> None:
    if not isinstance(handle, DiskPath):
        os.close(handle)


@contextmanager
def _scandir(path: DiskPath) -> Iterator[list[Any]]:
    yield [
        SimpleNamespace(name=name, path=f"{path}/{name}", is_dir=lambda follow_symlinks, found=folder: found)
        for name, folder in path.disk.list(path.text)
    ]


def _flock(file: Any, _operation: int) -> None:
    file.lock()


@contextmanager
def installed() -> Iterator[None]:
    """FolderObjects on the simulated disk."""
    calls = {"link": _link, "fsync": _fsync, "open": _open, "close": _close, "scandir": _scandir}
    flags = {"O_RDONLY": os.O_RDONLY, "O_DIRECTORY": os.O_DIRECTORY}
    with (
        mock.patch.object(objects, "os", SimpleNamespace(**calls, **flags)),
        mock.patch.object(objects, "fcntl", SimpleNamespace(flock=_flock, LOCK_EX=0)),
    ):
        yield
