"""Recovery: the published log is replayed into a database that is older than it; and the drill that shows it to work.

A restored database knows less than the log that was published from it and would fork it, so that AuditLog refuses it.
`Recovery.run` brings it up to the log, an entry a transaction, in the order of the log:

- The log is checked first: signature, tiles, entries, chain. A database that is no beginning of it is never repaired.
- What the log says stands. A batch's rows replace what the database holds of the same events and jobs; where that is
  under another entry of the log, it is a finding. Nothing is billed twice, and no job ends twice.
- The head moves with each entry, and reaches the end of the log in the last transaction. AuditLog refuses the database
  until then: after a crash anywhere `run` goes on where it was.
- Events that the log lacks stay unsealed. Nothing is signed; log and CAS are only read.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from render_platform import canonical, merkle, tiles
from render_platform import database as sql
from render_platform.audit_log import CHECKPOINT, create_head
from render_platform.batches import decode
from render_platform.canonical import digest_of
from render_platform.cas import Cas
from render_platform.clickhouse import ClickHouse
from render_platform.clock import HOUR_US, WINDOW_US, hour_of, iso
from render_platform.database import Database, batches, jobs, lanes, log_entries, log_head, usage_events
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, SequencerStopped, UsageError
from render_platform.events import COLUMNS, event_ids, plain_rows
from render_platform.evidence import Evidence, Progress
from render_platform.fast_path import CHUNK_ROWS, batch_token
from render_platform.hours import mark_dirty, mark_reported
from render_platform.note import Checkpoint, Verifier, read_checkpoint
from render_platform.objects import ObjectStore
from render_platform.outbox import LIVE, located, pruned_events, rows_of_batch
from render_platform.receipts import forget_erased, wipe
from render_platform.repair import put_logged

_ROWS, LOST_EPOCHS = 2_000, 100  # starts of a gateway after the backup, of which no entry speaks: at most so many
_VERIFY = "run `render-platform verify`; restore what is wrong from a copy"
_UNLOGGED = batches.c.state.in_(sql.UNPUBLISHED[:-1])
_ENDS = ("state", "attempt", "error_code", "finished_us")
_INSERT = sql.Prepared(usage_events.insert(), *COLUMNS, "lane", "batch_id")
Row = dict[str, Any]
Pruned = frozenset[int]
_END = sql.Prepared(jobs.update().where(jobs.c.job_id == sa.bindparam("id")), *_ENDS)


class PublishedLog(NamedTuple):
    """A log that was checked: the hashes of its entries, and what it says last of the jobs of a gateway and epoch."""

    checkpoint: Checkpoint
    note: str
    leaves: list[bytes]
    accepted: dict[tuple[str, int], Mapping[str, Any]]


def read_published(objects: ObjectStore, keys: Sequence[Verifier], progress: Progress) -> PublishedLog:
    """The log under `objects`; Finding where any of it does not hold, Missing where a file is not there."""
    note = objects.read(CHECKPOINT)
    checkpoint = read_checkpoint(note, keys)
    log, previous = PublishedLog(checkpoint, note.decode(), [], {}), FIRST_PREVIOUS
    for index, data in _read_entries(objects, checkpoint.size):
        progress("log", index, checkpoint.size)
        entry = parse(data)
        if entry.previous != previous:
            raise Finding(f"entry {index} does not name the digest of the entry before it", _VERIFY)
        previous = digest_of(data)
        log.leaves.append(merkle.leaf_hash(data))
        log.accepted.update({(one["gateway"], one["epoch"]): one for one in entry.acceptances})
    if merkle.root(log.leaves) != checkpoint.root:
        raise Finding("the entries do not hash to the checkpoint's root", _VERIFY)
    for tile in tiles.tiles_of(checkpoint.size):
        (level, at, width), path = tile, tiles.path_of(tile)
        hashes = tiles.tile_hashes(level, at, width, lambda a, b: log.leaves[a:b]) if level is not None else b""
        if level is not None and tiles.read_tile(objects.read, path) != hashes:
            raise Finding(f"log/{path} does not hold what the checkpoint covers", _VERIFY)
    return log


def _read_entries(objects: ObjectStore, size: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of [start, size); one bundle is in memory."""
    for first in range(start - start % tiles.TILE_WIDTH, size, tiles.TILE_WIDTH):
        width = min(tiles.TILE_WIDTH, size - first)
        path = tiles.entries_path(first // tiles.TILE_WIDTH, width)
        found = tiles.decode_bundle(tiles.read_tile(objects.read, path))
        if len(found) != width:
            raise Finding(f"log/{path} holds {len(found)} entries instead of {width}", _VERIFY)
        yield from ((index, data) for index, data in enumerate(found, first) if index >= start)


@dataclass
class Recovered:
    """What a recovery did; of a plan, what it would do. After a crash it counts what was left to do."""

    size_before: int
    size: int
    entries: Counter[str] = field(default_factory=Counter)  # by type
    events_restored: int = 0  # the database had lost them
    events_marked: int = 0  # the database held them as not logged yet
    events_superseded: list[str] = field(default_factory=list)  # of jobs that the log bills by another event: dropped
    events_raised: int = 0  # unsealed, of a time that the log declares complete: now at the frontier. 0 in a plan
    jobs_ended: int = 0  # the log has another end of them, or the database none
    batches_undone: int = 0  # on their way, and not in the log: their events are sealed anew
    customers_erased: int = 0  # whom the log says erased. 0 in a plan


class Recovery:
    """`database` has a head already (`create_head`); `log_keys` may sign the log's checkpoint."""

    def __init__(self, database: Database, cas: Cas, log: ObjectStore, log_keys: Sequence[Verifier]) -> None:
        self._database, self._cas, self._log, self._keys = database, cas, log, log_keys

    def plan(self, progress: Progress = lambda *_: None) -> Recovered:
        """What `run` would do. Writes nothing."""
        log, done = self._begin(progress)
        for index, data in _read_entries(self._log, len(log.leaves), done.size_before):
            progress("plan", index, done.size)
            entry = parse(data)
            done.entries[entry.type] += 1
            if entry.type == "usage_batch":
                with self._database.read() as connection:
                    for rows in _chunks(decode(self._cas.get(str(entry.subject_digest)))):
                        _standing(connection, rows, done)
        if done.entries:
            with self._database.read() as connection:
                done.batches_undone = connection.execute(sa.select(sa.func.count()).where(_UNLOGGED)).scalar_one()
        return done

    def run(self, progress: Progress = lambda *_: None) -> Recovered:
        """Replay what the database lacks; nothing where that is nothing.

        SequencerStopped for a fork or an older log; Missing or a Finding where log or CAS do not hold what was signed.
        """
        log, done = self._begin(progress)
        for index, data in _read_entries(self._log, len(log.leaves), done.size_before):
            progress("recover", index, done.size)
            entry = parse(data)
            subject = self._cas.get(entry.subject_digest) if entry.subject_digest else b""
            try:
                # A crash before this commit: as before. After it: one entry less to replay; after the last one, none.
                with self._database.write() as connection:
                    done.batches_undone += _undo_unlogged(connection)
                    _append(connection, index, data, entry)
                    _apply(connection, entry, subject, done)
                    if index + 1 == len(log.leaves):
                        _finish(connection, log, done)
            except sa.exc.IntegrityError as error:
                raise Finding(f"entry {index} bills or names what stands in the log already", _VERIFY) from error
            done.entries[entry.type] += 1
        wipe(self._database)  # what `forget_erased` took away is in SQLite's log of writes until then
        return done

    def _begin(self, progress: Progress) -> tuple[PublishedLog, Recovered]:
        """The log, and that the database is a beginning of it."""
        log = read_published(self._log, self._keys, progress)
        with self._database.read() as connection:
            head = connection.execute(sa.select(log_head)).one()
            hashes = _leaves(connection, head.size)
            last = connection.execute(sa.select(sa.func.max(sql.checkpoints.c.size))).scalar() or 0
        size, common = len(log.leaves), min(len(log.leaves), head.size)
        if size < last:
            raise SequencerStopped(f"the log has {size} entries, and {last} were published", "restore the newer log")
        if len(hashes) != head.size or merkle.root(hashes) != head.root or hashes[:common] != log.leaves[:common]:
            fork = "the database is not a beginning of the published log: a fork is never repaired"
            raise SequencerStopped(fork, "restore a database that is one, and run `render-platform recover` again")
        return log, Recovered(head.size, max(size, head.size))


def _leaves(connection: sa.Connection, size: int) -> list[bytes]:
    query = sa.select(log_entries.c.leaf_hash).where(log_entries.c.log_index < size)
    return [bytes(value) for value in connection.execute(query.order_by(log_entries.c.log_index)).scalars()]


def _append(connection: sa.Connection, index: int, data: bytes, entry: AuditEntry) -> None:
    """The entry, as AuditLog.append commits it; in a new epoch, so that no append goes on from the head before."""
    head = connection.execute(sa.select(log_head)).one()
    if head.size != index:
        raise SequencerStopped("another process moved the head of the log", "run the command again")
    leaf = merkle.leaf_hash(data)
    peaks = merkle.Peaks.from_bytes(head.size, head.peaks).append(leaf)
    moved = {"size": peaks.size, "peaks": peaks.to_bytes(), "root": peaks.root(), "last_entry_digest": digest_of(data)}
    connection.execute(log_head.update().values(epoch=head.epoch + 1, **moved))
    named = {"type": entry.type, "batch_id": entry.batch_id, "hour_us": entry.recorded_hour}
    connection.execute(log_entries.insert().values(log_index=index, entry=data, leaf_hash=leaf, **named))
    if entry.type in ("usage_batch", "watermark"):
        _put_batch(connection, index, entry)
        _put_lane(connection, entry)


def _put_batch(connection: sa.Connection, index: int, entry: AuditEntry) -> None:
    same = ("type", "batch_id", "lane", "batch_seq", "first_recorded_at", "last_recorded_at", "complete_until")
    values = {name: getattr(entry, name) for name in (*same, "records", "merkle_root")}
    values |= {"hour_us": entry.recorded_hour, "gpu_time_ns": str(entry.gpu_time_ns), "log_index": index}
    values |= {"blob_digest": entry.subject_digest, "blob_size": entry.subject_size}
    connection.execute(batches.insert().values(state="published", attestation_digest=entry.attestation, **values))


def _put_lane(connection: sa.Connection, entry: AuditEntry) -> None:
    """Time does not go back in a lane; one begun anew meanwhile begins where the log's did. A lost run's is over."""
    hour, query = entry.recorded_hour or 0, sa.select(lanes).filter_by(lane=entry.lane)
    if connection.execute(query).one_or_none() is None:
        new: dict[str, Any] = dict.fromkeys(("start_us", "frontier_us", "next_watermark_us"), hour)
        new |= {"lane": entry.lane, "state": "open" if entry.lane == LIVE else "finished"}
        connection.execute(lanes.insert().values(new))
    lane = connection.execute(query).one()
    frontier = max(lane.frontier_us, entry.complete_until or 0, entry.last_recorded_at or 0)
    declared = lane.next_watermark_us if lane.start_us <= hour else hour
    declared = max(declared, hour + HOUR_US if entry.type == "watermark" else 0)
    moved = {"start_us": min(lane.start_us, hour), "frontier_us": frontier, "next_watermark_us": declared}
    connection.execute(lanes.update().filter_by(lane=entry.lane).values(moved))


def _apply(connection: sa.Connection, entry: AuditEntry, subject: bytes, done: Recovered) -> None:
    """What else stands in SQL with the entry."""
    hour = entry.recorded_hour or 0
    if entry.type == "usage_batch":
        mark_dirty(connection, hour)
        for rows in _chunks(decode(subject)):
            standing, ends = _standing(connection, rows, done)
            connection.execute(usage_events.delete().where(usage_events.c.event_id.in_(standing)))
            _INSERT.run(connection, [{**row, "lane": entry.lane, "batch_id": entry.batch_id} for row in rows])
            _END.run(connection, ends)
            connection.execute(sql.job_bodies.delete().where(sql.job_bodies.c.job_id.in_([end["id"] for end in ends])))
    elif entry.type == "reconciliation":
        said = canonical.decode(subject)
        mark_reported(connection, hour, said["revision"], digest_of(subject), said["status"], len(said["batches"]))
    elif entry.type == "repair":
        for changed_us in put_logged(connection, canonical.decode(subject)):
            mark_dirty(connection, changed_us)


def _chunks(table: pa.Table) -> Iterator[list[Row]]:
    for start in range(0, table.num_rows, _ROWS):
        yield [dict(zip(COLUMNS, row, strict=True)) for row in plain_rows(table.slice(start, _ROWS))]


def _standing(connection: sa.Connection, rows: list[Row], done: Recovered) -> tuple[list[bytes], list[Row]]:
    """The events that the database holds of these or of their jobs, and the ends that it lacks of jobs; counted."""
    of_job, ids = {row["job_id"]: row for row in rows}, {row["event_id"] for row in rows}
    known = located(connection, ids, of_job)
    for event_id, _, index in known:
        if index is not None:
            raise Finding(f"the event {UUID(bytes=event_id)}, or its job, is in the log twice", _VERIFY)
    ends = []
    for job in connection.execute(sa.select(jobs).where(jobs.c.job_id.in_(of_job))).all():
        end = tuple(of_job[job.job_id][name] for name in ("status", "attempt", "error_code", "recorded_at"))
        if (job.state, job.attempt) != end[:2]:
            ends.append({"id": job.job_id, **dict(zip(_ENDS, end, strict=True))})
    found = [row.event_id for row in known]
    others = [event_id for event_id in found if event_id not in ids]
    done.events_superseded += [str(UUID(bytes=event_id)) for event_id in others]
    done.events_marked += len(found) - len(others)
    done.events_restored += len(rows) - len(found) + len(others)
    done.jobs_ended += len(ends)
    return found, ends


def _undo_unlogged(connection: sa.Connection) -> int:
    """Batches on their way give their rows back: the log may hold others under their names, or these very ones."""
    undone = connection.execute(sa.select(batches).where(_UNLOGGED)).all()
    for batch in undone:
        if batch.type == "watermark":
            declared = lanes.c.lane == batch.lane, lanes.c.next_watermark_us > batch.hour_us
            connection.execute(lanes.update().where(*declared).values(next_watermark_us=batch.hour_us))
        connection.execute(usage_events.update().filter_by(batch_id=batch.batch_id).values(batch_id=None))
        for table in (sql.batch_acceptances, batches):
            connection.execute(table.delete().filter_by(ordinal=batch.ordinal))
    return len(undone)


def _finish(connection: sa.Connection, log: PublishedLog, done: Recovered) -> None:
    """What the whole log says, with its last entry."""
    complete = sa.select(batches.c.lane, sa.func.max(batches.c.complete_until)).group_by(batches.c.lane)
    for lane, until in connection.execute(complete).all():
        late = usage_events.c.batch_id.is_(None), usage_events.c.lane == lane, usage_events.c.recorded_at < until
        to = sa.select(lanes.c.frontier_us).filter_by(lane=lane).scalar_subquery()
        done.events_raised += connection.execute(usage_events.update().where(*late).values(recorded_at=to)).rowcount
    logged = sa.select(sa.func.sum(batches.c.records)).filter_by(lane=sql.runs.c.lane, type="usage_batch")
    rows = logged.correlate(sql.runs).scalar_subquery()  # a run records its rows in their order, an event each
    connection.execute(sql.runs.update().where(sql.runs.c.next_row < rows).values(next_row=rows))
    done.customers_erased = forget_erased(connection)
    connection.execute(batches.update().filter_by(state="logged").values(state="published"))
    _put_acceptances(connection, log.accepted)
    values = {"size": log.checkpoint.size, "root": log.checkpoint.root, "note": log.note}
    connection.execute(sql.checkpoints.insert().values(**values))


def _put_acceptances(connection: sa.Connection, said: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Jobs are counted on from what the log says; no gateway begins an epoch again that the log may know."""
    table, unsaid = sql.acceptances, {"state": "counting", "sealed": 0, "through": None, "open": 0, "oldest": 1}
    connection.execute(table.update().where(table.c.state != "uncounted").values(**unsaid))
    for (gateway_id, epoch), one in said.items():
        of = {"gateway_id": gateway_id, "epoch": epoch}
        connection.execute(table.delete().filter_by(**of))
        values = {"state": "counting", "sealed": one["through"] - one["open"], "through": one["through"]}
        connection.execute(table.insert().values(**of, **values, open=one["open"], oldest=one["oldest"]))
    for gateway_id, epoch in {one: max(epoch for of, epoch in said if of == one) for one, _ in said}.items():
        newest = sa.case((sql.gateways.c.epoch < epoch, epoch), else_=sql.gateways.c.epoch) + LOST_EPOCHS
        connection.execute(sql.gateways.update().filter_by(gateway_id=gateway_id).values(epoch=newest))


@dataclass(frozen=True)
class Figures:
    """A state as of a log of `size`, by hour: how many events SQL and ClickHouse hold, and the SHA-256 over all rows.

    `waiting` counts events that are not under that log yet; they are in no other figure. `pruned`: batches, by their
    index in the log, whose rows SQL no longer has all of: of these, how many events are known, not their rows.
    """

    size: int
    log: dict[str, str]
    sql: dict[str, tuple[int, str]]
    clickhouse: dict[str, tuple[int, str]]
    waiting: dict[str, int]
    pruned: Pruned


def read_figures(database: Database, fast: ClickHouse, size: int, progress: Progress, pruned: Pruned) -> Figures:
    """One batch, or five minutes of ClickHouse, is in memory. ClickHouse's rows in other hours are `elsewhere`."""
    fast.make_ready()  # without tables it holds nothing, and that is known
    in_sql, in_fast = (defaultdict[int, list[Any]](lambda: [0, hashlib.sha256()]) for _ in ("SQL", "ClickHouse"))
    waiting = defaultdict[int, list[bytes]](list)
    logged, event = batches.c.log_index < size, usage_events.c
    with database.read() as connection:
        gone = sa.select(batches.c.log_index).join(pruned_events, pruned_events.c.ordinal == batches.c.ordinal)
        pruned |= (known := Counter(connection.execute(gone).scalars())).keys()
        root = merkle.root(_leaves(connection, size)).hex()
        for batch in connection.execute(sa.select(batches).where(logged).order_by(batches.c.log_index)).all():
            marks = batch.lane, batch.log_index, batch.state, batch.records, batch.complete_until, batch.blob_digest
            known[at := batch.log_index] += (rows := rows_of_batch(connection, batch.batch_id)).num_rows
            _hash(in_sql[batch.hour_us], rows[: 0 if at in pruned else None], (*marks, known[at]))
        later = event.batch_id.in_(sa.select(batches.c.batch_id).where(sa.or_(batches.c.log_index.is_(None), ~logged)))
        query = sa.select(event.event_id, event.recorded_at).where(event.batch_id.is_(None) | later)
        for event_id, at in connection.execute(query):
            waiting[hour_of(at)].append(event_id)
    elsewhere = fast.totals().events
    for done, hour in enumerate(hours := sorted({*in_sql, *waiting})):
        progress("compare", done, len(hours))
        ids = pa.array(waiting.get(hour, []), pa.binary(16))
        for start in range(hour, hour + HOUR_US, WINDOW_US):
            table = fast.rows(start, start + WINDOW_US)
            elsewhere -= table.num_rows
            _hash(in_fast[hour], table.filter(pc.invert(pc.is_in(event_ids(table), value_set=ids))))
    stores = _by_hour(in_sql), {**_by_hour(in_fast), "elsewhere": (elsewhere, "")}
    return Figures(size, {"root": root}, *stores, {iso(hour): len(waiting[hour]) for hour in sorted(waiting)}, pruned)


def _hash(into: list[Any], table: pa.Table, *marks: tuple[Any, ...]) -> None:
    into[0] += table.num_rows
    for row in (*marks, *plain_rows(table)):
        into[1].update(repr(row).encode())


def _by_hour(hashed: Mapping[int, list[Any]]) -> dict[str, tuple[int, str]]:
    return {iso(hour): (events, digest.hexdigest()) for hour, (events, digest) in sorted(hashed.items())}


def differences(live: Figures, rebuilt: Figures) -> list[tuple[str, str, Any, Any]]:
    """(store, hour, live, rebuilt) wherever they differ; None: nothing is there."""
    stores = [(store, getattr(live, store), getattr(rebuilt, store)) for store in ("log", "sql", "clickhouse")]
    found = [(store, at, a.get(at), b.get(at)) for store, a, b in stores for at in sorted({*a, *b})]
    return [one for one in found if one[2] != one[3]]


def restore_drill(
    evidence: Evidence, target: Path, open_fast: Callable[[], ClickHouse], live: Figures, progress: Progress
) -> tuple[Recovered, Figures]:
    """Rebuild SQL and ClickHouse in the new folder `target` from log and CAS alone; figures to compare with `live`.

    `open_fast` opens an empty ClickHouse; it is closed again. Public keys are enough: nothing is signed or published.
    After a crash, begin again with another folder.
    """
    try:
        target.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise UsageError(f"{target} cannot be made: {error.strerror}", "give a folder that is not there yet") from error
    cas = Cas(evidence.blobs)
    with closing(sql.open_sqlite(target / "platform.db")) as database, closing(open_fast()) as fast:
        create_head(database)
        done = Recovery(database, cas, evidence.log, evidence.log_keys).run(progress)
        for index, data in _read_entries(evidence.log, done.size):
            progress("clickhouse", index, done.size)
            entry = parse(data)
            table = decode(cas.get(str(entry.subject_digest))) if entry.type == "usage_batch" else pa.table({})
            for start in range(0, table.num_rows, CHUNK_ROWS):
                chunk = table.slice(start, CHUNK_ROWS)
                fast.insert_events(chunk, batch_token(chunk))
        return done, read_figures(database, fast, live.size, progress, live.pruned)
