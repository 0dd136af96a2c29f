"""The audit log: append in SQL, integrate into tiles, sign, publish. The order is the point; see ARCHITECTURE.md.

1. The published checkpoint and the SQL head are compared: a head that is behind, or differs, stops everything.
2. The entry's bytes become a blob.
3. One SQL transaction: entry, head, and what the entry is about. Before it nothing happened; after it, roll forward.
4. Tiles and entry bundles of the head, made from committed entries; what exists must be byte-equal.
5. Sign the committed head. 6. Collect cosignatures. 7. Publish: never a smaller one, and read back. 8. Mark published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import sqlalchemy as sa

from render_platform import merkle, tiles
from render_platform.canonical import digest_of
from render_platform.cas import Cas
from render_platform.database import (
    UNPUBLISHED,
    Database,
    batch_acceptances,
    batches,
    checkpoints,
    log_entries,
    log_head,
)
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing, SequencerStopped, Unavailable
from render_platform.keyring import LogKeys
from render_platform.note import Checkpoint, Signer, sign_note
from render_platform.objects import ObjectStore
from render_platform.witness import Witnesses

CHECKPOINT = "checkpoint"
_ATTEMPTS = 5

Mark = Callable[[sa.Connection, int], None]
"""What else is committed with an entry: called inside its transaction, with its index."""


class AuditLog:
    def __init__(
        self, database: Database, cas: Cas, objects: ObjectStore, *signers: Signer, witnesses: Witnesses | None = None
    ) -> None:
        self._database = database
        self._cas = cas
        self._objects = objects
        self._keys = LogKeys(signers, self._key_entries, cas.get)
        self._witnesses = witnesses
        self._asked = False

    def append(self, draft: AuditEntry, mark: Mark) -> int:
        """Commit an entry and what `mark` does; gives its index. `draft.previous` is filled in here.

        An entry of the same type and batch_id that stands already is left as it is and its index given, without
        calling `mark`. Nobody sees the entry before `publish`. Two sequencers cannot both take one index.
        """
        self._compare()
        for _ in range(_ATTEMPTS):
            head, known = self._head_and_index(draft.type, draft.batch_id)
            if known is not None:
                return known
            parse(data := replace(draft, previous=head.last_entry_digest).to_bytes())  # else nobody could read it
            self._cas.put(data)
            if self._commit(head, draft, data, mark):
                return int(head.size)
        raise _taken()

    def publish(self) -> Checkpoint | None:
        """Make everything committed visible under a signed checkpoint; None while the log is empty.

        Rolls forward whatever an earlier crash left between commit and publication. Safe to repeat.
        Raises SequencerStopped where the published checkpoint is not one of this database's.
        """
        for _ in range(_ATTEMPTS):
            standing = self._compare()
            try:
                return self._publish(standing)
            except SequencerStopped:
                if self._published_bytes() == standing:  # else another sequencer has published: compare with that
                    raise
        raise _taken()

    def _publish(self, standing: bytes | None) -> Checkpoint | None:
        """`standing` is the checkpoint that was compared."""
        with self._database.read() as connection:
            head = _head(connection)
            marked = connection.execute(sa.select(checkpoints.c.note).filter_by(size=head.size)).scalar()
        if head.size == 0:
            return None
        checkpoint = Checkpoint(self._keys.origin, head.size, head.root)
        published = self._opened(standing)
        note = standing
        if note is None or published is None or published.size < head.size:
            self._write_tiles(published.size if published else 0, head.size)
            note = sign_note(checkpoint.text(), self._keys.signers(head.size)).encode()
        note = self._cosigned(note, head.size, standing)
        if note != standing or marked != note.decode():
            # A crash before this: the old checkpoint stands, and tiles that the next publish finds byte-equal.
            # `standing` is what was compared above: a checkpoint published meanwhile is never overwritten. One that
            # stands and is not marked is written again: who wrote it may have died before it was durable.
            self._objects.replace(CHECKPOINT, note, standing)
            self._read_back(checkpoint)
            # A crash before this commit: published, not marked; the next publish marks it.
            self._mark_published(checkpoint, note)
        return checkpoint

    def _cosigned(self, note: bytes, size: int, standing: bytes | None) -> bytes:
        """Step 6, and once a process for what stands. A witness that has cosigned another history stops the log."""
        if self._witnesses is None or (note == standing and self._asked):
            return note
        found = self._witnesses.cosign(note, lambda old: self._proof(old, size), standing)
        if found.ahead:
            raise SequencerStopped(
                f"a witness has cosigned {found.ahead} entries, and this database has {size}",
                "run the command again; if it stops again, this state is an older copy: run `render-platform recover`",
            )
        if found.shortfall:
            raise Unavailable(f"not published: {found.shortfall}", "start the witnesses, or lower witness_quorum")
        self._asked = True
        return found.note

    def _read_back(self, written: Checkpoint) -> None:
        """What stands now is what was written, or a larger one that another sequencer published meanwhile."""
        standing = self.published()
        if standing is None or standing.size < written.size or (standing.size == written.size and standing != written):
            raise SequencerStopped("the checkpoint does not read back as written", "check the store")

    def published(self) -> Checkpoint | None:
        """The checkpoint that stands published, its signature checked."""
        return self._opened(self._published_bytes())

    def _opened(self, data: bytes | None) -> Checkpoint | None:
        return None if data is None else self._keys.read_checkpoint(data)

    def check_tail(self, count: int = tiles.TILE_WIDTH) -> int:
        """How many of the newest entries are chained, and hashed as the head's; Finding where one is not."""
        self._compare()
        with self._database.read() as connection:
            head = _head(connection)
            start = max(0, head.size - count)
            entries = _column(connection, log_entries.c.entry, start, head.size)
            leaves = _column(connection, log_entries.c.leaf_hash, start, head.size)
        for before, after in pairwise(entries):
            if parse(after).previous != digest_of(before):
                raise Finding("an entry does not name the digest of the one before it")
        if any(merkle.leaf_hash(entry) != leaf for entry, leaf in zip(entries, leaves, strict=True)):
            raise Finding("an entry does not have the leaf hash that the log's root was made of")
        return len(entries)

    def _published_bytes(self) -> bytes | None:
        try:
            return self._objects.read(CHECKPOINT)
        except Missing:
            return None

    def _compare(self) -> bytes | None:
        """Step 1: the checkpoint that stands, if it is one of this database's.

        A restored database, a foreign log or a lost checkpoint stops here, before anything is written. The checkpoint
        is read before the database, which is never behind it; one that is published in between is read again.
        """
        standing = self._published_bytes()
        while True:
            stop = self._disagreement(self._opened(standing))
            now = self._published_bytes()
            if now == standing:
                break
            standing = now
        if stop is not None:
            raise stop
        return standing

    def _disagreement(self, published: Checkpoint | None) -> SequencerStopped | None:
        with self._database.read() as connection:
            head = _head(connection)
            last = connection.execute(sa.select(sa.func.max(checkpoints.c.size))).scalar() or 0
            if published is None and last:
                missing = f"log/checkpoint is missing, and size {last} was published"
                return SequencerStopped(missing, "restore the log folder")
            if published is None:
                return None
            if published.size > head.size:
                return SequencerStopped(
                    f"the published log has {published.size} entries, the database {head.size}: it is an older copy",
                    "run `render-platform recover`",
                )
            if published.size < last:
                return SequencerStopped(
                    f"the published log has {published.size} entries, and size {last} was published before",
                    "restore the newer log folder",
                )
            root = _root_at(connection, head, published.size)
        if root != published.root:
            return SequencerStopped(
                f"the published log and the database differ within the first {published.size} entries",
                "one of them was altered or belongs to another platform: run `render-platform verify`",
            )
        return None

    def _head_and_index(self, kind: str, batch_id: str) -> tuple[Any, int | None]:
        query = sa.select(log_entries.c.log_index).filter_by(type=kind, batch_id=batch_id)
        with self._database.read() as connection:
            return _head(connection), connection.execute(query).scalar()

    def _commit(self, head: Any, draft: AuditEntry, data: bytes, mark: Mark) -> bool:
        """Step 3. False where another sequencer has moved the head meanwhile: nothing was written."""
        leaf = merkle.leaf_hash(data)
        peaks = merkle.Peaks.from_bytes(head.size, head.peaks).append(leaf)
        with self._database.write() as connection:
            moved = connection.execute(
                log_head.update()
                .where(log_head.c.size == head.size, log_head.c.root == head.root, log_head.c.epoch == head.epoch)
                .values(size=peaks.size, peaks=peaks.to_bytes(), root=peaks.root(), last_entry_digest=digest_of(data))
            )
            if moved.rowcount != 1:
                return False
            named = {"type": draft.type, "batch_id": draft.batch_id, "hour_us": draft.recorded_hour}
            connection.execute(log_entries.insert().values(log_index=head.size, **named, entry=data, leaf_hash=leaf))
            mark(connection, head.size)
        return True

    def _write_tiles(self, old_size: int, new_size: int) -> None:
        """Step 4. Every tile is made from committed entries; one that stands already must hold the same bytes."""
        for tile in tiles.new_tiles(old_size, new_size):
            level, index, width = tile
            path = tiles.path_of(tile)
            if level is None:
                start = index * tiles.TILE_WIDTH
                data = tiles.encode_bundle(self._column(log_entries.c.entry, start, start + width))
            else:
                data = tiles.tile_hashes(level, index, width, partial(self._column, log_entries.c.leaf_hash))
            if not self._objects.create(path, data) and self._objects.read(path) != data:
                raise SequencerStopped(
                    f"log/{path} holds other bytes than the database's entries give",
                    "run `render-platform verify`; restore the log or the database, whichever was altered",
                )

    def _proof(self, old: int, size: int) -> list[bytes]:
        """That the tree of `size` extends its first `old` entries (RFC 6962, 2.1.2), out of its tiles."""
        lowest = old & -old  # the old tree's last perfect subtree, from which the path goes up
        ranges = [] if old in (0, size) else merkle.proof_ranges(old - 1, size)[lowest.bit_length() - 1 :]
        if ranges and old != lowest:
            ranges.insert(0, (old - lowest, old))
        return [self._node(start, end, size) for start, end in ranges]

    def _node(self, start: int, end: int, size: int) -> bytes:
        """The root over leaves [start, end), a subtree of the tree of `size`."""
        height = (end - start).bit_length() - 1
        if (middle := start + (1 << height)) < end:
            return merkle.node_hash(self._node(start, middle, size), self._node(middle, end, size))
        level, inside = divmod(height, 8)
        tile, at = divmod(start >> 8 * level, tiles.TILE_WIDTH)
        width = min(tiles.TILE_WIDTH, (size >> 8 * level) - tile * tiles.TILE_WIDTH)
        data = tiles.read_tile(self._objects.read, tiles.tile_path(level, tile, width))
        return merkle.root([data[n * 32 : n * 32 + 32] for n in range(at, at + (1 << inside))])

    def _key_entries(self) -> list[tuple[int, bytes]]:
        select = sa.select(log_entries.c.log_index, log_entries.c.entry).filter_by(type="key")
        with self._database.read() as connection:
            return [(index, bytes(entry)) for index, entry in connection.execute(select.order_by(sa.text("1")))]

    def _column(self, column: Any, start: int, end: int) -> list[bytes]:
        with self._database.read() as connection:
            return _column(connection, column, start, end)

    def _mark_published(self, checkpoint: Checkpoint, note: bytes) -> None:
        with self._database.write() as connection:
            connection.execute(checkpoints.delete().filter_by(size=checkpoint.size))  # it may be cosigned since
            row = {"size": checkpoint.size, "root": checkpoint.root, "note": note.decode()}
            connection.execute(checkpoints.insert().values(**row))
            connection.execute(
                batches.update()
                .where(batches.c.state == "logged", batches.c.log_index < checkpoint.size)
                .values(state="published")
            )


