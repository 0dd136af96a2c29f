"""The audit log: chain, root, tiles, publication, two sequencers at once, and restored copies that must not fork it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from render_platform.audit_log import CHECKPOINT, AuditLog, create_head
from render_platform.cas import Cas
from render_platform.database import log_head
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, PlatformError, SequencerStopped
from render_platform.note import Signer, load_or_create_key, read_checkpoint
from render_platform.objects import FolderObjects, ObjectStore, Stat
from tests.platforms import (
    check_chain,
    connect,
    open_database_of,
    read_blob,
    read_log,
    read_published,
    run_together,
    tree_hash,
)

RETRY = "run the command again"
"""The remedy of a stop that a competing writer may cause; any other stop speaks of damage."""


def draft(name: str) -> AuditEntry:
    return AuditEntry(type="charges", batch_id=name, previous=FIRST_PREVIOUS, records=1)


def no_mark(_connection: sa.Connection, _index: int) -> None:
    pass


def signer_of(state: Path) -> Signer:
    return load_or_create_key(state / "keys" / "checkpoint.key", "log.example")


def open_log(state: Path, objects: ObjectStore | None = None, blobs: ObjectStore | None = None) -> AuditLog:
    """A sequencer with a database connection of its own; the folder's first one makes it."""
    state.mkdir(exist_ok=True)
    database = open_database_of(state)
    create_head(database)
    cas = Cas(blobs or FolderObjects(state / "blobs"))
    return AuditLog(database, cas, objects or FolderObjects(state / "log"), signer_of(state))


def append(log: AuditLog, *names: str) -> list[int]:
    return [log.append(draft(name), no_mark) for name in names]


def patiently(act: Callable[[], Any]) -> Any:
    """Does what the remedy says."""
    for _ in range(200):
        try:
            return act()
        except SequencerStopped as error:
            if error.remedy != RETRY:
                raise
    raise AssertionError("two hundred stops in a row")


def check_log(state: Path, size: int) -> list[bytes]:
    """The published log holds `size` entries, whole and chained; gives them."""
    published = read_published(state, signer_of(state).verifier.vkey)
    assert published.size == size
    entries = read_log(state, size)
    assert len(entries) == size
    assert tree_hash(entries) == published.root
    check_chain(entries)
    for entry in entries:
        assert read_blob(state, hashlib.sha256(entry).hexdigest()) == entry
    return entries


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file but scratch ones: bytes and inode, which a rewrite would change."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: (path.read_bytes(), path.stat().st_ino) for name, path in found.items() if not name.startswith(".tmp")
    }


def expected_tiles(entries: list[bytes]) -> dict[str, bytes]:
    """The files of a tree of at most 65,535 entries, by the text of tlog-tiles."""
    leaves = [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]
    full = len(entries) // 256
    upper = [tree_hash(entries[at * 256 : at * 256 + 256]) for at in range(full)]
    levels = {
        "entries": [len(entry).to_bytes(2, "big") + entry for entry in entries],
        "0": leaves,
        "1": upper,
    }
    files = {}
    for level, items in levels.items():
        for at in range(0, len(items), 256):
            part = items[at : at + 256]
            name = f"{at // 256:03d}" if len(part) == 256 else f"{at // 256:03d}.p/{len(part)}"
            files[f"tile/{level}/{name}"] = b"".join(part)
    return files


def test_chain_root_and_tiles_at_every_published_size(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    expected: dict[str, bytes] = {}
    size = 0
    for upto in (1, 2, 5, 256, 257, 300, 530):
        assert append(log, *(f"n{n}" for n in range(size, upto))) == list(range(size, upto))
        assert log.publish() is not None
        size = upto
        entries = check_log(tmp_path, size)
        expected |= expected_tiles(entries)
        standing = {name: data for name, (data, _) in files_of(tmp_path / "log").items() if name != CHECKPOINT}
        assert standing == expected


def test_an_empty_log_publishes_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.publish() is None
    assert log.published() is None
    assert files_of(tmp_path / "log") == {}


def test_nobody_sees_an_entry_before_publication(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, "a")
    assert log.published() is None
    log.publish()
    append(log, "b")
    check_log(tmp_path, 1)


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, "a", "b", "c")
    first = log.publish()
    before = files_of(tmp_path / "log")
    assert log.publish() == open_log(tmp_path).publish() == first
    assert files_of(tmp_path / "log") == before
    with closing(connect(tmp_path)) as connection:
        assert connection.execute("SELECT size, note FROM checkpoints").fetchall() == [
            (3, before[CHECKPOINT][0].decode())
        ]


