"""The content-addressed store: `sha256/<2>/<62>`. Content is its address; other bytes are never returned.

Orphans are objects that nothing names: what a crash left between a put and the commit that names it. They may be
collected, and this makes it safe: an object's age counts from its last `put`, which writes what stands already anew;
only objects that are older than any writer takes from its put to its commit are looked at; and a store removes only the
writing that was looked at, never a newer one.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import sqlalchemy as sa
import structlog

from render_platform.canonical import digest_of
from render_platform.clock import DAY_US, Clock, Ids
from render_platform.config import Settings
from render_platform.database import Database, batches, log_entries
from render_platform.entries import END_OF_TIME_US, parse
from render_platform.errors import (
    DigestMismatch,
    Finding,
    Missing,
    PlatformError,
    SequencerStopped,
    Unavailable,
    UsageError,
)
from render_platform.objects import LOCK, SCRATCH, FolderObjects, ObjectStore, Stat, check_store

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{62})")
_QUARANTINED = re.compile(r"quarantine/sha256-([0-9a-f]{2})-([0-9a-f]{62})-[0-9a-f]+")
_PUTS = 5
"""Attempts at a put whose object others change at the same moment."""
_PARALLEL = 8
_FEW = 1_000
"""So many objects are asked for one by one; for more the whole store is listed."""
WORKERS = min(4, os.cpu_count() or 1)
OBJECTS_A_TASK = 8
_ENTRIES = 1_000
"""Log entries read at once."""

_log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")


def path_of(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"{digest!r} is not a digest", "give 64 lower-case hexadecimal digits")
    return f"sha256/{digest[:2]}/{digest[2:]}"


def digest_at(path: str) -> str | None:
    """The digest that an object's name promises; None for a name that the CAS does not give."""
    match = _PATH.fullmatch(path)
    return match[1] + match[2] if match else None


@dataclass(frozen=True, slots=True)
class Stored:
    """An object of the CAS: bytes, and µs UTC of its last `put` by the store's clock."""

    digest: str
    size: int
    modified_us: int


class Cas:
    """For any number of threads. The methods of many objects work on eight at once."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def put(self, data: bytes) -> str:
        """Store `data` and give its digest. Durable, read back and rehashed when it returns; harmless to repeat.

        What stands already is written anew, so that its age counts from now. Bytes that stand under the name and do
        not match it are kept in quarantine and replaced.
        """
        digest = digest_of(data)
        path = path_of(digest)
        # A crash before create: nothing stands. After it: an object that nothing names yet; the repeat finds it.
        for _ in range(_PUTS):
            if self._objects.create(path, data) or self._renew(path, data):
                break
        if digest_of(self._objects.read(path)) != digest:
            raise Unavailable(f"blobs/{path}: what was written does not read back", "check the disk or the store")
        return digest

    def _renew(self, path: str, data: bytes) -> bool:
        """Write over what stands. False where something else happens to it at this moment."""
        try:
            standing = self._objects.read(path)
            if standing != data:
                # Crash after this: the bad bytes stand twice; the repeat finds that they are in quarantine.
                aside = f"quarantine/{path.replace('/', '-')}-{digest_of(standing)}"
                self._objects.create(aside, standing)
                _log.error("cas_quarantined", path=path, kept_as=aside)
            self._objects.replace(path, data, standing)
        except (Missing, SequencerStopped):
            return False
        return True

    def get(self, digest: str) -> bytes:
        """The bytes, verified. Missing where there are none; DigestMismatch where others stand there."""
        data = self._objects.read(path_of(digest))
        if digest_of(data) != digest:
            raise DigestMismatch(f"blobs/{path_of(digest)}", "its bytes do not have the digest that names it")
        return data

    def put_many(self, blobs: Iterable[bytes]) -> list[str]:
        """`put` of each; the digests in their order. At the first error nothing more begins; it is raised once what
        had begun has ended. What was stored stays stored."""
        return _in_parallel(self.put, blobs)

    def get_many(self, digests: Iterable[str]) -> list[bytes]:
        """`get` of each, in their order; all bytes are in memory. Errors as in `put_many`."""
        return _in_parallel(self.get, digests)

    def stat(self, digest: str) -> Stored:
        """Without reading it; Missing where it is not stored."""
        found = self._objects.stat(path_of(digest))
        return Stored(digest, found.size, found.modified_us)

    def find_missing(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that are not stored, in their order; presence only, no rehash."""
        asked = list(digests)
        paths = [path_of(digest) for digest in asked]
        if len(paths) > _FEW:
            standing = set(self._objects.names("sha256/"))
            return [digest for digest, path in zip(asked, paths, strict=True) if path not in standing]
        stands = _in_parallel(self._stands, paths)
        return [digest for digest, there in zip(asked, stands, strict=True) if not there]

    def _stands(self, path: str) -> bool:
        try:
            self._objects.stat(path)
        except Missing:
            return False
        return True

    def digests(self) -> Iterator[str]:
        for path in self._objects.names("sha256/"):
            if digest := digest_at(path):
                yield digest

    def by_time(self, start_us: int = 0, end_us: int = END_OF_TIME_US) -> list[Stored]:
        """What was last put in [start, end), the earliest first."""
        found = [
            Stored(digest, stat.size, stat.modified_us)
            for path, stat in self._objects.stats("sha256/")
            if start_us <= stat.modified_us < end_us and (digest := digest_at(path))
        ]
        return sorted(found, key=lambda one: (one.modified_us, one.digest))


