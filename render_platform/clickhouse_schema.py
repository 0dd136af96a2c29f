"""The fast path's tables, the statements that read them, and the types of what these give.

`usage_events` derives from EVENT_SCHEMA. The rollups, by minute for customers and by hour for operators, are
AggregatingMergeTrees fed by views. All have a deduplication window: without one on the rollups too, a retried insert
would count twice there. Both engines' expressions give equal values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from render_platform.clock import HOUR_US, US_PER_SECOND, WINDOW_US
from render_platform.events import EVENT_SCHEMA

_DEDUPLICATION = "non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1"


def column_of(field: pa.Field, *, kept: bool = False) -> str:
    """The ClickHouse column of a field of EVENT_SCHEMA; `kept`: in a table of ours."""
    kinds = {pa.uuid(): "UUID", pa.binary(16): "FixedString(16)", pa.int64(): "Int64", pa.string(): "String"}
    kind = "DateTime64(6, 'UTC')" if pa.types.is_timestamp(field.type) else kinds[field.type]
    kind = f"Nullable({kind})" if field.nullable else kind
    repeats = kept and (field.metadata or {}).get(b"repeats") == b"yes"
    return f"`{field.name}` {f'LowCardinality({kind})' if repeats else kind}"


_COLUMNS = ", ".join(column_of(field, kept=True) for field in EVENT_SCHEMA)
EVENTS_TABLE = f"""CREATE TABLE IF NOT EXISTS usage_events ({_COLUMNS})
ENGINE = MergeTree PARTITION BY toDate(recorded_at)
ORDER BY (toStartOfHour(recorded_at), customer_ref, model_name, recorded_at, event_id)
SETTINGS {_DEDUPLICATION}"""

MINUTE_TABLE = f"""CREATE TABLE IF NOT EXISTS usage_minute (
    minute DateTime('UTC'), customer_ref LowCardinality(String), model_name LowCardinality(String),
    events SimpleAggregateFunction(sum, UInt64),
    gpu_time_ns_sum SimpleAggregateFunction(sum, Int128),
    gpu_time_ns_min SimpleAggregateFunction(min, Int64), gpu_time_ns_max SimpleAggregateFunction(max, Int64),
    input_tokens_known SimpleAggregateFunction(sum, UInt64),
    input_tokens_sum SimpleAggregateFunction(sum, Int128),
    output_tokens_known SimpleAggregateFunction(sum, UInt64),
    output_tokens_sum SimpleAggregateFunction(sum, Int128),
    total_time_us_digest AggregateFunction(quantilesTDigest(0.5, 0.9, 0.99), Int64))
ENGINE = AggregatingMergeTree PARTITION BY toDate(minute)
ORDER BY (minute, customer_ref, model_name) SETTINGS {_DEDUPLICATION}"""

HOUR_TABLE = f"""CREATE TABLE IF NOT EXISTS usage_hour (
    hour DateTime('UTC'), device LowCardinality(String), model_name LowCardinality(String),
    status LowCardinality(String),
    events SimpleAggregateFunction(sum, UInt64),
    gpu_time_ns_sum SimpleAggregateFunction(sum, Int128),
    gpu_time_ns_min SimpleAggregateFunction(min, Int64), gpu_time_ns_max SimpleAggregateFunction(max, Int64),
    energy_mj_known SimpleAggregateFunction(sum, UInt64),
    energy_mj_sum SimpleAggregateFunction(sum, Int128),
    queue_time_us_digest AggregateFunction(quantilesTDigest(0.5, 0.9, 0.99), Int64),
    total_time_us_digest AggregateFunction(quantilesTDigest(0.5, 0.9, 0.99), Int64))