def test_an_entry_of_the_same_name_is_logged_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    marks: list[int] = []

    def mark(_connection: sa.Connection, index: int) -> None:
        marks.append(index)

    assert log.append(draft("a"), mark) == 0
    assert log.append(draft("b"), mark) == 1
    assert log.append(draft("a"), mark) == 0
    assert open_log(tmp_path).append(draft("b"), mark) == 1
    other_type = AuditEntry(type="correction", batch_id="a", previous=FIRST_PREVIOUS)
    assert log.append(other_type, mark) == 2
    assert marks == [0, 1, 2]


def test_a_mark_that_fails_takes_its_entry_with_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)

    def mark(connection: sa.Connection, _index: int) -> None:
        assert connection.execute(sa.select(log_head.c.size)).scalar() == 1
        raise Finding("the mark failed")

    with pytest.raises(Finding, match="the mark failed"):
        log.append(draft("a"), mark)
    assert log.publish() is None
    assert append(log, "b") == [0]
    log.publish()
    assert json.loads(check_log(tmp_path, 1)[0])["batch_id"] == "b"


# Two sequencers at once.


class HookedObjects:
    """An ObjectStore that lets something happen after a call: the begin of an interleaving, made on purpose."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self.after: dict[str, list[Callable[[], object]]] = {"create": [], "read": [], "replace": []}

    def _then(self, call: str) -> None:
        if self.after[call]:
            self.after[call].pop(0)()

    def create(self, path: str, data: bytes) -> bool:
        made = self._objects.create(path, data)
        self._then("create")
        return made

    def read(self, path: str) -> bytes:
        data = self._objects.read(path)
        self._then("read")
        return data

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        self._objects.replace(path, data, expected)
        self._then("replace")

    def names(self, prefix: str = "") -> Iterator[str]:
        return self._objects.names(prefix)

    def stats(self, prefix: str = "") -> Iterator[tuple[str, Stat]]:
        return self._objects.stats(prefix)

    def stat(self, path: str) -> Stat:
        return self._objects.stat(path)

    def delete(self, path: str, seen: Stat) -> bool:
        return self._objects.delete(path, seen)


def test_a_sequencer_whose_head_is_taken_chains_to_the_new_one(tmp_path: Path) -> None:
    other = open_log(tmp_path)
    blobs = HookedObjects(FolderObjects(tmp_path / "blobs"))
    log = open_log(tmp_path, blobs=blobs)
    blobs.after["create"] = [lambda: append(other, "b"), lambda: append(other, "c")]
    assert append(log, "a") == [2]
    log.publish()
    assert [json.loads(entry)["batch_id"] for entry in check_log(tmp_path, 3)] == ["b", "c", "a"]


def test_a_sequencer_gives_up_when_its_head_is_always_taken(tmp_path: Path) -> None:
    other = open_log(tmp_path)
    blobs = HookedObjects(FolderObjects(tmp_path / "blobs"))
    log = open_log(tmp_path, blobs=blobs)
    blobs.after["create"] = [lambda n=n: append(other, f"b{n}") for n in range(100)]  # type: ignore[misc]
    with pytest.raises(SequencerStopped) as stopped:
        append(log, "a")
    assert stopped.value.remedy == RETRY
    other.publish()
    assert len(check_log(tmp_path, 5)) == 5


def test_two_that_append_the_same_entry_log_it_once(tmp_path: Path) -> None:
    other = open_log(tmp_path)
    blobs = HookedObjects(FolderObjects(tmp_path / "blobs"))
    log = open_log(tmp_path, blobs=blobs)
    blobs.after["create"] = [lambda: append(other, "a")]
    assert append(log, "a") == [0]
    log.publish()
    check_log(tmp_path, 1)


@pytest.mark.parametrize("published_before", [0, 1])
@pytest.mark.parametrize("call", ["append", "publish"])
def test_a_publication_while_the_head_is_compared_is_not_damage(
    tmp_path: Path, call: str, published_before: int
) -> None:
    """The checkpoint is read, another sequencer publishes a larger one, then the database is read."""
    other = open_log(tmp_path)
    objects = HookedObjects(FolderObjects(tmp_path / "log"))
    log = open_log(tmp_path, objects)
    for n in range(published_before):
        append(other, f"before {n}")
        other.publish()

    def meanwhile() -> None:
        append(other, "b")
        other.publish()

    if published_before:
        objects.after["read"] = [meanwhile]
    else:
        reads = iter([meanwhile])
        objects.read = missing_then(objects, reads)  # type: ignore[method-assign, assignment]
    patiently((lambda: append(log, "a")) if call == "append" else log.publish)
    patiently(log.publish)
    check_log(tmp_path, published_before + (2 if call == "append" else 1))


def missing_then(objects: HookedObjects, hooks: Iterator[Callable[[], None]]) -> Callable[[str], bytes]:
    """A `read` that lets the hook happen after it found nothing."""
    read = objects.read

    def found(path: str) -> bytes:
        try:
            return read(path)
        except PlatformError:
            if hook := next(hooks, None):
                hook()
            raise

    return found


@pytest.mark.parametrize("after", ["replace", "read-back"])
def test_a_larger_checkpoint_published_meanwhile_is_not_damage(tmp_path: Path, after: str) -> None:
    """Another sequencer publishes after this one did: before it reads back, or before it marks its own."""
    other = open_log(tmp_path)
    objects = HookedObjects(FolderObjects(tmp_path / "log"))
    log = open_log(tmp_path, objects)
    append(log, "a")

    def meanwhile() -> None:
        append(other, "b")
        other.publish()

    if after == "replace":
        objects.after["replace"] = [meanwhile]
    else:
        objects.after["replace"] = [lambda: objects.after["read"].append(meanwhile)]
    patiently(log.publish)
    check_log(tmp_path, 2)
    verifier = signer_of(tmp_path).verifier
    with closing(connect(tmp_path)) as connection:
        marked = connection.execute("SELECT size, root, note FROM checkpoints ORDER BY size").fetchall()
    assert marked[-1][0] == 2
    for size, root, note in marked:
        kept = read_checkpoint(note.encode(), [verifier])
        assert (kept.size, kept.root) == (size, root), "the note that is kept is the checkpoint's own"


def test_two_threads_make_one_chain(tmp_path: Path) -> None:
    open_log(tmp_path)
    barrier = threading.Barrier(2)

    def work(name: str) -> list[int]:
        log = open_log(tmp_path)
        barrier.wait()
        indexes = []
        for n in range(25):
            indexes += patiently(lambda n=n: append(log, f"{name}{n}"))  # type: ignore[misc]
            patiently(log.publish)
        return indexes

    with ThreadPoolExecutor(2) as pool:
        indexes = [index for part in pool.map(work, "ab") for index in part]
    assert sorted(indexes) == list(range(50))
    check_log(tmp_path, 50)


CHILD = """
import sys
from pathlib import Path
from typing import Any
from tests.test_audit_log import append, open_log, patiently

log = open_log(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(25):
    patiently(lambda: append(log, f"{sys.argv[2]}{n}"))
    patiently(log.publish)
"""


def test_two_processes_make_one_chain(tmp_path: Path) -> None:
    open_log(tmp_path)
    run_together(CHILD, tmp_path)
    entries = check_log(tmp_path, 50)
    names = {json.loads(entry)["batch_id"] for entry in entries}
    assert names == {f"{name}{n}" for name in "ab" for n in range(25)}
