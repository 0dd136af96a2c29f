"""ClickHouse, the fast path's store: usage events as they were recorded, their rollups, and verdicts for dashboards.

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

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from render_platform.clickhouse_connection import Database, open_client, require_version, typed
from render_platform.clickhouse_schema import (
    CUSTOMER_QUERY,
    DEVICE_QUERY,
    EVENTS,
    HOUR,
    HOURLY_TOTALS,
    HOURS_OF,
    HOURS_QUERY,
    KEPT,
    LATENCY_QUERY,
    MIGRATIONS,
    MIGRATIONS_TABLE,
    MINUTE,
    QUEUE_QUERY,
    RANGE,
    REPORT_SCHEMA,
    REPORTS_QUERY,
    ROLLUP_QUERY,
    ROLLUP_SCHEMA,
    ROLLUPS,
    ROW_COUNT_QUERY,
    ROW_VALUES_QUERY,
    ROW_VALUES_SCHEMA,
    ROWS_OF_KEYS,
    ROWS_ORDER,
    ROWS_QUERY,
    WINDOW_SCHEMA,
    WINDOWS_QUERY,
    CustomerUsage,
    DeviceHour,
    Latency,
    Migration,
    QueueHealth,
    Rollup,
    Stored,
)
from render_platform.clickhouse_schema import ReportRow as ReportRow  # what reconciliation writes
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND, WINDOW_US
from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.events import EVENT_SCHEMA, Totals, require_schema

STORED: tuple[Stored, ...] = (EVENTS, *ROLLUPS)
FILL_ATTEMPTS = 5
MAX_US = 2**62
ROWS_AT_ONCE = 500_000
IDS_AT_ONCE = 10_000_000
_Row = TypeVar("_Row")
_DAY_S = DAY_US // US_PER_SECOND
_STAGING = "staging_"
_HOUR_OF_ROW = "toStartOfHour(recorded_at)"
"""The first column that rows are sorted by: those of one hour are found without a look at the others."""
_AGAIN = "SETTINGS insert_deduplicate = 0"
"""Of an insert that repeats what was inserted before and is gone."""


def pending_migrations(dsn: str, database: str) -> list[Migration]:
    """What `open_clickhouse` would run; changes nothing. Errors are the same."""
    if dsn.startswith("chdb://") and not Path(dsn.removeprefix("chdb://")).is_dir():
        return list(MIGRATIONS)
    with closing(_connected(dsn, database)) as clickhouse:
        return clickhouse.pending()


def open_clickhouse(dsn: str, database: str, retention_days: int | None = None) -> ClickHouse:
    """Connect. With `retention_days`, prepare the database at once: see ClickHouse.prepare.

    Without, its first insert does so, and whoever only reads changes nothing: Unavailable where migrations are pending.
    Raises UsageError for a DSN or name that cannot be used, Unavailable for everything else.
    """
    clickhouse = _connected(dsn, database)
    try:
        if retention_days is not None:
            clickhouse.prepare(retention_days)
    except BaseException:  # whatever ended it: the folder is released, and the error goes on
        clickhouse.close()
        raise
    return clickhouse


def _connected(dsn: str, database: str) -> ClickHouse:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", database):
        raise UsageError(f"{database!r} is not a database name", "use letters, digits and underscores")
    client, dsn, lock = open_client(dsn)
    return ClickHouse(client, dsn, database, lock)


class ClickHouse(Database):
    """The rules on top of this module hold for every method."""

    def make_ready(self) -> None:
        """For whoever will write: prepare the database, unless it is known to be this version's."""
        if not self._ready:
            self.prepare()

    def _insert(self, name: str, table: pa.Table, token: str) -> None:
        self.make_ready()
        super()._insert(name, table, token)

    def prepare(self, retention_days: int | None = None) -> None:
        """Create the database and its tables where they are not so already.

        `retention_days` sets how long the tables keep rows; 0 keeps all, and takes an earlier limit away.
        """
        known = "SELECT count() FROM system.databases WHERE name = {name:String}"
        require_version(self._client.server_version)
        if not self._one(known, name=self._database):
            self._command(f"CREATE DATABASE IF NOT EXISTS `{self._database}`")
        self._client.database = self._database
        self.migrate()
        if retention_days is not None:
            for table, column in KEPT.items():
                self._keep_for(retention_days, table, column)

    def migrate(self) -> None:
        """Run what is pending; safe to repeat after a crash in it, and safe in several processes at once.

        Writers may go on, but for one thing: a rollup that is new is filled from the rows that stand, day by day, and
        a day that is written to meanwhile is filled again. Unavailable where that comes to no end: stop them then. The
        new rollup knows no earlier token: a batch that was sent before and is sent again after is counted twice there.
        """
        if pending := self.pending():
            self._command(MIGRATIONS_TABLE)
        insert = "INSERT INTO schema_migrations SELECT {number:UInt32}, {name:String}"
        for migration in pending:
            for statement in migration.statements:
                self._command(statement)
            if migration.fills:
                self._fill(migration.fills)
            # A crash before this: the migration runs again from its first statement. After it: it is done.
            self._command(insert, number=migration.number, name=migration.name)
        self._ready = True

    def _fill(self, rollup: Rollup) -> None:
        """The view counts what is inserted from its creation on; what stood before is added a day at a time."""
        for _ in range(FILL_ATTEMPTS):
            filled = self._by_day(rollup)  # read before the rows: where it equals them, nothing was lost or doubled
            days = [day for day, rows in self._by_day(EVENTS).items() if filled.get(day) != rows]
            if not days:
                return
            for day in days:
                with self._staging(day, (rollup,)) as staging:
                    self._stage(rollup, staging, EVENTS.table, EVENTS.on(day))
                    self._swap(rollup, staging, day)
        remedy = "stop what writes to ClickHouse and run `render-platform migrate`"
        raise Unavailable(f"rows arrived while {rollup.table} was filled", remedy)

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
        self._insert(EVENTS.table, table, token)

    def window_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        """WINDOW_SCHEMA from the raw rows: `window` counts 300 s since 1970; sums of ids and rows wrap at 2^64."""
        return typed(self.query(WINDOWS_QUERY, start=start_us, end=end_us), WINDOW_SCHEMA)

    def rollup_aggregates(self, start_us: int, end_us: int) -> pa.Table:
        """ROLLUP_SCHEMA from the rollup; UsageError unless both ends are whole minutes."""
        return typed(self.query(ROLLUP_QUERY, **_seconds(MINUTE, start_us, end_us)), ROLLUP_SCHEMA)

    def rows(self, start_us: int, end_us: int, keys: Sequence[tuple[str, str]] | None = None) -> pa.Table:
        """Rows of EVENT_SCHEMA by event_id, duplicates kept; `keys` are (customer_ref, model_name)."""
        values: dict[str, Any] = {"start": start_us, "end": end_us}
        if keys is not None:
            values |= {"customers": [key[0] for key in keys], "models": [key[1] for key in keys]}
        sql = f"{ROWS_QUERY} {ROWS_OF_KEYS if keys is not None else ''} {ROWS_ORDER}"
        return typed(self.query(sql, **values), EVENT_SCHEMA)

    def row_values(self, start_us: int, end_us: int) -> Iterator[pa.Table]:
        """ROW_VALUES_SCHEMA of every row, duplicates kept, in no order, about ROWS_AT_ONCE rows at a time."""
        values = {"start": start_us, "end": end_us}
        parts = 1 + self.query(ROW_COUNT_QUERY, **values).to_pylist()[0]["rows"] // ROWS_AT_ONCE
        if parts > 1 and end_us - start_us > WINDOW_US:  # each part reads the whole range: take short ones
            for start in range(start_us, end_us, WINDOW_US):
                yield from self.row_values(start, min(start + WINDOW_US, end_us))
            return
        for part in range(parts):
            yield typed(self.query(ROW_VALUES_QUERY, **values, parts=parts, part=part), ROW_VALUES_SCHEMA)

    def totals(self, source: str | None = None) -> Totals:
        """How many rows there are, of one source or of all, and their exact GPU time in ns."""
        sql = "SELECT count() AS n, toString(sum(toInt128(gpu_time_ns))) AS ns FROM usage_events"
        if source is not None:
            sql += " WHERE source = {source:String}"
        row = self.query(sql, source=source or "").to_pylist()[0]
        return Totals(int(row["n"]), int(row["ns"]))

    def duplicates(self) -> int:
        """Rows beyond the first of their event_id, over everything that is kept."""
        beyond = "SELECT toInt64(count() - uniqExact(event_id)) AS rows FROM usage_events WHERE"
        return sum(self.query(f"{beyond} {part}").to_pylist()[0]["rows"] for part in self._id_parts(EVENTS.table))

    def _id_parts(self, table: str) -> list[str]:
        """Conditions that part a table's rows by their ids: of each, what is distinct fits into memory and time."""
        found = self.query(f"SELECT toInt64(count()) AS rows FROM {table}")  # noqa: S608
        parts = 1 + found.to_pylist()[0]["rows"] // IDS_AT_ONCE
        return [f"cityHash64(event_id) % {parts} = {part}" for part in range(parts)]

    def hours_with_rows(self, start_us: int | None = None, end_us: int | None = None) -> list[int]:
        """The first instants, in order, of the hours of [start, end) of which raw table or rollup holds rows."""
        found = self.query(HOURS_QUERY, start=start_us or 0, end=MAX_US if end_us is None else end_us)
        return [int(hour_us) for hour_us in found.column("hour_us").to_pylist()]

    def hours_of(self, rows: pa.Table) -> list[int]:
        """The hours in which any event of `rows` (EVENT_SCHEMA) stands, wherever that is: all rows are looked at."""
        days = rows.column("recorded_at").cast(pa.int64()).to_pylist()[:1]
        with self._staging(days[0] // DAY_US if days else 0, (EVENTS,)) as staging:
            self._insert(staging + EVENTS.table, rows, staging)
            found = self.query(f"{HOURS_OF} (SELECT event_id FROM {staging}{EVENTS.table}) ORDER BY hour_us")  # noqa: S608
        return [int(hour_us) for hour_us in found.column("hour_us").to_pylist()]

    def hourly_totals(self, hour_us: int) -> Totals:
        """Events and GPU ns of one hour, as the rollup by hour has them."""
        row = self.query(HOURLY_TOTALS, **_seconds(HOUR, hour_us, hour_us + HOUR_US)).to_pylist()[0]
        return Totals(int(row["n"]), int(row["ns"]))

    def rebuild_rollup(self, start_us: int, end_us: int) -> None:
        """Make the rollup of [start, end), whole minutes that nobody writes to any more, from the raw rows again.

        So is the one by hour, of the hours that lie in it whole. Other minutes may be written meanwhile. A crash after
        a deletion leaves a rollup that lacks rows, as before: call it again. No token: it is no retry.
        """
        _seconds(MINUTE, start_us, end_us)
        for rollup in ROLLUPS:
            start, end = -(-start_us // rollup.unit_us) * rollup.unit_us, end_us - end_us % rollup.unit_us
            if start < end:
                delete = f"ALTER TABLE {rollup.table} DELETE WHERE {rollup.range} SETTINGS mutations_sync = 2"
                self._command(delete, **_seconds(rollup, start, end))
                self._command(f"INSERT INTO {rollup.table} {_AGAIN} {rollup.select(where=RANGE)}", start=start, end=end)

    def rebuild_day(
        self, day_us: int, tables: Iterable[pa.Table], expected: Totals, ready: Callable[[], None] = lambda: None
    ) -> None:
        """Replace the rows of one UTC day, raw and in every rollup, by those of `tables`, which are of EVENT_SCHEMA.

        For a day that nobody writes to any more: what arrives in it meanwhile is lost, after `ready` as well. One
        table is in memory at a time. Finding where a row is of another day or an event stands twice; Unavailable where
        what arrived is not `expected`. Until all is staged and counted nothing has changed; after an error or a crash
        later than that, repeat it, and the day is whole. Tokens of rows of this day mean nothing any more: take new.
        """
        day, beyond = divmod(day_us, DAY_US)
        if beyond or day < 0:
            raise UsageError(f"{day_us} is not the first instant of a day", "give midnight, UTC")
        self._drop_staging(f"{_STAGING}{day}_")  # of an attempt that died
        with self._staging(day, STORED) as staging:
            self._stage_events(staging, day, tables)
            for rollup in ROLLUPS:
                self._stage(rollup, staging, staging + EVENTS.table)
            whole = {day: expected} if expected.events else {}
            for stored in STORED:
                self._require(stored, whole, staging)
            ready()  # what it raises leaves the day as it was
            # A crash before this: nothing has changed. Between two of them: rows and rollups differ. After the last:
            # the day is whole. Repeated, all is swapped again.
            for stored in STORED:
                self._swap(stored, staging if whole else "", day)
            for stored in STORED:
                self._require(stored, whole, where=stored.on(day))

    def _stage_events(self, staging: str, day: int, tables: Iterable[pa.Table]) -> None:
        begin, end = (datetime.fromtimestamp(at * _DAY_S, UTC) for at in (day, day + 1))
        for number, table in enumerate(tables):
            require_schema(table.schema)
            times = table.column("recorded_at")
            if table.num_rows and not begin <= pc.min(times).as_py() <= pc.max(times).as_py() < end:
                raise Finding(f"a batch of {begin:%Y-%m-%d} holds a row of another day", "verify the evidence first")
            self._insert(staging + EVENTS.table, table, f"{staging}{number}")
        for part in self._id_parts(staging + EVENTS.table):
            twice = f"""SELECT toString(event_id) AS id FROM {staging}{EVENTS.table} WHERE {part}
                GROUP BY event_id HAVING count() > 1 LIMIT 1"""  # noqa: S608
            if found := self._ask(twice).column("id").to_pylist():
                raise Finding(f"the batches of {begin:%Y-%m-%d} hold event {found[0]} twice", "verify the evidence")

    def _stage(self, rollup: Rollup, staging: str, source: str, where: str = "1") -> None:
        """An hour at a time: no statement's time grows with the day."""
        hours = f"SELECT DISTINCT toInt64(toUnixTimestamp({_HOUR_OF_ROW})) AS hour FROM {source} WHERE {where}"  # noqa: S608
        for row in self._ask(f"{hours} ORDER BY hour").to_pylist():
            select = rollup.select(source, f"{where} AND {_HOUR_OF_ROW} = toDateTime({row['hour']}, 'UTC')")
            self._command(f"INSERT INTO {staging}{rollup.table} {_AGAIN} {select}")

    def _swap(self, stored: Stored, staging: str, day: int) -> None:
        """One partition at once, by that of staging; without any, by nothing."""
        partition = f"PARTITION '{datetime.fromtimestamp(day * _DAY_S, UTC):%Y-%m-%d}'"
        action = f"REPLACE {partition} FROM {staging}{stored.table}" if staging else f"DROP {partition}"
        self._command(f"ALTER TABLE {stored.table} {action}")

    def _require(self, stored: Stored, expected: dict[int, Totals], staging: str = "", where: str = "1") -> None:
        if (found := self._by_day(stored, staging, where)) != expected:
            what = f"{staging}{stored.table} holds {found or 'nothing'} where {expected or 'nothing'} was expected"
            raise Unavailable(what, "see that nothing writes to this day, and repeat this")

    def _by_day(self, stored: Stored, staging: str = "", where: str = "1") -> dict[int, Totals]:
        rows = self._ask(stored.by_day(f"{staging}{stored.table}", where)).to_pylist()
        return {row["day"]: Totals(row["rows"], int(row["ns"])) for row in rows}

    @contextmanager
    def _staging(self, day: int, stored: Iterable[Stored]) -> Iterator[str]:
        """Empty tables like those of `stored`, for one attempt: what stands before their names."""
        staging = f"{_STAGING}{day}_{secrets.token_hex(8)}_"
        try:
            for one in stored:
                self._command(f"CREATE TABLE {staging}{one.table} AS {one.table}")
            yield staging
        finally:
            with suppress(Unavailable):  # what is left goes with the next attempt
                self._drop_staging(staging)

    def _drop_staging(self, prefix: str) -> None:
        query = "SELECT name FROM system.tables WHERE database = {db:String} AND startsWith(name, {prefix:String})"
        for row in self._ask(query, db=self._database, prefix=prefix).to_pylist():
            self._command(f"DROP TABLE IF EXISTS `{row['name']}` SYNC")

    def latency_quantiles(self, start_us: int, end_us: int) -> list[Latency]:
        """One Latency a model, by name; UsageError unless both ends are whole minutes."""
        return self._read(Latency, LATENCY_QUERY, **_seconds(MINUTE, start_us, end_us))

    def customer_usage(self, start_us: int, end_us: int, customer_ref: str = "") -> list[CustomerUsage]:
        """GPU time and tokens of one customer, or of all, by model; UsageError unless both ends are whole minutes."""
        return self._read(CustomerUsage, CUSTOMER_QUERY, **_seconds(MINUTE, start_us, end_us), customer=customer_ref)

    def queue_health(self, start_us: int, end_us: int) -> list[QueueHealth]:
        """How jobs waited and ended, by model; UsageError unless both ends are whole hours."""
        return self._read(QueueHealth, QUEUE_QUERY, **_seconds(HOUR, start_us, end_us))

    def device_hours(self, start_us: int, end_us: int) -> list[DeviceHour]:
        """By hour, device and model; UsageError unless both ends are whole hours."""
        return self._read(DeviceHour, DEVICE_QUERY, **_seconds(HOUR, start_us, end_us))

    def record_report(self, row: ReportRow) -> None:
        """Keep a verdict for dashboards, in the place of an earlier one on the same hour and revision.

        The token is the whole row's, its time included: a verdict that comes back is told again.
        """
        token = hashlib.sha256(json.dumps(asdict(row)).encode()).hexdigest()
        self._insert("reconciliation_reports", pa.Table.from_pylist([asdict(row)], REPORT_SCHEMA), token)

    def reports(self, start_us: int, end_us: int) -> list[ReportRow]:
        """The last verdict of each revision of the hours that begin in [start, end), in order."""
        return self._read(ReportRow, REPORTS_QUERY, start=start_us, end=end_us)

    def health(self) -> str:
        """The version that answers now."""
        return str(self._one("SELECT version()"))

    def _read(self, kind: Callable[..., _Row], sql: str, **values: Any) -> list[_Row]:
        """Rows whose columns are the fields of `kind`; sums come as decimals, exact."""
        rows = self.query(sql, **values).to_pylist()
        return [kind(**{k: int(v) if isinstance(v, Decimal) else v for k, v in row.items()}) for row in rows]


def _seconds(rollup: Rollup, start_us: int, end_us: int) -> dict[str, int]:
    if start_us % rollup.unit_us or end_us % rollup.unit_us:
        unit = rollup.time
        raise UsageError(f"the rollup is by {unit}", f"ask for a range that begins and ends on a whole {unit}")
    return {"start": start_us // US_PER_SECOND, "end": end_us // US_PER_SECOND}