ENGINE = AggregatingMergeTree PARTITION BY toDate(hour)
ORDER BY (hour, device, model_name, status) SETTINGS {_DEDUPLICATION}"""
"""`device` is empty where no device was told: a sort key has no nulls, and no event has an empty device."""

REPORTS_TABLE = """CREATE TABLE IF NOT EXISTS reconciliation_reports (
    hour_us Int64, revision Int64, status LowCardinality(String), final Bool, windows_pending Int64,
    events Int64, fast_events Int64, gpu_time_ns Decimal(38, 0), fast_gpu_time_ns Decimal(38, 0),
    missing Int64, duplicated Int64, altered Int64, unexpected Int64,
    digest String, error String, reported_at_us Int64,
    hour DateTime('UTC') MATERIALIZED toDateTime(intDiv(hour_us, 1000000), 'UTC'),
    reported_at DateTime64(6, 'UTC') MATERIALIZED fromUnixTimestamp64Micro(reported_at_us, 'UTC'))
ENGINE = ReplacingMergeTree(reported_at) PARTITION BY toYYYYMM(hour)
ORDER BY (hour_us, revision) SETTINGS non_replicated_deduplication_window = 10000"""
"""Verdicts for dashboards: of each revision of an hour the last word, provisional or final. Read it with FINAL."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A table of usage with a partition a day, by its column `time`; `events` and `gpu_time_ns` add up rows of `t`."""

    table: str
    time: str
    events: str = "sum(t.events)"
    gpu_time_ns: str = "sum(t.gpu_time_ns_sum)"

    def on(self, day: int) -> str:
        """Rows of one day, counted from 1970."""
        return f"toDate({self.time}) = toDate({day})"

    def by_day(self, table: str = "", where: str = "1") -> str:
        """Totals a day, counted from 1970; of another table of the same columns where one is named."""
        return f"""SELECT toInt64(toDate(t.{self.time})) AS day, toInt64({self.events}) AS rows,
            toDecimal128(toString({self.gpu_time_ns}), 0) AS ns
        FROM {table or self.table} AS t WHERE {where} GROUP BY day"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Rollup(Stored):
    """One that a view feeds with `figures` by `keys` of each inserted block of `usage_events`."""

    unit_us: int = 0
    keys: str = ""
    figures: str = ""

    def select(self, source: str = "usage_events", where: str = "1") -> str:
        """What the view selects, over other rows."""
        return f"SELECT {self.figures} FROM {source} WHERE {where} GROUP BY {self.keys}"  # noqa: S608

    @property
    def view(self) -> str:
        return f"CREATE MATERIALIZED VIEW IF NOT EXISTS {self.table}_view TO {self.table} AS {self.select()}"

    @property
    def range(self) -> str:
        """Rows of [start, end), in seconds."""
        return f"{self.time} >= toDateTime({{start:Int64}}, 'UTC') AND {self.time} < toDateTime({{end:Int64}}, 'UTC')"


EVENTS = Stored("usage_events", "recorded_at", "count()", "sum(toInt128(t.gpu_time_ns))")
MINUTE = Rollup(
    "usage_minute",
    "minute",
    unit_us=60 * US_PER_SECOND,
    keys="minute, customer_ref, model_name",
    figures="""toStartOfMinute(recorded_at) AS minute, customer_ref, model_name, count() AS events,
    sum(toInt128(gpu_time_ns)) AS gpu_time_ns_sum,
    min(gpu_time_ns) AS gpu_time_ns_min, max(gpu_time_ns) AS gpu_time_ns_max,
    count(input_tokens) AS input_tokens_known, sum(toInt128(ifNull(input_tokens, 0))) AS input_tokens_sum,
    count(output_tokens) AS output_tokens_known, sum(toInt128(ifNull(output_tokens, 0))) AS output_tokens_sum,
    quantilesTDigestState(0.5, 0.9, 0.99)(total_time_us) AS total_time_us_digest""",
)
HOUR = Rollup(
    "usage_hour",
    "hour",
    unit_us=HOUR_US,
    keys="hour, device, model_name, status",
    figures="""toStartOfHour(recorded_at) AS hour, ifNull(device_uuid, '') AS device, model_name, status,
    count() AS events, sum(toInt128(gpu_time_ns)) AS gpu_time_ns_sum,
    min(gpu_time_ns) AS gpu_time_ns_min, max(gpu_time_ns) AS gpu_time_ns_max,
    count(energy_mj) AS energy_mj_known, sum(toInt128(ifNull(energy_mj, 0))) AS energy_mj_sum,
    quantilesTDigestState(0.5, 0.9, 0.99)(queue_time_us) AS queue_time_us_digest,
    quantilesTDigestState(0.5, 0.9, 0.99)(total_time_us) AS total_time_us_digest""",
)
ROLLUPS = (MINUTE, HOUR)
KEPT = {"usage_events": "recorded_at", "usage_minute": "minute", "usage_hour": "hour", "reconciliation_reports": "hour"}
"""The tables that retention is of, and the time that it counts from."""


class Migration(NamedTuple):
    """Each statement may run again: a crash may come between any two."""

    number: int
    name: str
    statements: tuple[str, ...]
    fills: Rollup | None = None
    """To be made, after them, from the rows that stood before its view did."""


MIGRATIONS = (
    Migration(1, "usage events", (EVENTS_TABLE,)),
    Migration(2, "rollup by minute", (MINUTE_TABLE, MINUTE.view)),
    Migration(3, "rollup by hour and device", (HOUR_TABLE, HOUR.view), HOUR),
    Migration(4, "reconciliation reports", (REPORTS_TABLE,)),
)

MIGRATIONS_TABLE = """CREATE TABLE IF NOT EXISTS schema_migrations (number UInt32, name String)
ENGINE = MergeTree ORDER BY number"""

RANGE = """recorded_at >= fromUnixTimestamp64Micro({start:Int64}, 'UTC')
    AND recorded_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')"""
