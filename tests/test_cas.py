"""Content is its address: other bytes are never returned, and never left in their place."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.canonical import digest_of
from render_platform.cas import Cas, Stored, digest_at, path_of
from render_platform.clock import ManualClock, SystemIds
from render_platform.errors import DigestMismatch, Missing, PlatformError, SequencerStopped, Unavailable, UsageError
from render_platform.objects import FolderObjects, check_store
from tests.test_collection import TimedObjects


def blob(root: Path, data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    return root / "sha256" / digest[:2] / digest[2:]


def test_put_gives_the_digest_and_is_harmless_to_repeat(tmp_path: Path) -> None:
    cas = Cas(FolderObjects(tmp_path))
    for data in (b"", b"data", b"x" * 1_000_000):
        digest = cas.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        os.utime(blob(tmp_path, data), ns=(0, 0))
        assert cas.put(data) == digest
        assert blob(tmp_path, data).stat().st_mtime > 0, "its age counts from the last put"
        assert cas.get(digest) == blob(tmp_path, data).read_bytes() == data


def test_the_example_of_the_specification(tmp_path: Path) -> None:
    shown = (Path(__file__).parents[1] / "docs/spec/objects.md").read_text().split("```")[1].splitlines()
    digest = Cas(FolderObjects(tmp_path / "blobs")).put(b"evidence")
    (stored,) = (path for path in tmp_path.rglob("*") if path.is_file() and ".tmp" not in path.parts)
    assert shown[2] == f"{digest}  -"
    assert shown[4] == str(stored.relative_to(tmp_path))


@given(st.binary())
def test_names_and_digests_are_inverse(data: bytes) -> None:
    digest = digest_of(data)
    assert digest_at(path_of(digest)) == digest


@pytest.mark.parametrize("bad", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61])
def test_what_is_no_digest_has_no_path(bad: str) -> None:
    with pytest.raises(UsageError):
        path_of(bad)
    assert digest_at(f"sha256/{bad[:2]}/{bad[2:]}") is None


@pytest.mark.parametrize("damage", [b"", b"dat", b"datA", b"data\n"])
def test_other_bytes_are_refused_then_quarantined_and_replaced(tmp_path: Path, damage: bytes) -> None:
    cas = Cas(FolderObjects(tmp_path))
    digest = cas.put(b"data")
    blob(tmp_path, b"data").write_bytes(damage)
    with pytest.raises(DigestMismatch) as mismatch:
        cas.get(digest)
    assert mismatch.value.exit_code == 1
    assert digest[2:] in mismatch.value.path
    assert cas.put(b"data") == digest
    assert cas.get(digest) == b"data"
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [damage]
    assert list(cas.digests()) == [digest]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    cas = Cas(FolderObjects(tmp_path))
    stored = [cas.put(b"%d" % n) for n in range(3)]
    absent = digest_of(b"absent")
    with pytest.raises(Missing):
        cas.get(absent)
    assert cas.find_missing([]) == []
    assert cas.find_missing([absent, *stored, absent]) == [absent, absent]
    many = [f"{number:064x}" for number in range(1_200)]
    assert cas.find_missing([*many, *stored, absent]) == [*many, absent]
    assert sorted(cas.digests()) == sorted(stored)
    for few_or_many in (["no digest"], [*many, "no digest"]):
        with pytest.raises(UsageError):
            cas.find_missing(few_or_many)


def test_few_are_asked_for_without_a_listing() -> None:
    class Unlisted(TimedObjects):
        def names(self, prefix: str = "") -> Iterator[str]:
            raise Unavailable("the store cannot be listed")

    cas = Cas(Unlisted())
    assert cas.find_missing([cas.put(b"data"), "a" * 64]) == ["a" * 64]


def test_by_time_and_size() -> None:
    clock = ManualClock(1_000)
    cas = Cas(TimedObjects(clock))
    first = cas.put(b"first")
    clock.move_to(2_000)
    second, third = sorted(cas.put_many([b"second", b"third"]))
    assert [one.digest for one in cas.by_time()] == [first, second, third]
    assert [one.digest for one in cas.by_time(1_000, 2_000)] == [first]
    assert [one.digest for one in cas.by_time(1_001, 2_001)] == [second, third]
    assert cas.by_time(2_001) == []
    assert cas.stat(first) == cas.by_time()[0] == Stored(first, 5, 1_000)
    with pytest.raises(Missing):
        cas.stat("a" * 64)


# Many at once.


@given(st.lists(st.binary(max_size=3), max_size=40))
def test_many_keep_their_order(blobs: list[bytes]) -> None:
    cas = Cas(TimedObjects())
    digests = cas.put_many(iter(blobs))
    assert digests == [digest_of(blob) for blob in blobs]
    assert cas.get_many(iter(digests)) == blobs


class Counting(TimedObjects):
    """How many creates run at once, and how many there were; the bad one fails when others have begun."""

    def __init__(self, bad: bytes | None = None, wait_for: int = 1) -> None:
        super().__init__()
        self._bad = bad
        self._wait_for = wait_for
        self._changed = threading.Condition()
        self.running = self.most = self.begun = 0

    def create(self, path: str, data: bytes) -> bool:
        with self._changed:
            self.running += 1
            self.begun += 1
            self.most = max(self.most, self.running)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self.begun >= self._wait_for, 30)
        try:
            if data == self._bad:
                raise Unavailable("the bad one")
            return super().create(path, data)
        finally:
            with self._changed:
                self.running -= 1


def test_eight_run_at_once_and_no_more() -> None:
    objects = Counting(wait_for=8)
    Cas(objects).put_many(b"%d" % number for number in range(100))
    assert (objects.most, objects.begun) == (8, 100)


def test_the_first_error_is_raised_when_all_that_began_has_ended() -> None:
    objects = Counting(bad=b"2", wait_for=8)
    cas = Cas(objects)
    with pytest.raises(Unavailable, match="the bad one"):
        cas.put_many(b"%d" % number for number in range(100))
    assert objects.running == 0
    assert 8 <= objects.begun <= 18, "nothing more begins after it"
    stored = set(cas.digests())
    assert len(stored) == objects.begun - 1
    assert digest_of(b"2") not in stored
    with pytest.raises(Missing, match=path_of("b" * 64)):
        cas.get_many([digest_of(b"1"), "b" * 64, "a" * 64])


# Stores that lie.


class LyingObjects(TimedObjects):
    """A store that says that it has stored what it was given, and has stored something else or nothing."""

    def __init__(self, alter: Callable[[bytes], bytes | None]) -> None:
        super().__init__()
        self._alter = alter

    def create(self, path: str, data: bytes) -> bool:
        altered = self._alter(data)
        return path not in self.files if altered is None else super().create(path, altered)

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        altered = self._alter(data)
        if altered is not None:
            super().replace(path, altered, expected)


@pytest.mark.parametrize(
    "alter",
    [lambda data: data[:-1], lambda data: data + b"\0", lambda _data: b"", lambda _data: None],
    ids=["truncated", "longer", "empty", "lost"],
)
def test_a_store_that_lies_is_found_out(alter: Callable[[bytes], bytes | None]) -> None:
    cas = Cas(LyingObjects(alter))
    for _ in range(2):
        with pytest.raises(Unavailable) as error:
            cas.put(b"data")
        assert error.value.remedy
    with pytest.raises(PlatformError):
        cas.get(digest_of(b"data"))


def test_others_that_change_it_at_the_same_moment_do_not_stop_a_put() -> None:
    """It is removed, and it is replaced by another writer, each between what a put reads and what it writes."""

    class Busy(TimedObjects):
        happening = iter([Missing("sha256/…"), SequencerStopped("it was replaced"), None])

        def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
            if error := next(self.happening, None):
                raise error
            super().replace(path, data, expected)

    cas = Cas(Busy())
    assert cas.get(cas.put(cas.get(cas.put(b"data")))) == b"data"


# The start-up probe.


class Overwrites(TimedObjects):
    def create(self, path: str, data: bytes) -> bool:
        self.files.pop(path, None)
        return super().create(path, data)


class OverwritesAndDeniesIt(Overwrites):
    def create(self, path: str, data: bytes) -> bool:
        stood = path in self.files
        return super().create(path, data) and not stood


class NeverCreates(TimedObjects):
    def create(self, path: str, data: bytes) -> bool:
        return False


class ListsLate(TimedObjects):
    def names(self, prefix: str = "") -> Iterator[str]:
        return iter([])


class ReplacesAnything(TimedObjects):
    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        super().replace(path, data, self.files.get(path))


class ReplacesNothing(TimedObjects):
    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        if self.files.get(path) != expected:
            raise SequencerStopped("other bytes stand")


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        (Overwrites(), "overwrite"),
        (OverwritesAndDeniesIt(), "overwrite"),
        (NeverCreates(), "stands where none does"),
        (ListsLate(), "lists what stood before"),
        (ReplacesAnything(), "without comparing"),
        (ReplacesNothing(), "does not read back"),
        (LyingObjects(lambda _data: None), "does not read back"),
        (LyingObjects(lambda data: data[1:]), "does not read back"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TimedObjects) else "",
)
def test_a_store_that_breaks_a_promise_is_refused_at_the_start(objects: TimedObjects, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        check_store(objects, SystemIds(), "s3://bucket/blobs")
    assert error.value.message.startswith("s3://bucket/blobs cannot keep evidence")
    assert error.value.remedy
    assert not objects.files, "the probe is removed"


def test_a_store_that_is_down_is_unavailable_and_not_refused() -> None:
    class Down(TimedObjects):
        def create(self, path: str, data: bytes) -> bool:
            raise Unavailable("down")

    with pytest.raises(Unavailable):
        check_store(Down(), SystemIds(), "blobs")
