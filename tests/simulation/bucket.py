"""A bucket: the other kind of store. An answer may be lost, and listings may say what stood some time ago."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from render_platform.errors import Missing, SequencerStopped, Unavailable
from render_platform.objects import FileStat, Stat
from tests.simulation.world import World

LAG_US = 30_000_000


class Bucket:
    """An ObjectStore whose writes are conditional requests: durable once they are done, whatever their answer says."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name, self._version = world, name, 0
        self.objects: dict[str, tuple[bytes, FileStat]] = {}
        self.on_change: Callable[[str, bytes], None] = lambda _path, _data: None

    def create(self, path: str, data: bytes) -> bool:
        return self._write(f"create {path}", lambda: path not in self.objects and self._put(path, data))

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        def do() -> bool:
            standing = self.objects.get(path)
            same = (standing[0] if standing else None) == expected
            return same and self._put(path, data)

        if not self._write(f"replace {path}", do):
            raise SequencerStopped(f"{path} was changed by another writer", "run the command again")

    def _put(self, path: str, data: bytes) -> bool:
        self._version += 1
        self.objects[path] = data, FileStat(len(data), self._world.us, str(self._version))
        self.on_change(path, data)
        return True

    def _write(self, what: str, do: Callable[[], bool]) -> bool:
        return self._world.write(f"{self.name}: {what}", do, self._unanswered)

    def _unanswered(self, kind: str) -> Unavailable:
        return Unavailable(f"{self.name}: a request was {kind}", "try again")

    def read(self, path: str) -> bytes:
        self._world.read(f"{self.name}: read {path}", self._unanswered)
        if path not in self.objects:
            raise Missing(path)
        return self.objects[path][0]

    def names(self, prefix: str = "") -> Iterator[str]:
        self._world.read(f"{self.name}: list {prefix}", self._unanswered)
        yield from sorted(path for path in self.objects if path.startswith(prefix) and not self._is_new(path))

    def _is_new(self, path: str) -> bool:
        """Not listed yet. What relies on complete listings is asked only once everything is calm."""
        return not self._world.calm and self.objects[path][1].modified_us > self._world.us - LAG_US

    def stats(self, prefix: str = "") -> Iterator[tuple[str, FileStat]]:
        for path in list(self.names(prefix)):
            if path in self.objects:
                yield path, self.objects[path][1]

    def stat(self, path: str) -> FileStat:
        self._world.read(f"{self.name}: stat {path}", self._unanswered)
        if path not in self.objects:
            raise Missing(path)
        return self.objects[path][1]

    def delete(self, path: str, seen: Stat) -> bool:
        def do() -> bool:
            standing = self.objects.get(path)
            if standing is None or standing[1].version != seen.version:
                return False
            del self.objects[path]
            return True

        return self._write(f"delete {path}", do)
