"""What every ObjectStore does. A new implementation is added to STORES and passes, or is not one."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform.clock import SystemIds
from render_platform.errors import Missing, SequencerStopped, Unavailable
from render_platform.objects import PROBES, FolderObjects, ObjectStore, check_store
from tests.conformance.s3_server import in_bucket, use_credentials
from tests.platforms import run_together
from tests.test_collection import TimedObjects

_in_memory: dict[Path, TimedObjects] = {}
STORES: dict[str, Callable[[Path], ObjectStore]] = {
    "folder": FolderObjects,
    "memory": lambda path: _in_memory.setdefault(path, TimedObjects()),  # the fake that other tests stand on
    "s3": in_bucket("plain"),
    "s3-versioned": in_bucket("versioned"),
    "s3-object-lock": in_bucket("locked", retention_days=1),
}
"""Each opens the store at a place; two that are opened at one place are one store."""


@pytest.fixture(params=sorted(STORES))
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_credentials(monkeypatch)
    return str(request.param)


@pytest.fixture
def open_store(kind: str, tmp_path: Path) -> Callable[[], ObjectStore]:
    return lambda: STORES[kind](tmp_path / "store")


@pytest.fixture
def store(open_store: Callable[[], ObjectStore]) -> ObjectStore:
    return open_store()


def test_what_is_created_is_read_back(store: ObjectStore, open_store: Callable[[], ObjectStore]) -> None:
    for path, data in {"a": b"", "b/c/d": b"\0\r\n\xff", "b/c/e": b"x" * 3_000_000}.items():
        assert store.create(path, data) is True
        assert store.read(path) == open_store().read(path) == data


def test_an_object_is_created_once(store: ObjectStore, open_store: Callable[[], ObjectStore]) -> None:
    assert store.create("a/b", b"first") is True
    assert store.create("a/b", b"second") is False
    assert open_store().create("a/b", b"first") is False
    assert store.read("a/b") == b"first"


def test_nothing_where_nothing_stands(store: ObjectStore) -> None:
    for path in ("a", "a/b"):
        with pytest.raises(Missing) as missing:
            store.read(path)
        assert missing.value.path == path
    assert list(store.names()) == list(store.names("a/")) == []
    store.create("a", b"")
    with pytest.raises(Missing):
        store.read("a/b")


def test_of_eight_threads_exactly_one_creates(open_store: Callable[[], ObjectStore], kind: str) -> None:
    barrier = threading.Barrier(8)
    turns = 3 if kind.startswith("s3") else 20  # SeaweedFS lets the losers wait a second each

    def work(number: int) -> list[bool]:
        store = open_store()
        made = []
        for turn in range(turns):
            barrier.wait()
            made.append(store.create(f"folder {turn}/object", b"%d" % number))
        return made

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    after = open_store()
    for turn in range(turns):
        winners = [number for number in range(8) if results[number][turn]]
        assert len(winners) == 1
        assert after.read(f"folder {turn}/object") == b"%d" % winners[0]


def test_replace_compares_first(store: ObjectStore) -> None:
    with pytest.raises(SequencerStopped):
        store.replace("head", b"1", b"0")
    with pytest.raises(Missing):
        store.read("head")
    store.replace("head", b"1", None)
    for expected in (None, b"", b"0", b"11"):
        with pytest.raises(SequencerStopped):
            store.replace("head", b"2", expected)
        assert store.read("head") == b"1"
    store.replace("head", b"2", b"1")
    assert store.read("head") == b"2"
    store.replace("in/a/folder", b"1", None)
    assert list(store.names()) == ["head", "in/a/folder"]


def test_of_eight_threads_that_replace_none_overwrites_another(
    open_store: Callable[[], ObjectStore], kind: str
) -> None:
    """Eight add one to a counter: what the last one reads is what all have added."""

    def work(_number: int) -> None:
        store = open_store()
        done = 0
        while done < (2 if kind.startswith("s3") else 10):
            standing = read_or_none(store, "counter")
            try:
                store.replace("counter", b"%d" % (int(standing or b"0") + 1), standing)
                done += 1
            except SequencerStopped:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert open_store().read("counter") == (b"16" if kind.startswith("s3") else b"80")


def read_or_none(store: ObjectStore, path: str) -> bytes | None:
    try:
        return store.read(path)
    except Missing:
        return None


@settings(max_examples=25)
@given(
    st.sets(st.from_regex(r"[a-c0-1.-]{1,3}(/[a-c]{1,2}){0,2}", fullmatch=True).filter(lambda n: n.strip("./") == n))
)
def test_names_are_complete_sorted_and_below_their_prefix(kind: str, paths: set[str]) -> None:
    """A name that stands is no folder of another: such ones are left out here."""
    paths = {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}
    with tempfile.TemporaryDirectory() as folder:
        store = STORES[kind](Path(folder))
        for path in paths:
            assert store.create(path, b"x")
        assert list(store.names()) == sorted(paths)
        for prefix in ("a/", "b/c/", "none/"):
            if prefix.removesuffix("/") in paths:
                continue  # see the next test
            assert list(store.names(prefix)) == sorted(path for path in paths if path.startswith(prefix))


def test_an_object_is_not_below_itself(store: ObjectStore) -> None:
    store.create("a", b"x")
    assert list(store.names("a/")) == []


def test_names_leave_out_what_is_the_stores_own(store: ObjectStore) -> None:
    store.create("a", b"x")
    store.replace("head", b"x", None)
    store.create(".tmp/probe/one", b"x")
    assert list(store.names()) == [name for name, _stat in store.stats()] == ["a", "head"]
    assert list(store.names(".tmp/probe/")) == [".tmp/probe/one"]


def test_sizes_and_times_without_reading(store: ObjectStore) -> None:
    begin_us = (time.time_ns() // 1_000_000_000 - 5) * 1_000_000  # a store counts in whole seconds, by its own clock
    store.create("b", b"")
    store.create("a/c", b"x" * 100_000)
    found = dict(store.stats())
    assert {name: stat.size for name, stat in found.items()} == {"a/c": 100_000, "b": 0}
    for name, stat in found.items():
        again = store.stat(name)
        assert begin_us <= stat.modified_us <= begin_us + 65_000_000
        assert (again.size, again.modified_us // 1_000_000) == (stat.size, stat.modified_us // 1_000_000)
    assert list(dict(store.stats("a/"))) == ["a/c"]
    for absent in ("a", "d", "a/c/d"):
        with pytest.raises(Missing):
            store.stat(absent)


def test_each_write_is_another_version(store: ObjectStore) -> None:
    store.create("a", b"x")
    first = store.stat("a")
    assert store.create("a", b"y") is False
    assert store.stat("a").version == first.version
    store.replace("a", b"x", b"x")
    assert store.stat("a").version != first.version


def test_delete_removes_what_was_seen_and_nothing_else(store: ObjectStore) -> None:
    store.create(".tmp/a", b"x")  # nobody locks these
    seen = store.stat(".tmp/a")
    store.replace(".tmp/a", b"x", b"x")
    assert store.delete(".tmp/a", seen) is False
    assert store.read(".tmp/a") == b"x"
    assert store.delete(".tmp/a", store.stat(".tmp/a")) is True
    assert list(store.names(".tmp/")) == [name for name in store.names(".tmp/") if name == ".tmp/lock"]
    assert store.delete(".tmp/a", seen) is False
    assert store.create(".tmp/a", b"again") is True
    assert store.read(".tmp/a") == b"again"


def test_what_is_locked_stays(store: ObjectStore, kind: str) -> None:
    """Also when it was written again: its age begins anew, and so does its lock."""
    store.create("a", b"x")
    store.replace("a", b"x", b"x")
    locks = kind == "s3-object-lock"
    assert store.delete("a", store.stat("a")) is not locks
    assert list(store.names()) == ["a"] * locks


def test_the_probe_takes_it_and_leaves_nothing(store: ObjectStore, kind: str) -> None:
    for _ in range(2):
        check_store(store, SystemIds(), kind)
    assert list(store.names()) == list(store.names(PROBES)) == []


# The local folder alone: what it does when the machine or the process fails.

CREATOR = """
import sys
from pathlib import Path
from render_platform.objects import FolderObjects