class BatchLogger:
    """stored → logged: an entry for each stored batch and each watermark, in the order in which they were sealed."""

    def __init__(self, database: Database, log: AuditLog) -> None:
        self._database = database
        self._log = log

    def log_stored(self, on_batch: Callable[[sa.Connection, int], None]) -> list[int]:
        """Log everything that is stored; gives the indexes. `on_batch(connection, hour_us)` joins each batch's commit.

        A batch that is still on its way holds back what was sealed after it: the log keeps the order of sealing.
        """
        indexes = []
        while (batch := self._next()) is not None:

            def mark(connection: sa.Connection, index: int, batch: Any = batch) -> None:
                connection.execute(
                    batches.update().where(batches.c.ordinal == batch.ordinal).values(state="logged", log_index=index)
                )
                if batch.type == "usage_batch":
                    on_batch(connection, batch.hour_us)

            indexes.append(self._log.append(_draft(batch), mark))
        return indexes

    def _next(self) -> Any:
        with self._database.read() as connection:
            batch = connection.execute(
                sa.select(batches, batch_acceptances.c.acceptances)
                .outerjoin(batch_acceptances, batch_acceptances.c.ordinal == batches.c.ordinal)
                .where(batches.c.state.in_(UNPUBLISHED[:-1]))
                .order_by(batches.c.ordinal)
                .limit(1)
            ).one_or_none()
        if batch is None or batch.state == "stored":
            return batch
        return batch if batch.state == "sealed" and batch.type == "watermark" else None