MINUTE_RANGE = "minute >= toDateTime({start:Int64}, 'UTC') AND minute < toDateTime({end:Int64}, 'UTC')"

_SUMS = {
    "window": pa.int64(),
    "customer_ref": pa.string(),
    "model_name": pa.string(),
    "events": pa.int64(),
    "gpu_time_ns": pa.decimal128(38, 0),
}
_ID_SUMS = {"id_sum": pa.uint64(), "id_high_sum": pa.uint64(), "row_sum": pa.uint64()}
_MINUTE_SUM = {"minute_sum": pa.uint64()}
_ROW = {"event_id": pa.binary(16), **{name: _SUMS[name] for name in list(_SUMS)[:3]}, "row_value": pa.uint64()}
SLOW_SCHEMA, WINDOW_SCHEMA, ROLLUP_SCHEMA, ROW_VALUES_SCHEMA = (
    pa.schema([pa.field(name, kind, False) for name, kind in columns.items()])
    for columns in (_SUMS | _ID_SUMS, _SUMS | _ID_SUMS | _MINUTE_SUM, _SUMS | _MINUTE_SUM, _ROW)
)
"""A window, customer and model: what the slow path says of all its rows, the fast one, its rollup; and one row."""

# The checksum of rows. A row's value is, modulo 2^64, the sum over all columns but `event_id` of the column's number
# times the column's weight; `row_sum` adds up the values of rows, each times the low 32 bits of its event id, the
# lowest set. Weights and ids are odd, so that no change of one number is lost.
NO_NUMBER = -7_046_029_254_386_353_131
"""What counts for an integer that is null: no event holds it. A text that is null counts as 0."""


def weight(name: str) -> int:
    """Odd, 32 bits, of a column or of a half of one."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1


def _half(column: str, half: int) -> str:
    """The first (0) or last (1) eight of a column's 16 bytes, as a number."""
    return f"reinterpretAsUInt64(reverse(substring({column}, {1 + 8 * half}, 8)))"


