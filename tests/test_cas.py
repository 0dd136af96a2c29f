"""Content is its address: other bytes are never returned, and never left in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.canonical import digest_of
from render_platform.cas import Cas, digest_at, path_of
from render_platform.errors import DigestMismatch, Missing, PlatformError, Unavailable, UsageError
from render_platform.objects import FolderObjects


def blob(root: Path, data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    return root / "sha256" / digest[:2] / digest[2:]


def test_put_gives_the_digest_and_is_harmless_to_repeat(tmp_path: Path) -> None:
    cas = Cas(FolderObjects(tmp_path))
    for data in (b"", b"data", b"x" * 1_000_000):
        digest = cas.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        inode = blob(tmp_path, data).stat().st_ino
        assert cas.put(data) == digest
        assert blob(tmp_path, data).stat().st_ino == inode, "left as it stands"
        assert cas.get(digest) == blob(tmp_path, data).read_bytes() == data


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
    assert cas.find_missing([absent, *stored]) == [absent]
    assert sorted(cas.digests()) == sorted(stored)


class LyingObjects:
    """An ObjectStore that says that it has stored what it was given, and has stored something else or nothing."""

    def __init__(self, alter: Callable[[bytes], bytes | None]) -> None:
        self._alter = alter
        self.stored: dict[str, bytes] = {}

    def create(self, path: str, data: bytes) -> bool:
        if path in self.stored:
            return False
        altered = self._alter(data)
        if altered is not None:
            self.stored[path] = altered
        return True

    def read(self, path: str) -> bytes:
        if path not in self.stored:
            raise Missing(path)
        return self.stored[path]

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        raise NotImplementedError

    def names(self, prefix: str = "") -> Iterator[str]:
        yield from sorted(name for name in self.stored if name.startswith(prefix))

    def move_aside(self, path: str) -> str:
        self.stored[f"quarantine/{len(self.stored)}"] = self.stored.pop(path)
        return f"quarantine/{len(self.stored) - 1}"


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


def test_an_honest_store_of_another_kind_does(tmp_path: Path) -> None:
    cas = Cas(LyingObjects(lambda data: data))
    assert cas.get(cas.put(b"data")) == b"data"