def _in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in the items' order, of few items at once. Leaving the pool waits for all that has begun."""
    results: list[Result] = []
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for item in items:
            if len(begun) == _PARALLEL:
                results.append(begun.popleft().result())
            begun.append(pool.submit(work, item))
        results += [one.result() for one in begun]
    return results


def open_objects(settings: Settings, ids: Ids) -> tuple[ObjectStore, ObjectStore]:
    """Where the evidence is kept: the blobs', and the log's."""
    if not settings.objects_url:
        return FolderObjects(settings.blobs_dir, ids), FolderObjects(settings.log_dir, ids)
    from render_platform.s3 import S3Objects  # half a second that only a bucket pays

    url, endpoint = settings.objects_url.rstrip("/"), settings.objects_endpoint or None
    blobs, log = (
        S3Objects(f"{url}/{name}", endpoint_url=endpoint, retention_days=days, ids=ids)
        for name, days in (("blobs", settings.object_lock_days), ("log", 0))
    )
    return blobs, log


def check_stores(settings: Settings, ids: Ids) -> None:
    """The start-up probe of both; UsageError where one cannot keep evidence."""
    for objects, name in zip(open_objects(settings, ids), ("blobs", "log"), strict=True):
        check_store(objects, ids, f"{settings.objects_url or settings.state_dir}/{name}")


# Reading many.


class Read(NamedTuple):
    """An object as it stands. `data` is empty where nobody asked for it; `error` says why there is none."""

    path: str
    digest: str = ""
    size: int = 0
    data: bytes = b""
    error: PlatformError | None = None


