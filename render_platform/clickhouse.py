"""ClickHouse, the fast path's store: usage events as they were recorded, and their rollup by minute.

One client API for both kinds of DSN: `chdb:///folder` (the engine in this process, or the bridge of the process that
owns the folder) and `http(s)://user:password@host:port` (a server, 24.8 or newer). What holds for both:

- Any failure raises Unavailable with a remedy and without secrets. A failed read is never an empty result.
- Times are integer microseconds UTC; ranges are [start_us, end_us) of `recorded_at`; sums are exact.
- An insert that returned survives `kill -9` of the process; power loss may take it back: no evidence.
- Threads may share one ClickHouse. On a chdb folder of this process their calls run one after another.
- One process owns a chdb folder. Where that is the bridge (bridge.py), others are led to it. When the bridge ends, what
  they hold raises Unavailable until it is opened again; so does a folder that a process without a bridge owns.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httputil import default_pool_manager
from urllib3.exceptions import HTTPError

from render_platform.chdb_folder import BRIDGE_USER, OWNED, FolderLock
from render_platform.clickhouse_schema import (
    LATENCY_QUERY,
    MIGRATIONS,
    MIGRATIONS_TABLE,
    MINUTE_RANGE,
    MINUTE_SELECT,
    RANGE,
    ROLLUP_QUERY,
    ROLLUP_SCHEMA,
    ROWS_OF_KEYS,
    ROWS_ORDER,
    ROWS_QUERY,
    WINDOW_SCHEMA,
    WINDOWS_QUERY,
)
from render_platform.clock import US_PER_SECOND
from render_platform.errors import Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Totals, require_schema

MINUTE_US = 60 * US_PER_SECOND
OLDEST_SERVER = [24, 8]
_NO_DSN = "this is no ClickHouse DSN", "give chdb:///folder or http(s)://user:password@host:port"
_TOO_OLD = "ClickHouse is too old or unsupported", "24.8 or newer is needed"

_DRIVER_ERRORS = (ClickHouseError, HTTPError, OSError, pa.ArrowException, ImportError)
_BOUNDED = ("result", "read", "group_by", "sort", "timeout")
_NO_PARTIAL_RESULTS = {f"{what}_overflow_mode": "throw" for what in _BOUNDED}
_INSERT_SETTINGS = {
    "async_insert": 0,
    "insert_deduplicate": 1,
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    "max_partitions_per_insert_block": 1_000,
}


@dataclass(frozen=True, slots=True)
class Latency:
    """Estimated quantiles (t-digest) of a model's time from request to answer."""

    model_name: str
    events: int
    p50_us: int
    p90_us: int
    p99_us: int


