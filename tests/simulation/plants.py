"""Bugs that are planted into the library, one at a time: a simulation that cannot find them finds nothing.

Each is what a careless change could make of the real code; each is a context manager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import sqlalchemy as sa

from render_platform import merkle, objects
from render_platform.audit_log import AuditLog, Mark
from render_platform.canonical import digest_of
from render_platform.clock import HOUR_US
from render_platform.database import log_entries, log_head, usage_events
from render_platform.entries import AuditEntry
from render_platform.errors import Unavailable
from render_platform.objects import FolderObjects
from render_platform.sealing import Delivery, Sealer


@contextmanager
def lost_delivery_mark() -> Iterator[None]:
    """The entry is committed first, and what it is about is marked as delivered in a transaction of its own."""
    commit = AuditLog._commit

    def commit_apart(self: AuditLog, head: Any, draft: AuditEntry, data: bytes, mark: Mark) -> bool:
        if not commit(self, head, draft, data, lambda *_: None):
            return False
        with self._database.write() as connection:
            mark(connection, head.size)
        return True

    with mock.patch.object(AuditLog, "_commit", commit_apart):
        yield


@contextmanager
def double_seal() -> Iterator[None]:
    """Rows are chosen by their hour, and not by whether they have a batch already, where the clock went back."""

    def move_rows(self: Sealer, connection: sa.Connection, batch: Any, limit: int) -> int:
        newest = sa.select(sa.func.max(usage_events.c.recorded_at)).scalar_subquery()
        chosen = (
            sa.select(usage_events.c.event_id)
            .where(usage_events.c.lane == batch.lane, usage_events.c.recorded_at >= batch.hour_us)
            .where(usage_events.c.recorded_at < batch.hour_us + HOUR_US)
            .where(usage_events.c.batch_id.is_(None) | (usage_events.c.recorded_at == newest))
            .limit(limit)
        )
        update = usage_events.update().where(usage_events.c.event_id.in_(chosen)).values(batch_id=batch.batch_id)
        return int(connection.execute(update).rowcount)

    with mock.patch.object(Sealer, "_move_rows", move_rows):
        yield


@contextmanager
def skipped_folder_fsync() -> Iterator[None]:
    """A name is linked, and its folder is not synced."""
    with mock.patch.object(objects, "sync_folder"):
        yield


@contextmanager
def skipped_file_fsync() -> Iterator[None]:
    """A file is written, and not synced."""

    def write_scratch(self: FolderObjects, data: bytes) -> Any:
        folder = self._root / ".tmp"
        self._make_folders(folder)
        scratch = folder / self._ids.random(8).hex()
        with scratch.open("xb") as file:
            file.write(data)
        return scratch

    with mock.patch.object(FolderObjects, "_write_scratch", write_scratch):
        yield


@contextmanager
def forked_head() -> Iterator[None]:
    """The published checkpoint is not compared with the database's head: a restored copy writes on."""
    with mock.patch.object(AuditLog, "_disagreement", return_value=None):
        yield


@contextmanager
def stolen_head() -> Iterator[None]:
    """The head is set without comparing it: of two writers the later one wins."""

    def commit(self: AuditLog, head: Any, draft: AuditEntry, data: bytes, mark: Mark) -> bool:
        leaf = merkle.leaf_hash(data)
        peaks = merkle.Peaks.from_bytes(head.size, head.peaks).append(leaf)
        named = {"type": draft.type, "batch_id": draft.batch_id, "hour_us": draft.recorded_hour}
        values = {"size": peaks.size, "peaks": peaks.to_bytes(), "root": peaks.root()}
        with self._database.write() as connection:
            connection.execute(log_head.update().values(last_entry_digest=digest_of(data), **values))
            connection.execute(log_entries.delete().where(log_entries.c.log_index >= head.size))
            connection.execute(log_entries.insert().values(log_index=head.size, entry=data, leaf_hash=leaf, **named))
            mark(connection, head.size)
        return True

    with mock.patch.object(AuditLog, "_commit", commit):
        yield


@contextmanager
def unnamed_batch() -> Iterator[None]:
    """A batch's object is put after the commit that names it; a put that fails is left for a next time."""
    store = Delivery.store

    def store_later(self: Delivery, batch_id: str, rows: Any) -> None:
        blobs: list[bytes] = []

        class Later:
            def put(self, data: bytes) -> str:
                blobs.append(data)
                return digest_of(data)

        cas, self._cas = self._cas, Later()  # type: ignore[assignment]
        try:
            store(self, batch_id, rows)
        finally:
            self._cas = cas
        with suppress(Unavailable):
            for data in blobs:
                cas.put(data)

    with mock.patch.object(Delivery, "store", store_later):
        yield


PLANTS: dict[str, Callable[[], Any]] = {
    plant.__name__: plant
    for plant in (
        lost_delivery_mark,
        double_seal,
        skipped_folder_fsync,
        skipped_file_fsync,
        forked_head,
        stolen_head,
        unnamed_batch,
    )
}
