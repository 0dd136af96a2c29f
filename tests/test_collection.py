"""Orphans go; what SQL or the log names, what is young, and what is named at the last moment stays."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.canonical import digest_of
from render_platform.cas import Cas, NamedDigests, collect_orphans, path_of
from render_platform.clock import DAY_US, Clock, ManualClock, SystemClock
from render_platform.errors import Missing, Unavailable, UsageError
from render_platform.objects import PROBES, FileStat, FolderObjects, ObjectStore, Stat
from render_platform.pipeline import Platform
from tests.factories import make_events
from tests.platforms import LIVE, record
from tests.stories import MemoryObjects

START_US = 1_800_000_000_000_000
NOTHING: frozenset[str] = frozenset()


class TimedObjects(MemoryObjects):
    """Objects in memory that know when they were written."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock or SystemClock()
        self._written: dict[str, FileStat] = {}
        self._writes = 0

    def create(self, path: str, data: bytes) -> bool:
        created = super().create(path, data)
        if created:
            self._note(path, data)
        return created

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        super().replace(path, data, expected)
        self._note(path, data)

    def names(self, prefix: str = "") -> Iterator[str]:
        yield from (n for n in super().names(prefix) if prefix.startswith(".tmp/") or not n.startswith(".tmp/"))

    def stats(self, prefix: str = "") -> Iterator[tuple[str, FileStat]]:
        yield from ((name, self.stat(name)) for name in self.names(prefix))

    def stat(self, path: str) -> FileStat:
        if path not in self.files:
            raise Missing(path)
        return self._written[path]

    def delete(self, path: str, seen: Stat) -> bool:
        if path not in self.files or self.stat(path).version != seen.version:
            return False
        del self.files[path]
        return True

    def _note(self, path: str, data: bytes) -> None:
        self._writes += 1
        self._written[path] = FileStat(len(data), self._clock.now_us(), str(self._writes))


def make_old(root: Path, us: int) -> None:
    """Everything in a folder was written at `us`."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(us * 1_000, us * 1_000))


class Hooked:
    """A store to which something happens once, just before a call."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self.before: dict[str, Callable[[], object]] = {}

    def stat(self, path: str) -> Stat:
        self._happen("stat")
        return self._objects.stat(path)

    def delete(self, path: str, seen: Stat) -> bool:
        self._happen("delete")
        return self._objects.delete(path, seen)

    def _happen(self, call: str) -> None:
        if happening := self.before.pop(call, None):
            happening()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)


@pytest.mark.parametrize("plan", [True, False])
def test_only_old_objects_that_nothing_names_go(plan: bool) -> None:
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    cas = Cas(objects)
    named, orphan = cas.put_many([b"named", b"orphan"])
    objects.create("sha256/foreign", b"what the CAS does not name")
    clock.move_to(START_US + 2 * DAY_US)
    young = cas.put(b"young")
    clock.move_to(START_US + 7 * DAY_US)

    outcome = collect_orphans(objects, {named}.__contains__, clock, plan=plan)

    assert [(one.name, one.size, one.modified_us) for one in outcome.orphans] == [(path_of(orphan), 6, START_US)]
    assert outcome.removed == ([] if plan else outcome.orphans)
    assert outcome.spared == []
    assert cas.find_missing([named, orphan, young]) == ([] if plan else [orphan])
    assert objects.read("sha256/foreign")


def test_a_put_makes_it_young_again() -> None:
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    digest = Cas(objects).put(b"orphan")
    clock.move_to(START_US + 8 * DAY_US)
    assert Cas(objects).put(b"orphan") == digest
    assert collect_orphans(objects, NOTHING.__contains__, clock, plan=False).orphans == []
    assert Cas(objects).get(digest) == b"orphan"


@pytest.mark.parametrize("kind", ["memory", "folder"])
@pytest.mark.parametrize("moment", ["stat", "is_named", "delete"])
@pytest.mark.parametrize("event", ["named", "put", "put and named"])
def test_what_happens_while_it_is_collected(tmp_path: Path, kind: str, moment: str, event: str) -> None:
    """What is put or named before each step of a removal survives, but for one: a commit just before the deletion, of
    a put that is older than any writer takes to commit."""
    clock = ManualClock(SystemClock().now_us() - 8 * DAY_US)
    store: ObjectStore = TimedObjects(clock) if kind == "memory" else FolderObjects(tmp_path)
    path = path_of(Cas(store).put(b"orphan"))
    make_old(tmp_path, clock.us)
    clock.move_to(SystemClock().now_us())
    named: set[str] = set()
    objects = Hooked(store)
    asked = 0

    def happen() -> None:
        if "put" in event:
            Cas(store).put(b"orphan")
        if "named" in event:
            named.add(digest_of(b"orphan"))

    def is_named(digest: str) -> bool:
        nonlocal asked
        asked += 1
        if asked == 2 and moment == "is_named":  # the first time it was listed
            happen()
        return digest in named

    objects.before = {moment: happen}
    outcome = collect_orphans(objects, is_named, clock, plan=False)
    late = event == "named" and moment == "delete"
    assert [one.name for one in outcome.removed] == ([path] if late else [])
    assert [one.name for one in outcome.spared] == ([] if late else [path])
    assert list(store.names()) == ([] if late else [path])


