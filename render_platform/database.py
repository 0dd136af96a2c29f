"""The SQL side: tables, and transactions that say whether they write.

SQLite runs with WAL and synchronous=FULL, and every writing transaction begins IMMEDIATE: a deferred one that reads
and then writes fails at once, whatever the time-out. The SQLite in use is the one of the pysqlite3 wheel, because the
interpreter's own may lack the fix for WAL-reset corruption with several writing connections (3.51.3).

PostgreSQL gives the same promise by an advisory lock that every writing transaction holds to its end: writers come one
after another there too, so that what was read in `write()` is still so at its commit. The server cuts off a holder that
stands still, and undoes what it did. Nothing asks for an order of text that collations differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy import event

from render_platform.clock import unless_silent
from render_platform.errors import RecordError, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA

try:
    import pysqlite3 as sqlite_module
except ImportError:  # a platform without the wheel uses the interpreter's own
    import sqlite3 as sqlite_module

BUSY_TIMEOUT_S = 30
FROZEN_AFTER_S = 10  # without a statement; less than others wait for their turn, and than a lease lasts
CONNECT_S, PEER_S, ANSWER_S = 10, 20, 60
"""PostgreSQL: to be connected; for a peer to acknowledge, less than a lease; to answer, more than a wait for a lock."""
_WRITER_LOCK = 0x72656E646572  # the key of PostgreSQL's advisory lock, one in a database

metadata = sa.MetaData()


def _type(kind: pa.DataType) -> sa.types.TypeEngine[Any]:
    if kind == pa.uuid() or pa.types.is_fixed_size_binary(kind):
        return sa.LargeBinary()
    return sa.Text() if pa.types.is_string(kind) else sa.BigInteger()


def _partial(name: str, *columns: str, where: str) -> sa.Index:
    return sa.Index(name, *columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _table(name: str, *parts: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, metadata, *parts)


lanes = _table(
    "lanes",
    sa.Column("lane", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),  # open | finished
    sa.Column("start_us", sa.BigInteger, nullable=False),  # the hour that the lane begins with
    sa.Column("end_us", sa.BigInteger),  # no row of the lane falls at or after it; null: it goes on
    sa.Column("frontier_us", sa.BigInteger, nullable=False),  # no row will be recorded before it
    sa.Column("next_watermark_us", sa.BigInteger, nullable=False),  # the first hour not yet declared complete
)
customers = _table(
    "customers",
    sa.Column("customer_ref", sa.Text, primary_key=True),
    sa.Column("issuer", sa.Text, nullable=False),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("issuer", "customer_id"),
)
batches = _table(
    "batches",
    sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("batch_id", sa.Text, nullable=False, unique=True),
    sa.Column("type", sa.Text, nullable=False),  # usage_batch | watermark
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("hour_us", sa.BigInteger, nullable=False),
    sa.Column("batch_seq", sa.Integer),
    sa.Column("state", sa.Text, nullable=False),  # filling > closed > sealed > stored > logged > published
    sa.Column("records", sa.Integer, nullable=False, default=0),
    sa.Column("gpu_time_ns", sa.Text, nullable=False, default="0"),  # decimal digits: may pass 63 bits
    sa.Column("first_recorded_at", sa.BigInteger),
    sa.Column("last_recorded_at", sa.BigInteger),
    sa.Column("complete_until", sa.BigInteger),
    sa.Column("merkle_root", sa.Text),
    sa.Column("blob_digest", sa.Text),
    sa.Column("blob_size", sa.BigInteger),
    sa.Column("attestation_digest", sa.Text),
    sa.Column("log_index", sa.BigInteger),
    sa.UniqueConstraint("hour_us", "batch_seq"),
    sa.Index("batches_by_state", "state", "ordinal"),
)
UNPUBLISHED = ("filling", "closed", "sealed", "stored", "logged")  # by name: the index serves
usage_events = _table(
    "usage_events",
    *(sa.Column(f.name, _type(f.type), primary_key=f.name == "event_id", nullable=f.nullable) for f in EVENT_SCHEMA),
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text),
    sa.UniqueConstraint("job_id"),
    _partial("usage_events_unsealed", "lane", "recorded_at", where="batch_id IS NULL"),
    _partial("usage_events_by_batch", "batch_id", where="batch_id IS NOT NULL"),
)
log_head = _table(
    "log_head",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("peaks", sa.LargeBinary, nullable=False),
    sa.Column("root", sa.LargeBinary, nullable=False),
    sa.Column("last_entry_digest", sa.Text, nullable=False),
)
log_entries = _table(
    "log_entries",
    sa.Column("log_index", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text, nullable=False),
    sa.Column("hour_us", sa.BigInteger),
    sa.Column("entry", sa.LargeBinary, nullable=False),
    sa.Column("leaf_hash", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("type", "batch_id"),
    sa.Index("log_entries_by_hour", "hour_us", "type"),
)
checkpoints = _table(
    "checkpoints",
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("root", sa.LargeBinary, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)
runs = _table(
    "runs",
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("trace_digest", sa.Text, nullable=False),
    sa.Column("trace_path", sa.Text, nullable=False),  # for people: which file to give again
    sa.Column("lane", sa.Text, nullable=False),
    sa.Column("next_row", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # replaying > replayed > finished
)
gateways = _table(
    "gateways",
    sa.Column("gateway_id", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),  # one more at each start
    sa.Column("lease_until_us", sa.BigInteger, nullable=False),  # later, its jobs may be taken over
    sa.Column("fast_path_dropped", sa.BigInteger, nullable=False, default=0),  # as of the last renewal
)
jobs = _table(
    "jobs",
    sa.Column("job_id", sa.LargeBinary, primary_key=True),
    sa.Column("gateway_id", sa.Text, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),  # contiguous from 1 in each epoch
    sa.Column("request_id", sa.LargeBinary, nullable=False),
    sa.Column("request_digest", sa.LargeBinary, nullable=False),
    sa.Column("customer_ref", sa.Text, nullable=False),
    sa.Column("pricing_tier", sa.Text, nullable=False),
    sa.Column("lane", sa.Text, nullable=False),  # high | normal | low
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("format", sa.Text),
    sa.Column("backend", sa.Text),  # the one that was asked for
    sa.Column("webhook", sa.Text),
    sa.Column("direct", sa.Boolean, nullable=False),  # its client waits on the connection: no body is kept
    sa.Column("state", sa.Text, nullable=False),  # queued > running > success | error | timeout | cancelled
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("accepted_us", sa.BigInteger, nullable=False),
    sa.Column("deadline_us", sa.BigInteger, nullable=False),
    sa.Column("finished_us", sa.BigInteger),
    sa.Column("error_code", sa.Text),
    sa.UniqueConstraint("gateway_id", "epoch", "seq"),
    _partial("jobs_unfinished", "state", where="state IN ('queued', 'running')"),
    sa.Index("jobs_by_customer", "customer_ref", "job_id"),
)
acceptances = _table(  # what entries of the live lane have said, or will say, of the jobs of each epoch
    "acceptances",
    sa.Column("gateway_id", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, nullable=False),  # counting > settled; uncounted: begun before jobs were counted
    sa.Column("sealed", sa.BigInteger, nullable=False),  # its jobs that have their event in a batch
    sa.Column("through", sa.BigInteger),  # as last said, with `open` and `oldest`; null: not yet
    sa.Column("open", sa.BigInteger, nullable=False),
    sa.Column("oldest", sa.BigInteger, nullable=False),
    sa.Index("acceptances_by_state", "state", "gateway_id", "epoch"),
)
batch_acceptances = _table(  # a table and no column of `batches`: older state folders get it as they are opened
    "batch_acceptances",
    sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=False),  # of the batch or watermark
    sa.Column("acceptances", sa.Text, nullable=False),  # JSON, as its entry will have it
)
job_bodies = _table(
    "job_bodies",
    sa.Column("job_id", sa.LargeBinary, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),  # the request, until the job has ended
)
job_outputs = _table(
    "job_outputs",
    sa.Column("job_id", sa.LargeBinary, primary_key=True),
    sa.Column("content_type", sa.Text, nullable=False),
    sa.Column("output", sa.LargeBinary, nullable=False),
    sa.Column("expires_us", sa.BigInteger, nullable=False, index=True),
)
idempotency_keys = _table(  # never pruned
    "idempotency_keys",
    sa.Column("customer_ref", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("request_digest", sa.LargeBinary, nullable=False),
    sa.Column("job_id", sa.LargeBinary, nullable=False),
)
webhooks = _table(
    "webhooks",
    sa.Column("job_id", sa.LargeBinary, primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_us", sa.BigInteger, index=True),  # null: delivered, or given up
    sa.Column("status", sa.Integer),  # the last answer's
)


class Prepared:
    """A statement that is compiled once a dialect, with values by the names of its parameters: for the hot path, where
    SQLAlchemy's work on a statement outweighs the database's."""

    def __init__(self, statement: sa.Insert | sa.Update | sa.Delete | sa.Select[Any], *names: str) -> None:
        self._statement, self._names = statement, names
        self._compiled: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any], dict[str, Any]]] = {}

    def run(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many rows of the table it inserted or changed, over all of `rows`, which name the same values."""
        if not rows:
            return 0
        sql, values_of, constants = self._compile(connection.dialect)
        values = [values_of({**constants, **row}) for row in rows] if constants else [values_of(row) for row in rows]
        with _driver(connection, sql) as cursor:
            cursor.executemany(sql, values)
            return int(cursor.rowcount)

    def first(self, connection: sa.Connection, **row: Any) -> Sequence[Any] | None:
        """The first row that a statement reads, or None."""
        sql, values_of, constants = self._compile(connection.dialect)
        with _driver(connection, sql) as cursor:
            cursor.execute(sql, values_of({**constants, **row}))
            return cursor.fetchone()  # type: ignore[no-any-return]

    def _compile(self, dialect: sa.Dialect) -> tuple[str, Callable[[Mapping[str, Any]], Any], dict[str, Any]]:
        if known := self._compiled.get(dialect.name):
            return known
        compiled = self._statement.compile(dialect=dialect, column_keys=self._names or None)
        constants = {name: value for name, value in compiled.params.items() if value is not None}
        values_of: Callable[[Mapping[str, Any]], Any] = dict
        if (order := compiled.positiontup) is not None:
            values_of = itemgetter(*order) if len(order) > 1 else lambda row: (row[order[0]],)
        self._compiled[dialect.name] = str(compiled), values_of, constants
        return self._compiled[dialect.name]