def open_clickhouse(dsn: str, database: str, retention_days: int = 0) -> ClickHouse:
    """Connect, create the database where there is none, and migrate it.

    `retention_days` sets how long both tables keep rows; 0 keeps all, and takes an earlier limit away.
    Raises UsageError for a DSN or name that cannot be used, Unavailable for everything else.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", database):
        raise UsageError(f"{database!r} is not a database name", "use letters, digits and underscores")
    with _translated(dsn):
        client, dsn, lock = _open_folder(dsn) if dsn.startswith("chdb://") else (_connect(dsn), dsn, None)
    clickhouse = ClickHouse(client, dsn, database, lock)
    try:
        clickhouse.prepare(retention_days)
    except BaseException:  # whatever ended it: the folder is released, and the error goes on
        clickhouse.close()
        raise
    return clickhouse


class ClickHouse:
    """The rules on top of this module hold for every method."""

    def __init__(self, client: Any, dsn: str, database: str, lock: FolderLock | None = None) -> None:
        """`lock` belongs to it where the engine is in this process, and goes with `close`."""
        self._client, self._dsn, self._database, self._lock = client, dsn, database, lock
        self._turn: AbstractContextManager[Any] = threading.Lock() if lock else nullcontext()

    def prepare(self, retention_days: int) -> None:
        """Create the database, its tables and their retention where they are not so already."""
        _require_version(self._client.server_version)
        known = "SELECT count() FROM system.databases WHERE name = {name:String}"
        if not self._one(known, name=self._database):
            self._command(f"CREATE DATABASE IF NOT EXISTS `{self._database}`")
        self._client.database = self._database
        self.migrate()
        for table, column in (("usage_events", "recorded_at"), ("usage_minute", "minute")):
            self._keep_for(retention_days, table, column)

    def migrate(self) -> None:
        """Run the migrations that the database does not name yet; safe to repeat after a crash in it."""
        self._command(MIGRATIONS_TABLE)
        done = set(self._query("SELECT number FROM schema_migrations").column("number").to_pylist())
        if unknown := done - {number for number, _, _ in MIGRATIONS}:
            raise Unavailable(f"migration {max(unknown)} is not known here", "install a newer version")
        insert = "INSERT INTO schema_migrations SELECT {number:UInt32}, {name:String}"
        for number, name, statements in MIGRATIONS:
            if number not in done:
                for statement in statements:
                    self._command(statement)
                self._command(insert, number=number, name=name)

    def _keep_for(self, days: int, table: str, column: str) -> None:
        query = "SELECT engine_full FROM system.tables WHERE database = {db:String} AND name = {name:String}"
        engine = self._one(query, db=self._database, name=table)
        found = re.search(r" TTL .*toIntervalDay\((\d+)\)", engine)
        if int(found[1] if found else 0) != days:
            ttl = f"MODIFY TTL toDateTime({column}) + toIntervalDay({days:d})" if days else "REMOVE TTL"
            self._command(f"ALTER TABLE {table} {ttl}")

    def insert_events(self, table: pa.Table, token: str) -> None:
        """Insert rows of EVENT_SCHEMA; on return they are in the raw table and in the rollup.

        `token` names an immutable batch: the same rows in one order. A retry with it adds what is missing
        and nothing twice, among the last 10,000 inserts; other rows under a used token are silently dropped.
        After Unavailable the rows may be in either table, in both or in none: retry with the same token.
        """
        require_schema(table.schema)
        if not token:
            raise UsageError("an insert needs a deduplication token", "name the batch")
        if table.num_rows:
            settings = {**_INSERT_SETTINGS, "insert_deduplication_token": token}
            with self._calling():
                self._client.insert_arrow("usage_events", table.combine_chunks(), settings=settings)

    def window_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        """WINDOW_SCHEMA from the raw rows: `window` counts 300 s since 1970; the id sums wrap at 2^64."""
        return _typed(self._query(WINDOWS_QUERY, start=start_us, end=end_us), WINDOW_SCHEMA)

    def rollup_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        """ROLLUP_SCHEMA from the rollup; UsageError unless both ends are whole minutes."""
        return _typed(self._query(ROLLUP_QUERY, **_minutes(start_us, end_us)), ROLLUP_SCHEMA)

    def rows(self, start_us: int, end_us: int, keys: Sequence[tuple[str, str]] | None = None) -> pa.Table:
        """Rows of EVENT_SCHEMA by event_id, duplicates kept; `keys` are (customer_ref, model_name)."""
        values: dict[str, Any] = {"start": start_us, "end": end_us}
        if keys is not None:
            values |= {"customers": [key[0] for key in keys], "models": [key[1] for key in keys]}
        sql = f"{ROWS_QUERY} {ROWS_OF_KEYS if keys is not None else ''} {ROWS_ORDER}"
        return _typed(self._query(sql, **values), EVENT_SCHEMA)

    def totals(self, source: str | None = None) -> Totals:
        """How many rows there are, of one source or of all, and their exact GPU time in ns."""
        sql = "SELECT count() AS n, toString(sum(toInt128(gpu_time_ns))) AS ns FROM usage_events"
        if source is not None:
            sql += " WHERE source = {source:String}"
        row = self._query(sql, source=source or "").to_pylist()[0]
        return Totals(int(row["n"]), int(row["ns"]))

    def duplicates(self) -> int:
        """Rows beyond the first of their event_id, over everything that is kept."""
        found = self._query("SELECT toInt64(count() - uniqExact(event_id)) AS rows FROM usage_events")
        return int(found.column("rows")[0].as_py())

    def rebuild_rollup(self, start_us: int, end_us: int) -> None:
        """Make the rollup of [start, end), whole minutes that nobody writes to any more, from the raw rows again.

        Other minutes may be written meanwhile. A crash after the deletion leaves a rollup that lacks rows, as before:
        call it again. No token: it is no retry, and after a deletion an old token would insert nothing.
        """
        values = _minutes(start_us, end_us)
        self._command(f"ALTER TABLE usage_minute DELETE WHERE {MINUTE_RANGE} SETTINGS mutations_sync = 2", **values)
        self._command(
            f"INSERT INTO usage_minute {MINUTE_SELECT.replace('GROUP BY', f'WHERE {RANGE} GROUP BY')}",
            start=start_us,
            end=end_us,
        )

    def latency_quantiles(self, start_us: int, end_us: int) -> list[Latency]:
        """One Latency a model, by name, from the rollup; UsageError unless both ends are whole minutes."""
        found = self._query(LATENCY_QUERY, **_minutes(start_us, end_us)).to_pylist()
        return [Latency(row["model_name"], row["events"], *row["quantiles"]) for row in found]

    def health(self) -> str:
        """The version that answers now."""
        return str(self._one("SELECT version()"))

    def close(self) -> None:
        """Let go of the folder or the connections; harmless when repeated. Call nothing after it."""
        self._client.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """One call of the driver, with its errors translated."""
        with _translated(self._dsn), self._turn:
            try:
                yield
            except _DRIVER_ERRORS:
                if self._lock is not None:
                    with suppress(*_DRIVER_ERRORS):  # chdb puts what a failed query had written before the next answer
                        self._client.raw_query("SELECT 1")
                raise

    def _query(self, sql: str, **values: Any) -> pa.Table:
        with self._calling():
            return self._client.query_arrow(sql, parameters=values)

    def _one(self, sql: str, **values: Any) -> Any:
        for row in self._query(sql, **values).to_pylist():
            return next(iter(row.values()))
        raise Unavailable("a table of ClickHouse is missing", "see that nothing else changes this database")

    def _command(self, sql: str, **values: Any) -> None:
        with self._calling():
            self._client.command(sql, parameters=values)


def _open_folder(dsn: str) -> tuple[Any, str, FolderLock | None]:
    """A client of the folder's engine, the DSN that it has become, and the lock where the engine is in this process."""
    rest = dsn.removeprefix("chdb://")
    if not rest or "?" in rest:
        raise UsageError(*_NO_DSN)
    folder = Path(rest).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock.take(folder)
    if lock is None:
        with suppress(FileNotFoundError):
            url = FolderLock.url_file(folder).read_text()
            with _translated(url):
                # The default pool: a proxy that the environment names is not for loopback, nor to see the token.
                return _connect(url, pool_mgr=default_pool_manager()), url, None
        raise Unavailable(*OWNED)
    try:
        client = clickhouse_connect.get_client(interface="chdb", path=str(folder), settings=_NO_PARTIAL_RESULTS)
    except BaseException:  # whatever it was: the folder is let go of, and the error goes on
        lock.release()
        raise
    return client, dsn, lock


