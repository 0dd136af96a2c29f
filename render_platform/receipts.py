"""Receipts: the proof of one usage event as one text file, made from what is published; and the erasure of a customer.

A receipt is a C2SP tlog-proof (https://c2sp.org/tlog-proof) of the batch's entry. Its `extra` line carries what is
hashed below the entry: the event, its proof in the batch, and the opening of `customer_ref`. docs/spec/receipt.md has
every byte; `receipt_verifier` believes nothing that does not hash to what the checkpoint signs.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import sqlalchemy as sa

from render_platform import batches as batch_bytes
from render_platform import canonical, merkle, tiles
from render_platform.cas import Cas
from render_platform.database import (
    BUSY_TIMEOUT_S,
    Database,
    customers,
    idempotency_keys,
    job_bodies,
    job_outputs,
    jobs,
    log_entries,
    webhooks,
)
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing, Unavailable, UsageError
from render_platform.events import canonical_rows, event_ids
from render_platform.note import Checkpoint
from render_platform.objects import ObjectStore
from render_platform.outbox import (
    KEYS_REMEMBERED_S,
    Opening,
    forget_customer,
    located,
    opening_of,
    ref_to_erase,
    withdraw_keys,
)

_AGAIN = "run the command again"
HEADER = "c2sp.org/tlog-proof@v1"
VERSION = 1
RETRY_AFTER_S = 20
"""The age at which what waits is sealed, at the default cadence."""
_CHECKPOINT = "checkpoint"
_ROWS_AT_ONCE = 4_096
_ASK_AGAIN_S = 0.2
_CHOSEN = {table.name for table in (jobs, job_bodies, job_outputs, webhooks, idempotency_keys)}
"""Tables that hold what customers chose or got."""
_SEEING = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    " AND backend_xmin IS NOT NULL AND pid <> pg_backend_pid() AND xact_start < :begun"
)
"""Transactions for which PostgreSQL keeps rows that were deleted before a time."""


class UnknownEvent(UsageError):
    """No event or job has this id."""


class NotPublished(Unavailable):
    """The event or job is known, and its batch is not under the published checkpoint yet."""

    def __init__(self, message: str) -> None:
        super().__init__(message, f"ask again in {RETRY_AFTER_S} seconds")
        self.retry_after_s = RETRY_AFTER_S


@dataclass(frozen=True, slots=True)
class _Found:
    """What SQL says of an event: where its proof is, and who stands behind it. Nothing here is believed unproven."""

    entry_index: int | None
    opening: Opening | None
    erasure_index: int | None


class Receipts:
    """Makes receipts. For any number of threads; every call reads anew."""

    def __init__(self, database: Database, cas: Cas, log: ObjectStore) -> None:
        self._database = database
        self._cas = cas
        self._log = log

    def of_event(self, event_id: uuid.UUID, *, opened: bool = True) -> str:
        """The event's receipt under the checkpoint that is published now; unless `opened`, without the customer's name.

        With the salt that opens one receipt, all events of that customer can be told: it is for the customer alone.
        UnknownEvent, NotPublished; Finding where the evidence does not hold, Unavailable where it cannot be read. Holds
        one batch in memory, at most 50,000 rows.
        """
        with self._database.read() as connection:
            found = _find(connection, event_id)
        return self._make(event_id, found, opened)

    def of_job(self, job_id: uuid.UUID, *, opened: bool = True) -> str:
        """The receipt of the job's one event, as in `of_event`; NotPublished also while the job has not ended."""
        with self._database.read() as connection:
            known = located(connection, (), [job_id.bytes])
            if not known:
                if connection.execute(sa.select(jobs.c.state).filter_by(job_id=job_id.bytes)).scalar() is None:
                    raise UnknownEvent(f"no job {job_id} is known", "check the id")
                raise NotPublished(f"job {job_id} has not ended")
            event_id = uuid.UUID(bytes=known[0].event_id)
            found = _find(connection, event_id)
        return self._make(event_id, found, opened)

    def _make(self, event_id: uuid.UUID, found: _Found, opened: bool) -> str:
        log = _PublishedLog(self._log)  # read after SQL: a checkpoint is never behind what its database says of it
        if found.entry_index is None or found.entry_index >= log.size:
            raise NotPublished(f"event {event_id} is not under a published checkpoint yet")
        entry = log.entry(found.entry_index)
        row, index, proof = self._row(event_id, parse(entry))
        extra = {
            "version": VERSION,
            "entry": entry.decode(),
            "event": row.decode(),
            "event_index": index,
            "event_proof": [node.hex() for node in proof],
            "opening": _opened(found.opening) if opened else None,
            "erasure": log.erasure(found.erasure_index) if found.opening is None else None,
        }
        return encode(canonical.encode(extra), found.entry_index, log.proof(found.entry_index, entry), log.note)

    def _row(self, event_id: uuid.UUID, entry: AuditEntry) -> tuple[bytes, int, list[bytes]]:
        """The event's canonical bytes, its index in the batch and its proof there; checked against the entry."""
        where = f"batch {entry.batch_id}"
        if entry.subject_digest is None or entry.merkle_root is None:
            raise Finding(f"the entry of {where} binds no rows", "run `render-platform verify`")
        table = batch_bytes.decode(self._cas.get(entry.subject_digest))
        index = event_ids(table).index(pa.scalar(event_id.bytes, pa.binary(16))).as_py()
        if index < 0:
            raise Finding(f"{where} does not hold the event {event_id}", "run `render-platform verify`")
        hashes: list[bytes] = []
        row = b""
        for start in range(0, table.num_rows, _ROWS_AT_ONCE):  # the rows' text is larger than the rows: never all of it
            rows = canonical_rows(table.slice(start, _ROWS_AT_ONCE))
            hashes += map(merkle.leaf_hash, rows)
            row = rows[index - start] if start <= index < start + len(rows) else row
        proof = merkle.inclusion_proof(index, hashes)
        merkle.verify_inclusion(hashes[index], index, entry.records, proof, bytes.fromhex(entry.merkle_root))
        return row, index, proof