def _numbers(field: pa.Field) -> str:
    """The weighted numbers of a column: its value or µs, the MD5 of its text, or its two halves."""
    name = f"e.{field.name}"
    if pa.types.is_string(field.type):
        number = f"toUInt64(reinterpretAsUInt128(MD5({name}))) * {weight(field.name)}"
        return f"ifNull({number}, 0)" if field.nullable else number
    if field.type in (pa.uuid(), pa.binary(16)):
        data = f"UUIDToNum({name})" if field.type == pa.uuid() else name
        halves = enumerate(("high", "low"))
        return " + ".join(f"{_half(data, at)} * {weight(f'{field.name}/{half}')}" for at, half in halves)
    number = f"toUnixTimestamp64Micro({name})" if pa.types.is_timestamp(field.type) else name
    return f"toUInt64({f'ifNull({number}, {NO_NUMBER})' if field.nullable else number}) * {weight(field.name)}"


ROW_VALUE = " + ".join(_numbers(field) for field in EVENT_SCHEMA if field.name != "event_id")
LOW, HIGH = _half("UUIDToNum(e.event_id)", 1), _half("UUIDToNum(e.event_id)", 0)

# By minute first: `minute_sum` holds each minute of a rollup against the rows of that minute, in all columns but the
# digest, which is an estimate.
_BY_MINUTE = """
    count() AS n, sum(toInt128(e.gpu_time_ns)) AS ns, min(e.gpu_time_ns) AS least, max(e.gpu_time_ns) AS most,
    count(e.input_tokens) AS known_in, sum(toInt128(ifNull(e.input_tokens, 0))) AS tokens_in,
    count(e.output_tokens) AS known_out, sum(toInt128(ifNull(e.output_tokens, 0))) AS tokens_out"""
_OF_MINUTES = """
    sum(m.events) AS n, sum(m.gpu_time_ns_sum) AS ns, min(m.gpu_time_ns_min) AS least, max(m.gpu_time_ns_max) AS most,
    sum(m.input_tokens_known) AS known_in, sum(m.input_tokens_sum) AS tokens_in,
    sum(m.output_tokens_known) AS known_out, sum(m.output_tokens_sum) AS tokens_out"""
_SUMS_OF_WINDOW = f"""intDiv(toInt64(toUnixTimestamp(at)), {WINDOW_US // US_PER_SECOND}) AS `window`, customer_ref,
    model_name, toInt64(sum(n)) AS events, toDecimal128(toString(sum(ns)), 0) AS gpu_time_ns,
    sum(sipHash64(at, n, ns, least, most, known_in, tokens_in, known_out, tokens_out)) AS minute_sum"""
_BY_KEY = "GROUP BY `window`, customer_ref, model_name ORDER BY `window`, customer_ref, model_name"

WINDOWS_QUERY = f"""SELECT {_SUMS_OF_WINDOW}, sum(ids) AS id_sum, sum(high_ids) AS id_high_sum,
    sum(row_values) AS row_sum
FROM (SELECT toStartOfMinute(e.recorded_at) AS at, e.customer_ref AS customer_ref, e.model_name AS model_name,
    {_BY_MINUTE}, sum({LOW}) AS ids, sum({HIGH}) AS high_ids,
    sum(bitOr(bitAnd({LOW}, 4294967295), 1) * ({ROW_VALUE})) AS row_values
    FROM usage_events AS e WHERE {RANGE} GROUP BY at, customer_ref, model_name) {_BY_KEY}"""  # noqa: S608

ROLLUP_QUERY = f"""SELECT {_SUMS_OF_WINDOW}
FROM (SELECT m.minute AS at, m.customer_ref AS customer_ref, m.model_name AS model_name, {_OF_MINUTES}
    FROM usage_minute AS m WHERE {MINUTE_RANGE} GROUP BY at, customer_ref, model_name) {_BY_KEY}"""  # noqa: S608