def _draft(batch: Any) -> AuditEntry:
    return AuditEntry(
        type=batch.type,
        batch_id=batch.batch_id,
        previous=FIRST_PREVIOUS,
        lane=batch.lane,
        recorded_hour=batch.hour_us,
        batch_seq=batch.batch_seq,
        first_recorded_at=batch.first_recorded_at,
        last_recorded_at=batch.last_recorded_at,
        complete_until=batch.complete_until,
        subject_digest=batch.blob_digest,
        subject_size=batch.blob_size,
        records=batch.records,
        gpu_time_ns=int(batch.gpu_time_ns),
        merkle_root=batch.merkle_root,
        attestation=batch.attestation_digest,
        acceptances=tuple(json.loads(batch.acceptances or "[]")),
    )


def create_head(database: Database) -> int:
    """The head of an empty log, where there is none; gives the log's size."""
    select = sa.select(log_head.c.size)
    with database.read() as connection:
        size = connection.execute(select).scalar()
    if size is not None:
        return int(size)
    empty = merkle.Peaks.empty()
    with database.write() as connection:
        if connection.execute(select).scalar() is None:
            connection.execute(
                log_head.insert().values(
                    id=1,
                    epoch=0,
                    size=0,
                    peaks=empty.to_bytes(),
                    root=empty.root(),
                    last_entry_digest=FIRST_PREVIOUS,
                )
            )
    return 0


def _taken() -> SequencerStopped:
    return SequencerStopped("other writers took the log's head five times in a row", "run the command again")


def _head(connection: sa.Connection) -> Any:
    return connection.execute(sa.select(log_head)).one()


def _root_at(connection: sa.Connection, head: Any, size: int) -> bytes:
    if size == head.size:
        return bytes(head.root)
    recorded = connection.execute(sa.select(checkpoints.c.root).filter_by(size=size)).scalar()
    if recorded is not None:
        return bytes(recorded)
    return merkle.root(_column(connection, log_entries.c.leaf_hash, 0, size))


def _column(connection: sa.Connection, column: Any, start: int, end: int) -> list[bytes]:
    found = (
        connection.execute(
            sa.select(column)
            .where(log_entries.c.log_index >= start, log_entries.c.log_index < end)
            .order_by(log_entries.c.log_index)
        )
        .scalars()
        .all()
    )
    if len(found) != end - start:
        raise SequencerStopped(
            f"the database lacks entries between {start} and {end}",
            "restore it from a backup, then run `render-platform recover`",
        )
    return [bytes(value) for value in found]