def encode(extra: bytes, index: int, proof: Sequence[bytes], note: str) -> str:
    """The text of a tlog-proof; `note` is the checkpoint as it was published, with every signature line it has."""
    lines = [HEADER, f"extra {_base64(extra)}", f"index {index}", *map(_base64, proof), "", note]
    return "\n".join(lines)


class _PublishedLog:
    """The log under one published checkpoint, read from its files: a handful of them, whatever its size."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._read: dict[str, bytes] = {}
        self.note, checkpoint = _open_checkpoint(objects)
        self.size = checkpoint.size
        self._root = checkpoint.root

    def entry(self, index: int) -> bytes:
        """The bytes of an entry below `size`; Finding where its bundle is short."""
        bundle, at = divmod(index, tiles.TILE_WIDTH)
        entries = tiles.decode_bundle(self._tile(None, bundle))
        if at >= len(entries):
            raise Finding(f"the log's bundle {bundle} lacks entry {index}", "run `render-platform verify`")
        return entries[at]

    def proof(self, index: int, entry: bytes) -> list[bytes]:
        """The inclusion proof of `entry`; Finding where the tiles do not lead from it to the checkpoint's root."""
        proof = [self._hash(start, end) for start, end in merkle.proof_ranges(index, self.size)]
        merkle.verify_inclusion(merkle.leaf_hash(entry), index, self.size, proof, self._root)
        return proof

    def erasure(self, index: int | None) -> dict[str, Any] | None:
        """The entry of an erasure with its proof, as a receipt carries it; None where it is not published yet."""
        if index is None or index >= self.size:
            return None
        entry = self.entry(index)
        proof = self.proof(index, entry)
        return {"entry": entry.decode(), "index": index, "proof": [node.hex() for node in proof]}

    def _hash(self, start: int, end: int) -> bytes:
        """The root over the leaves [start, end), one of `merkle.proof_ranges`, from its largest perfect subtrees."""
        peaks, left = [], end - start
        while left:
            height = left.bit_length() - 1
            peaks.append(self._perfect(height, (end - left) >> height))
            left -= 1 << height
        return merkle.Peaks(end - start, tuple(peaks)).root()

    def _perfect(self, height: int, index: int) -> bytes:
        """The root of the perfect subtree number `index` of 2^height leaves: 1 to 128 neighbours of one tile."""
        level, inside = divmod(height, 8)
        tile, at = divmod(index << inside, tiles.TILE_WIDTH)
        data = self._tile(level, tile)[at * merkle.HASH_BYTES : (at + (1 << inside)) * merkle.HASH_BYTES]
        if len(data) != merkle.HASH_BYTES << inside:
            raise Finding(f"the log's tile {tiles.tile_path(level, tile)} is short", "run `render-platform verify`")
        return merkle.root([data[i : i + merkle.HASH_BYTES] for i in range(0, len(data), merkle.HASH_BYTES)])

    def _tile(self, level: int | None, index: int) -> bytes:
        """The bytes of a tile as of `size`."""
        whole = tiles.path_of((level, index, tiles.TILE_WIDTH))
        if whole not in self._read:
            width = min(tiles.TILE_WIDTH, (self.size >> 8 * (level or 0)) - index * tiles.TILE_WIDTH)
            self._read[whole] = tiles.read_tile(self._objects.read, tiles.path_of((level, index, width)))
        return self._read[whole]


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure found. `customer_ref` is None where nothing stood behind the id (any more)."""

    customer_ref: str | None
    entry_index: int | None


Append = Callable[[AuditEntry, Callable[[sa.Connection, int], None]], int]


class Erasure:
    """Makes a customer's identity unreadable. Every proof stays valid: `customer_ref` stays where it is.

    `append` and `publish` are those of the audit log.
    """

    def __init__(
        self,
        database: Database,
        append: Append,
        publish: Callable[[], object],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._database = database
        self._append = append
        self._publish = publish
        self._sleep = sleep

    def erase(self, issuer: str, customer_id: str) -> Erased:
        """Delete the customer's salt, mapping, API keys and settings, and log an `erasure` entry, in one transaction.

        UsageError while a job of the customer has not ended. Harmless to repeat, which also finishes what a crash left:
        before the commit nothing has happened; after it the identity is gone, and its entry not yet published. A later
        request of the same id is a new customer's, with a new salt. Raises Unavailable where the database's file may
        still hold the salt.
        """
        with self._database.read() as connection:
            ref = ref_to_erase(connection, issuer, customer_id)
        with self._database.write() as connection:
            withdrawn = withdraw_keys(connection, issuer, customer_id)
        if withdrawn:
            self._sleep(KEYS_REMEMBERED_S + 1)  # gateways may still take them: what they accept is of this identity

        def forget(connection: sa.Connection, _index: int) -> None:
            ref_to_erase(connection, issuer, customer_id)  # a job may have come meanwhile: this transaction decides
            forget_customer(connection, issuer, customer_id, ref)

        index = None
        if ref is not None:
            # The entry names the reference, which is in the log already, and never the id.
            index = self._append(AuditEntry(type="erasure", batch_id=ref, previous=FIRST_PREVIOUS), forget)
        # Where no entry was added: the keys of one who never asked for anything; or one erased before, whose identity
        # has come back with an older copy of the database.
        with self._database.write() as connection:
            forget_customer(connection, issuer, customer_id, ref)
        self._publish()
        wipe(self._database)
        return Erased(ref, index)


def forget_erased(connection: sa.Connection) -> int:
    """Forget again whom the log says is erased: an older copy of the database has them back. Gives how many."""
    erased = sa.select(log_entries.c.batch_id).filter_by(type="erasure")
    rows = connection.execute(sa.select(customers).where(customers.c.customer_ref.in_(erased))).all()
    for row in rows:
        forget_customer(connection, row.issuer, row.customer_id, row.customer_ref)
    return len(rows)


def wipe(database: Database, patience_s: float = BUSY_TIMEOUT_S) -> None:
    """Take what was deleted out of the database's files: write them anew, and empty SQLite's log of writes.

    Rows move between pages as tables grow, and older pages keep copies: deleting overwrites the last place at most.
    Takes a time in proportion to the database, in which others wait. Unavailable where others keep it from it, on
    PostgreSQL for longer than `patience_s`.
    """
    if database.engine.dialect.name == "postgresql":
        _wipe_postgres(database, patience_s)
        return
    connection = database.engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("VACUUM")
        (busy, _, _) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except database.engine.dialect.loaded_dbapi.OperationalError as error:
        raise Unavailable(f"the database's files may still hold what was erased: {error}", _AGAIN) from error
    finally:
        connection.close()
    if busy:
        raise Unavailable("the database's log of writes is in use, and may still hold what was erased", _AGAIN)


def _wipe_postgres(database: Database, patience_s: float) -> None:
    """The tables that held what was erased, and the samples of their columns that the planner keeps, where the role may
    write those anew. What the server's log of writes, its copies and its backups still hold: docs/gateway.md."""
    with database.read() as connection:
        inspector = sa.inspect(connection)
        columns = {name: {one["name"] for one in inspector.get_columns(name)} for name in inspector.get_table_names()}
    holding = sorted(name for name, have in columns.items() if name in _CHOSEN or have & {"customer_id", "customers"})
    try:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.detach()  # the bound on the server's silence is lifted for this one connection
            connection.connection.dbapi_connection.answer_s = math.inf  # type: ignore[union-attr]
            _wait_for_older(connection, patience_s)
            connection.exec_driver_sql(f"VACUUM (FULL, ANALYZE) {', '.join(holding)}")
            connection.exec_driver_sql("VACUUM (FULL) pg_statistic")
    except sa.exc.DatabaseError as error:
        raise Unavailable(f"the database's files may still hold what was erased: {error.orig}", _AGAIN) from error