def test_a_folder_does_not_remove_what_is_being_replaced(tmp_path: Path) -> None:
    store = FolderObjects(tmp_path)
    store.create("a", b"x")
    seen = store.stat("a")
    removed: list[bool] = []
    thread = threading.Thread(target=lambda: removed.append(store.delete("a", seen)))
    with (tmp_path / ".tmp/lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a writer is about to rename
        thread.start()
        thread.join(0.2)
        (tmp_path / "new").write_bytes(b"x")
        (tmp_path / "new").rename(tmp_path / "a")
    thread.join()
    assert removed == [False]
    assert store.read("a") == b"x"


def test_writers_and_collectors_at_once(tmp_path: Path) -> None:
    """Each old orphan is put again and named while two collections run: none of them is lost."""
    store = FolderObjects(tmp_path)
    cas = Cas(store)
    blobs = [b"orphan %d" % number for number in range(150)]
    cas.put_many(blobs)
    make_old(tmp_path, SystemClock().now_us() - 8 * DAY_US)
    named: set[str] = set()
    begin = threading.Barrier(3)

    def write() -> None:
        begin.wait()
        for blob in reversed(blobs):
            named.add(cas.put(blob))

    def collect() -> None:
        begin.wait()
        collect_orphans(store, named.__contains__, SystemClock(), plan=False)

    threads = [threading.Thread(target=act) for act in (write, collect, collect)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cas.get_many(map(digest_of, blobs)) == blobs


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "commit", "collect"]), st.integers(0, 3))
    | st.tuples(st.just("days"), st.integers(1, 9)),
    max_size=40,
)


@given(STEPS)
def test_what_is_named_is_never_lost(steps: list[Step]) -> None:
    """Writers put and commit in any order with collections; a commit comes at most six days after its put."""
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    cas = Cas(objects)
    put_at: dict[int, int] = {}
    named: set[str] = set()
    for step, value in steps:
        if step == "put":
            cas.put(b"%d" % value)
            put_at[value] = clock.us
        elif step == "commit" and clock.us - put_at.get(value, 0) <= 6 * DAY_US:
            named.add(digest_of(b"%d" % value))
        elif step == "days":
            clock.move_to(clock.us + value * DAY_US)
        elif step == "collect":
            collect_orphans(objects, named.__contains__, clock, plan=False)
    assert cas.find_missing(named) == []
    clock.move_to(clock.us + 7 * DAY_US)
    collect_orphans(objects, named.__contains__, clock, plan=False)
    assert set(cas.digests()) == named


@pytest.mark.parametrize(("named", "damaged", "kept"), [(True, True, True), (True, False, False), (False, True, False)])
def test_quarantine_is_kept_while_it_may_be_all_that_is_left(named: bool, damaged: bool, kept: bool) -> None:
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    cas = Cas(objects)
    digest = cas.put(b"data")
    objects.replace(path_of(digest), b"bad", b"data")
    cas.put(b"data")
    (aside,) = objects.names("quarantine/")
    if damaged:
        objects.replace(path_of(digest), b"bad again", b"data")
    collect_orphans(objects, {digest}.__contains__, clock, plan=False)
    assert objects.read(aside) == b"bad", "young"
    clock.move_to(START_US + 7 * DAY_US)
    collect_orphans(objects, lambda asked: named and asked == digest, clock, plan=False)
    assert (aside in objects.names()) is kept
    assert (path_of(digest) in objects.names()) is named


def test_what_a_killed_probe_left_goes() -> None:
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    objects.create(f"{PROBES}left", b"first")
    clock.move_to(START_US + 8 * DAY_US)
    collect_orphans(objects, NOTHING.__contains__, clock, plan=False)
    assert list(objects.names(PROBES)) == []


def test_a_limit_that_writers_could_reach_is_refused() -> None:
    with pytest.raises(UsageError):
        collect_orphans(TimedObjects(), NOTHING.__contains__, SystemClock(), plan=True, older_than_us=2 * DAY_US - 1)


def test_nothing_goes_while_it_is_not_known_what_is_named() -> None:
    clock = ManualClock(START_US)
    objects = TimedObjects(clock)
    digest = Cas(objects).put(b"orphan")
    clock.move_to(START_US + 8 * DAY_US)
    answers = iter([False])

    def is_named(_digest: str) -> bool:
        for answer in answers:
            return answer
        raise Unavailable("the database cannot be used")

    with pytest.raises(Unavailable):
        collect_orphans(objects, is_named, clock, plan=False)
    assert Cas(objects).get(digest) == b"orphan"


def test_a_platform_names_what_its_log_binds_and_what_waits(platform: Platform) -> None:
    record(platform, LIVE, make_events(12))
    platform.flush()
    record(platform, LIVE, make_events(7, seed=1))
    platform.seal()
    platform.store()  # and not logged yet
    standing = set(platform.cas.digests())
    orphan = platform.cas.put(b"left by a crash")
    make_old(platform.settings.blobs_dir, SystemClock().now_us() - 8 * DAY_US)

    is_named = NamedDigests(platform.database)
    outcome = collect_orphans(platform.blobs, is_named, SystemClock(), plan=False)

    assert [one.name for one in outcome.removed] == [path_of(orphan)]
    assert set(platform.cas.digests()) == standing
    platform.flush()
    assert platform.verify(deep=True).verified
    assert all(map(is_named, platform.cas.digests())), "what was logged since is named too"
    assert not is_named(orphan)