ROW_VALUES_QUERY = f"""SELECT UUIDToNum(e.event_id) AS event_id,
    intDiv(toUnixTimestamp64Micro(e.recorded_at), {WINDOW_US}) AS `window`, e.customer_ref AS customer_ref,
    e.model_name AS model_name, {ROW_VALUE} AS row_value
FROM usage_events AS e WHERE {RANGE} AND {LOW} % {{parts:UInt64}} = {{part:UInt64}}"""  # noqa: S608
ROW_COUNT_QUERY = f"SELECT toInt64(count()) AS rows FROM usage_events WHERE {RANGE}"  # noqa: S608

_READ = (f"UUIDToNum(e.{f.name}) AS {f.name}" if f.type == pa.uuid() else f.name for f in EVENT_SCHEMA)
ROWS_QUERY = f"""SELECT {", ".join(_READ)}
FROM usage_events AS e WHERE {RANGE}"""  # noqa: S608
ROWS_OF_KEYS = """AND (e.customer_ref, e.model_name) IN
    (SELECT arrayJoin(arrayZip({customers:Array(String)}, {models:Array(String)})))"""
ROWS_ORDER = "ORDER BY UUIDToNum(e.event_id), recorded_at, gpu_time_ns"

_QUANTILES = "quantilesTDigestMerge(0.5, 0.9, 0.99)"
_PERCENTILES = """toInt64(round(found[1])) AS {0}p50_us, toInt64(round(found[2])) AS {0}p90_us,
    toInt64(round(found[3])) AS {0}p99_us"""

HOURS_OF = f"""SELECT DISTINCT toInt64(toUnixTimestamp(toStartOfHour(recorded_at))) * {US_PER_SECOND} AS hour_us
FROM usage_events WHERE event_id IN"""  # noqa: S608
HOURLY_TOTALS = f"""SELECT toInt64(sum(events)) AS n, toString(sum(gpu_time_ns_sum)) AS ns FROM usage_hour
WHERE {HOUR.range}"""  # noqa: S608
LATENCY_QUERY = f"""WITH {_QUANTILES}(total_time_us_digest) AS found
SELECT model_name, toInt64(sum(m.events)) AS events, {_PERCENTILES.format("")}
FROM usage_minute AS m WHERE {MINUTE.range} GROUP BY model_name ORDER BY model_name"""  # noqa: S608

CUSTOMER_QUERY = f"""SELECT customer_ref, model_name, toInt64(sum(m.events)) AS events,
    toDecimal128(toString(sum(m.gpu_time_ns_sum)), 0) AS gpu_time_ns,
    toInt64(sum(m.input_tokens_known)) AS input_tokens_known,
    toDecimal128(toString(sum(m.input_tokens_sum)), 0) AS input_tokens,
    toInt64(sum(m.output_tokens_known)) AS output_tokens_known,
    toDecimal128(toString(sum(m.output_tokens_sum)), 0) AS output_tokens
FROM usage_minute AS m WHERE {MINUTE.range} AND ({{customer:String}} = '' OR customer_ref = {{customer:String}})
GROUP BY customer_ref, model_name ORDER BY customer_ref, model_name"""  # noqa: S608

QUEUE_QUERY = f"""WITH {_QUANTILES}(queue_time_us_digest) AS found
SELECT model_name, toInt64(sum(h.events)) AS events,
    toInt64(sumIf(h.events, status = 'success')) AS succeeded, toInt64(sumIf(h.events, status = 'error')) AS failed,
    toInt64(sumIf(h.events, status = 'timeout')) AS timed_out,
    toInt64(sumIf(h.events, status = 'cancelled')) AS cancelled, {_PERCENTILES.format("queue_")}
FROM usage_hour AS h WHERE {HOUR.range} GROUP BY model_name ORDER BY model_name"""  # noqa: S608