@contextmanager
def _driver(connection: sa.Connection, sql: str) -> Iterator[Any]:
    """The driver's own cursor: SQLAlchemy's statements and results cost more than the rows. Errors are SQLAlchemy's."""
    base = connection.dialect.loaded_dbapi.Error
    with closing(connection.connection.cursor()) as cursor:
        try:
            yield cursor
        except base as error:
            raise sa.exc.DBAPIError.instance(sql, None, error, base, hide_parameters=True) from error


class Database:
    """One SQL database. `read()` and `write()` give a connection inside a transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Commits at the end: durable when the block is left. Any error rolls everything back."""
        with self._connection(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A snapshot that blocks no writer."""
        with self._connection(writes=False) as connection, connection.begin():
            yield connection

    @contextmanager
    def settled(self) -> Iterator[sa.Connection]:
        """As `read()`, once each write that was under way has ended: a server may yet commit for a lost connection."""
        if self.engine.dialect.name == "postgresql":
            with self._connection(writes=True) as connection, connection.begin():
                pass
        with self.read() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _connection(self, *, writes: bool) -> Iterator[sa.Connection]:
        try:
            with self.engine.connect().execution_options(writes=writes) as connection:
                yield connection
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DataError:  # its text may quote the value
            raise RecordError("a value", "is not one that PostgreSQL can hold", "leave out NUL characters") from None
        except sa.exc.DatabaseError as error:
            held = isinstance(error, sa.exc.OperationalError) or str(getattr(error.orig, "sqlstate", ""))[:2] == "25"
            file = self.engine.url.database
            part = "the server" if self.engine.dialect.name == "postgresql" else f"the disk of {file}"
            remedy = f"check {part}, and that no process holds a long lock" if held else "restore it from a backup"
            raise Unavailable(f"the database cannot be used: {error.orig}", remedy) from error


PRAGMAS = "journal_mode=WAL synchronous=FULL foreign_keys=ON secure_delete=ON cache_size=-65536 wal_autocheckpoint=8000"
"""64 MiB of pages in memory; the journal is folded into the file every 32 MiB, which costs two waits for the disk."""


def open_database(where: str) -> Database:
    """The database of `Settings.database`: PostgreSQL at a URL, or SQLite in the file at a path."""
    return open_postgres(where) if where.startswith("postgresql:") else open_sqlite(Path(where))


def open_sqlite(path: Path) -> Database:
    """Open the database at `path`, making it and its tables where they are missing."""
    if not path.exists():
        path.touch(mode=0o600)  # its owner's alone: it holds customers' ids and salts
    wait = {"timeout": BUSY_TIMEOUT_S}
    engine = sa.create_engine(f"sqlite:///{path}", module=sqlite_module, connect_args=wait, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, never by the driver
        for pragma in PRAGMAS.split():
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        begin = "BEGIN IMMEDIATE" if connection.get_execution_options().get("writes", True) else "BEGIN DEFERRED"
        with _driver(connection, begin) as cursor:
            cursor.execute(begin)

    return _with_tables(Database(engine))


def open_postgres(dsn: str) -> Database:
    """Open the PostgreSQL database at `dsn` (`postgresql://user@host/name`), making its tables where they are missing.

    Needs psycopg 3. Commits are durable when they return, whatever the server's default for synchronous_commit is. A
    connection is tried before it is used: one that a restarted server has dropped is made again.
    """
    durable = f"-c synchronous_commit=on -c lock_timeout={BUSY_TIMEOUT_S}s"
    bounds = {"connect_timeout": CONNECT_S, "keepalives": 1, "tcp_user_timeout": PEER_S * 1_000}
    bounds |= {"keepalives_idle": PEER_S // 4, "keepalives_interval": PEER_S // 4, "keepalives_count": 3}
    try:
        address = sa.make_url(dsn).set(drivername="postgresql+psycopg")
        arguments = {**bounds, **address.query, "options": f"{address.query.get('options', '')} {durable}"}
        engine = sa.create_engine(address, connect_args=arguments, hide_parameters=True, pool_pre_ping=True)
    except ImportError as error:
        raise Unavailable("PostgreSQL needs psycopg", "install psycopg[binary]") from error
    except (sa.exc.ArgumentError, ValueError):  # its text may quote a password
        raise UsageError("the PostgreSQL DSN is malformed", "give postgresql://user:password@host:port/name") from None

    connect = _patient()
    event.listen(engine, "do_connect", lambda _dialect, _record, given, named: connect(*given, **named))

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        begin = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        if connection.get_execution_options().get("writes", True):  # later statements see what stood when it was given
            bound = f"set_config('idle_in_transaction_session_timeout', '{FROZEN_AFTER_S}s', true)"
            begin = f"SELECT pg_advisory_xact_lock({_WRITER_LOCK}), {bound}"
        connection.exec_driver_sql(begin)

    return _with_tables(Database(engine))


def _patient() -> Callable[..., Any]:
    """Makes psycopg's connections, which wait for ANSWER_S at most where their server, or a proxy, says nothing."""
    import psycopg

    class Patient(psycopg.Connection[Any]):
        answer_s: float = ANSWER_S

        def wait(self, gen: Any, *given: Any, **named: Any) -> Any:
            try:
                return super().wait(unless_silent(gen, self.answer_s), *given, **named)
            except TimeoutError as error:
                self.pgconn.finish()
                raise psycopg.OperationalError(f"the server has said nothing for {self.answer_s:g} s") from error

    return Patient.connect


def _with_tables(database: Database) -> Database:
    with database.read() as connection:
        missing = metadata.tables.keys() - set(sa.inspect(connection).get_table_names())
    if missing:
        with database.write() as connection:
            metadata.create_all(connection)
    return database