store = FolderObjects(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print("".join(str(int(store.create(f"{n}", sys.argv[2].encode()))) for n in range(300)))
"""


def test_of_two_processes_exactly_one_creates(tmp_path: Path) -> None:
    one, two = (said.strip() for said in run_together(CREATOR, tmp_path))
    assert len(one) == len(two) == 300
    store = FolderObjects(tmp_path)
    for n in range(300):
        assert {one[n], two[n]} == {"0", "1"}
        assert store.read(f"{n}") == (b"a" if one[n] == "1" else b"b")


class Crash(BaseException):
    pass


@pytest.mark.parametrize("call", ["fsync", "link", "unlink"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_at_any_system_call_leaves_the_whole_object_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, moment: str
) -> None:
    """The n-th call fails for every n; what is left is nothing or all, and a second attempt makes it good."""
    real = getattr(os, call)
    number = 0
    while True:
        number += 1
        count = 0

        def failing(*args: object, number: int = number, **options: object) -> object:
            nonlocal count
            count += 1
            if moment == "before" and count == number:
                raise Crash
            result = real(*args, **options)
            if count == number:
                raise Crash
            return result

        root = tmp_path / f"{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                FolderObjects(root).create("sha256/ab/object", b"x" * 100_000)
            except Crash:
                pass
            else:
                break
        store = FolderObjects(root)
        standing = list(store.names())
        assert standing in ([], ["sha256/ab/object"])
        assert store.create("sha256/ab/object", b"x" * 100_000) is not bool(standing)
        assert store.read("sha256/ab/object") == b"x" * 100_000
    assert number > 1


def test_a_crash_before_the_rename_leaves_what_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderObjects(tmp_path)
    store.replace("head", b"old", None)

    def crash(*_args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(Crash):
            store.replace("head", b"new", b"old")
    assert store.read("head") == b"old"
    assert list(store.names()) == ["head"]
    store.replace("head", b"new", b"old")
    assert store.read("head") == b"new"


def test_what_is_there_already_is_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first writer may have died between the link and the folder's fsync: who builds on it must sync again."""
    store = FolderObjects(tmp_path)
    store.create("folder/object", b"x")
    synced = set()
    real = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        assert store.create("folder/object", b"x") is False
    assert (tmp_path / "folder").stat().st_ino in synced


def test_a_file_where_a_folder_belongs_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = FolderObjects(tmp_path)
    for act in (
        lambda: store.create("file/object", b"x"),
        lambda: store.replace("file/object", b"x", None),
        lambda: FolderObjects(tmp_path / "file").create("a", b"x"),
        lambda: FolderObjects(tmp_path / "file").replace("a", b"x", None),
    ):
        with pytest.raises(Unavailable) as error:
            act()
        assert error.value.remedy
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unavailable):
        store.read("folder")