def read_each(objects: ObjectStore, paths: Sequence[str], keep: Callable[[str], bool]) -> Iterator[Read]:
    """Every object read once and hashed, in the order of `paths`; Unavailable where the store cannot answer.

    A few threads are ahead of the reader, because reading and SHA-256 run beside Python. In memory are at most
    OBJECTS_A_TASK × (2 × WORKERS + 1) objects whose data `keep` asks for, and one a thread of the others.
    """

    def read_some(some: Sequence[str]) -> list[Read]:
        return [_read(objects, path, keep(path)) for path in some]

    ahead: deque[Future[list[Read]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for start in range(0, len(paths), OBJECTS_A_TASK):
                ahead.append(pool.submit(read_some, paths[start : start + OBJECTS_A_TASK]))
                if len(ahead) > 2 * WORKERS:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for task in ahead:
                task.cancel()


def _read(objects: ObjectStore, path: str, keep: bool) -> Read:
    try:
        data = objects.read(path)
    except (Finding, Missing) as error:
        return Read(path, error=error)
    return Read(path, digest_of(data), len(data), data if keep else b"")


# Orphans.


@dataclass(frozen=True, slots=True)
class Orphan:
    name: str
    size: int
    modified_us: int


@dataclass
class Collection:
    """What `collect_orphans` found, and what it did: nothing where it was a plan."""

    orphans: list[Orphan] = field(default_factory=list)
    removed: list[Orphan] = field(default_factory=list)
    spared: list[Orphan] = field(default_factory=list)
    """Found, and not removed: named, written again or gone since, or locked by the store."""


def collect_orphans(
    objects: ObjectStore,
    is_named: Callable[[str], bool],
    clock: Clock,
    *,
    plan: bool,
    older_than_us: int = 7 * DAY_US,
) -> Collection:
    """Remove what nothing names and nobody has put for `older_than_us`; with `plan` only say what would be removed.

    `is_named(digest)`: does SQL or the log name it? It is asked for each object, and again right before a removal.
    Names that the CAS does not give are left alone: verification names them. Bad bytes in quarantine go once nothing
    names their digest, or its object stands well again; else they may be all that is left of it. `clock` is the
    machine's. UsageError below two days: a writer may take as long from its put to its commit.
    """
    if older_than_us < 2 * DAY_US:
        raise UsageError("orphans younger than two days may still be named", "collect what is older")
    before_us = clock.now_us() - older_than_us
    done = Collection()
    for name, stat in _old(objects, before_us):
        if _is_orphan(objects, name, is_named):
            done.orphans.append(Orphan(name, stat.size, stat.modified_us))
    for orphan in [] if plan else done.orphans:
        gone = _remove(objects, orphan.name, is_named, before_us)
        (done.removed if gone else done.spared).append(orphan)
    return done


def _old(objects: ObjectStore, before_us: int) -> Iterator[tuple[str, Stat]]:
    for prefix in ("", SCRATCH):  # what a killed writer or start-up probe left is removed with the rest
        for name, stat in objects.stats(prefix):
            if stat.modified_us <= before_us:
                yield name, stat


def _is_orphan(objects: ObjectStore, name: str, is_named: Callable[[str], bool]) -> bool:
    if digest := digest_at(name):
        return not is_named(digest)
    if match := _QUARANTINED.fullmatch(name):
        digest = match[1] + match[2]
        return not is_named(digest) or _reads_back(objects, digest)
    return name.startswith(SCRATCH) and name != LOCK


def _reads_back(objects: ObjectStore, digest: str) -> bool:
    try:
        return digest_of(objects.read(path_of(digest))) == digest
    except Missing:
        return False


def _remove(objects: ObjectStore, name: str, is_named: Callable[[str], bool], before_us: int) -> bool:
    """The order makes it safe. A put before `stat`: it is young, and stays. A put after it: the store removes the
    writing that was seen, and no other. A commit before `is_named`: it is named, and stays. A commit after it is of a
    put as above, or of one that is older than any writer takes."""
    try:
        seen = objects.stat(name)
    except Missing:
        return False
    if seen.modified_us > before_us or not _is_orphan(objects, name, is_named):
        return False
    removed = objects.delete(name, seen)
    if removed:
        _log.info("orphan_removed", name=name, size=seen.size)
    return removed


class NamedDigests:
    """`is_named` of a platform: what its database's log entries bind, and what stored batches wait to be logged with.

    Call it once the log has been published (`AuditLog.publish` stops where the published log is ahead of the database,
    and so names what the database does not). Reads each log entry once: the log only grows.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: set[str] = set()
        self._next = 0

    def __call__(self, digest: str) -> bool:
        if digest not in self._known:
            self._read_on()
        return digest in self._known

    def _read_on(self) -> None:
        with self._database.read() as connection:  # one snapshot: a batch that is logged meanwhile is in one of both
            waiting = sa.select(batches.c.blob_digest, batches.c.attestation_digest).where(batches.c.state == "stored")
            for blob, attestation in connection.execute(waiting):
                self._known |= {blob, attestation}
            while True:
                page = (
                    sa.select(log_entries.c.log_index, log_entries.c.entry)
                    .where(log_entries.c.log_index >= self._next)
                    .order_by(log_entries.c.log_index)
                    .limit(_ENTRIES)
                )
                rows = connection.execute(page).all()
                for index, data in rows:
                    entry = bytes(data)
                    self._known |= {digest_of(entry), *parse(entry).blobs}
                    self._next = index + 1
                if len(rows) < _ENTRIES:
                    return