def _connect(dsn: str, **options: Any) -> Any:
    scheme = dsn.partition("://")[0]
    if scheme not in ("http", "https"):
        raise UsageError(*_NO_DSN)
    if "@" in urlsplit(dsn).path:  # an unencoded / in a password: what follows it would be shown as a path
        raise UsageError("the ClickHouse DSN is malformed", "percent-encode a password in it")
    options |= {"settings": _NO_PARTIAL_RESULTS, "interface": scheme, "autogenerate_session_id": False}
    options |= {"connect_timeout": 5, "send_receive_timeout": 60}
    try:
        return clickhouse_connect.get_client(dsn=dsn, **options)
    except ValueError:  # a port or an option; its text may quote a password
        raise UsageError("the ClickHouse DSN is malformed", "percent-encode a password in it") from None


@contextmanager
def _translated(dsn: str) -> Iterator[None]:
    """Turn what the driver raises into Unavailable; the cause is left out because it may hold secrets."""
    try:
        yield
    except _DRIVER_ERRORS as error:
        message, remedy = _explain(str(error), dsn)
        raise Unavailable(message, remedy) from None


def _explain(text: str, dsn: str) -> tuple[str, str]:
    if "Unknown identifier: readonly" in text:
        return _TOO_OLD
    if "Error initializing EmbeddedServer" in text:
        return f"the embedded ClickHouse did not open: most likely {OWNED[0]}", OWNED[1]
    if "EmbeddedServer already initialized" in text:
        return "this process has another embedded ClickHouse open", "close it first: a process has one folder"
    where = "the server and its address, set by RENDER_PLATFORM_CLICKHOUSE_DSN"
    if dsn.startswith("chdb:"):
        where = "that its folder can be written, set by RENDER_PLATFORM_CLICKHOUSE_DSN"
    elif urlsplit(dsn).username == BRIDGE_USER:
        where = "that the process that owns the embedded database still runs, and repeat this"
    return f"ClickHouse failed: {_scrubbed(text, dsn)}", f"check {where}"


def _scrubbed(text: str, dsn: str) -> str:
    """The first line of an error, without the DSN and what its password is, plain or encoded."""
    secret = urlsplit(dsn).password if not dsn.startswith("chdb:") else None
    for hidden in filter(None, (dsn, secret, unquote(secret or ""))):
        text = text.replace(hidden, "***")
    return " ".join(text.split("\n", 1)[0].split())[:300]


def _require_version(version: str) -> None:
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < OLDEST_SERVER:
        raise Unavailable(*_TOO_OLD)


def _minutes(start_us: int, end_us: int) -> dict[str, int]:
    if start_us % MINUTE_US or end_us % MINUTE_US:
        raise UsageError("the rollup is by minute", "ask for a range that begins and ends on a minute")
    return {"start": start_us // US_PER_SECOND, "end": end_us // US_PER_SECOND}


def _typed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly this schema; a column that does not fit it is a failed read."""
    try:
        return pa.table([_cast(table.column(f.name).combine_chunks(), f) for f in schema], schema=schema)
    except (KeyError, ValueError, TypeError) as error:
        raise Unavailable("ClickHouse answered with columns of another type", "check its tables") from error


def _cast(column: pa.Array, field: pa.Field) -> pa.Array:
    if column.null_count and not field.nullable:
        raise ValueError(f"{field.name} holds a null")
    if field.type == pa.uuid():
        return pa.ExtensionArray.from_storage(field.type, column.cast(pa.binary(16)))
    return column.cast(field.type)