def test_a_store_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(Unavailable):
        list(FolderObjects(tmp_path / "file").names())


@contextmanager
def without_privilege() -> Iterator[None]:
    """Root may read everything: for a moment this process is nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone may reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in sorted(folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.parametrize("hidden", [".", "sha256", "sha256/ab"])
def test_a_folder_that_cannot_be_read_is_unavailable_and_not_empty(open_folder: Path, hidden: str) -> None:
    store = FolderObjects(open_folder / "store")
    store.create("sha256/ab/object", b"x")
    store.create("sha256/cd/object", b"y")
    (open_folder / "store" / hidden).chmod(0)
    for act in (
        lambda: list(store.names()),
        lambda: list(store.names("sha256/")),
        lambda: store.read("sha256/ab/object"),
    ):
        with pytest.raises(Unavailable) as error, without_privilege():
            act()
        assert not isinstance(error.value, Missing)


def test_a_folder_that_cannot_be_written_is_unavailable(open_folder: Path) -> None:
    store = FolderObjects(open_folder / "store")
    store.create("a", b"x")
    seen = store.stat("a")
    for act in (
        lambda: store.create("b", b"x"),
        lambda: store.replace("b", b"x", None),
        lambda: store.delete("a", seen),
    ):
        with pytest.raises(Unavailable), without_privilege():
            act()
    assert list(store.names()) == ["a"]