DEVICE_QUERY = f"""WITH {_QUANTILES}(total_time_us_digest) AS found
SELECT toInt64(toUnixTimestamp(hour)) * {US_PER_SECOND} AS hour_us, nullIf(device, '') AS device_uuid, model_name,
    toInt64(sum(h.events)) AS events, toDecimal128(toString(sum(h.gpu_time_ns_sum)), 0) AS gpu_time_ns,
    min(h.gpu_time_ns_min) AS gpu_time_ns_min, max(h.gpu_time_ns_max) AS gpu_time_ns_max,
    toInt64(sum(h.energy_mj_known)) AS energy_known,
    toDecimal128(toString(sum(h.energy_mj_sum)), 0) AS energy_mj, {_PERCENTILES.format("")}
FROM usage_hour AS h WHERE {HOUR.range} GROUP BY hour, device, model_name ORDER BY hour, device, model_name"""  # noqa: S608

HOURS_QUERY = f"""SELECT DISTINCT hour_us FROM (
    SELECT intDiv(toUnixTimestamp64Micro(recorded_at), {HOUR_US}) * {HOUR_US} AS hour_us FROM usage_events
    UNION ALL
    SELECT intDiv(toInt64(toUnixTimestamp(minute)) * {US_PER_SECOND}, {HOUR_US}) * {HOUR_US} FROM usage_minute)
WHERE hour_us >= {{start:Int64}} AND hour_us < {{end:Int64}} ORDER BY hour_us"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Latency:
    """Estimated quantiles (t-digest) of a model's time from request to answer."""

    model_name: str
    events: int
    p50_us: int
    p90_us: int
    p99_us: int


@dataclass(frozen=True, slots=True)
class CustomerUsage:
    """What one customer used of one model: exact sums. Tokens are of the events that are known to have some."""

    customer_ref: str
    model_name: str
    events: int
    gpu_time_ns: int
    input_tokens_known: int
    input_tokens: int
    output_tokens_known: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class QueueHealth:
    """How a model's jobs ended, and estimated quantiles (t-digest) of the time that they waited."""

    model_name: str
    events: int
    succeeded: int
    failed: int
    timed_out: int
    cancelled: int
    queue_p50_us: int
    queue_p90_us: int
    queue_p99_us: int

    @property
    def failed_ppm(self) -> int:
        """Errors and time-outs among a million events, rounded down."""
        return (self.failed + self.timed_out) * 1_000_000 // self.events


@dataclass(frozen=True, slots=True)
class DeviceHour:
    """An hour of one device, for one model. `device_uuid` is None where no device was told.

    `energy_mj` is the sum over the `energy_known` events that have a reading; the quantiles, estimated, are of the
    time from request to answer.
    """

    hour_us: int
    device_uuid: str | None
    model_name: str
    events: int
    gpu_time_ns: int
    gpu_time_ns_min: int
    gpu_time_ns_max: int
    energy_known: int
    energy_mj: int
    p50_us: int
    p90_us: int
    p99_us: int


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A verdict on one hour, as dashboards read it. `digest` is that of the report's bytes; `error` says why a side
    could not be read."""

    hour_us: int
    revision: int
    status: str
    final: bool
    windows_pending: int
    events: int
    fast_events: int
    gpu_time_ns: int
    fast_gpu_time_ns: int
    missing: int
    duplicated: int
    altered: int
    unexpected: int
    digest: str
    error: str
    reported_at_us: int


_REPORT_KINDS = {"status": pa.string(), "digest": pa.string(), "error": pa.string(), "final": pa.bool_()}
_REPORT_KINDS |= {name: pa.decimal128(38, 0) for name in ("gpu_time_ns", "fast_gpu_time_ns")}
REPORT_SCHEMA = pa.schema([(name, _REPORT_KINDS.get(name, pa.int64())) for name in ReportRow.__slots__])
REPORTS_QUERY = f"""SELECT {", ".join(REPORT_SCHEMA.names)} FROM reconciliation_reports FINAL
WHERE hour_us >= {{start:Int64}} AND hour_us < {{end:Int64}} ORDER BY hour_us, revision"""  # noqa: S608