def _wait_for_older(connection: sa.Connection, patience_s: float) -> None:
    """A row that was deleted stays in the files for as long as a transaction that began before may read it."""
    begun, until = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one(), time.monotonic() + patience_s
    while seeing := connection.execute(_SEEING, {"begun": begun}).scalar_one():
        if time.monotonic() > until:
            raise Unavailable(f"{seeing} older transactions may still read what was erased, and keep it", _AGAIN)
        time.sleep(_ASK_AGAIN_S)


def _find(connection: sa.Connection, event_id: uuid.UUID) -> _Found:
    """Where the event stands in SQL; UnknownEvent where it does not."""
    known = located(connection, [event_id.bytes])
    if not known:
        raise UnknownEvent(f"no event {event_id} is known", "check the id; a job's event is found by the job's id")
    row = known[0]
    erasure = sa.select(log_entries.c.log_index).filter_by(type="erasure", batch_id=row.customer_ref)
    return _Found(row.log_index, opening_of(connection, row.customer_ref), connection.execute(erasure).scalar())


def _opened(opening: Opening | None) -> dict[str, str] | None:
    return None if opening is None else {"customer_id": opening.customer_id, "salt": opening.salt.hex()}


def _open_checkpoint(objects: ObjectStore) -> tuple[str, Checkpoint]:
    """The published note, and what it says. Its signatures are for whoever verifies the receipt."""
    try:
        note = objects.read(_CHECKPOINT).decode()
    except Missing:
        raise NotPublished("no checkpoint is published yet") from None
    except UnicodeDecodeError as error:
        raise Finding("log/checkpoint is not text", "run `render-platform verify`") from error
    return note, Checkpoint.parse(note.partition("\n\n")[0] + "\n")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
