"""The fast path's tables and the statements that read them. Both engines' expressions give equal values.

`usage_events` derives from EVENT_SCHEMA; `usage_minute` is an AggregatingMergeTree fed by a view. Both have a
deduplication window: without one on the rollup too, a retried insert would count twice there.
"""

from __future__ import annotations

import pyarrow as pa

from render_platform.clock import US_PER_SECOND, WINDOW_US
from render_platform.events import EVENT_SCHEMA

_DEDUPLICATION = "non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1"


def _column(field: pa.Field) -> str:
    """The ClickHouse column of a field of EVENT_SCHEMA."""
    kinds = {pa.uuid(): "UUID", pa.binary(16): "FixedString(16)", pa.int64(): "Int64", pa.string(): "String"}
    kind = "DateTime64(6, 'UTC')" if pa.types.is_timestamp(field.type) else kinds[field.type]
    kind = f"Nullable({kind})" if field.nullable else kind
    repeats = (field.metadata or {}).get(b"repeats") == b"yes"
    return f"`{field.name}` {f'LowCardinality({kind})' if repeats else kind}"


EVENTS_TABLE = f"""CREATE TABLE IF NOT EXISTS usage_events ({", ".join(_column(field) for field in EVENT_SCHEMA)})
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

MINUTE_SELECT = """SELECT toStartOfMinute(recorded_at) AS minute, customer_ref, model_name, count() AS events,
    sum(toInt128(gpu_time_ns)) AS gpu_time_ns_sum,
    min(gpu_time_ns) AS gpu_time_ns_min, max(gpu_time_ns) AS gpu_time_ns_max,
    count(input_tokens) AS input_tokens_known, sum(toInt128(ifNull(input_tokens, 0))) AS input_tokens_sum,
    count(output_tokens) AS output_tokens_known, sum(toInt128(ifNull(output_tokens, 0))) AS output_tokens_sum,
    quantilesTDigestState(0.5, 0.9, 0.99)(total_time_us) AS total_time_us_digest
FROM usage_events GROUP BY minute, customer_ref, model_name"""
"""What the view adds to `usage_minute` for each inserted block; a rebuild runs it over a whole day."""

MINUTE_VIEW = f"CREATE MATERIALIZED VIEW IF NOT EXISTS usage_minute_view TO usage_minute AS {MINUTE_SELECT}"

MIGRATIONS: tuple[tuple[int, str, tuple[str, ...]], ...] = (
    (1, "usage events", (EVENTS_TABLE,)),
    (2, "rollup by minute", (MINUTE_TABLE, MINUTE_VIEW)),
)
"""Number, name, statements. Each statement may run again: a crash may come between any two."""

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
_ID_SUMS = {"id_sum": pa.uint64(), "id_high_sum": pa.uint64(), "bound_sum": pa.uint64()}
ROLLUP_SCHEMA = pa.schema([pa.field(name, kind, False) for name, kind in _SUMS.items()])
WINDOW_SCHEMA = pa.schema([pa.field(name, kind, False) for name, kind in (_SUMS | _ID_SUMS).items()])

_BY_KEY = "GROUP BY `window`, customer_ref, model_name ORDER BY `window`, customer_ref, model_name"
WINDOWS_QUERY = f"""WITH reinterpretAsUInt64(reverse(substring(UUIDToNum(event_id), 9, 8))) AS lo,
    reinterpretAsUInt64(reverse(substring(UUIDToNum(event_id), 1, 8))) AS hi
SELECT intDiv(toUnixTimestamp64Micro(recorded_at), {WINDOW_US}) AS `window`, customer_ref, model_name,
    toInt64(count()) AS events, toDecimal128(toString(sum(toInt128(e.gpu_time_ns))), 0) AS gpu_time_ns,
    sum(lo) AS id_sum, sum(hi) AS id_high_sum, sum(bitAnd(lo, 4294967295) * toUInt64(e.gpu_time_ns)) AS bound_sum
FROM usage_events AS e WHERE {RANGE} {_BY_KEY}"""  # noqa: S608

ROLLUP_QUERY = f"""SELECT intDiv(toInt64(toUnixTimestamp(minute)), {WINDOW_US // US_PER_SECOND}) AS `window`,
    customer_ref, model_name, toInt64(sum(m.events)) AS events,
    toDecimal128(toString(sum(m.gpu_time_ns_sum)), 0) AS gpu_time_ns
FROM usage_minute AS m WHERE {MINUTE_RANGE} {_BY_KEY}"""  # noqa: S608

_READ = (f"UUIDToNum(e.{f.name}) AS {f.name}" if f.type == pa.uuid() else f.name for f in EVENT_SCHEMA)
ROWS_QUERY = f"""SELECT {", ".join(_READ)}
FROM usage_events AS e WHERE {RANGE}"""  # noqa: S608
ROWS_OF_KEYS = """AND (e.customer_ref, e.model_name) IN
    (SELECT arrayJoin(arrayZip({customers:Array(String)}, {models:Array(String)})))"""
ROWS_ORDER = "ORDER BY UUIDToNum(e.event_id), recorded_at, gpu_time_ns"

LATENCY_QUERY = f"""SELECT model_name, toInt64(sum(m.events)) AS events,
    arrayMap(x -> toInt64(round(x)), quantilesTDigestMerge(0.5, 0.9, 0.99)(total_time_us_digest)) AS quantiles
FROM usage_minute AS m WHERE {MINUTE_RANGE} GROUP BY model_name ORDER BY model_name"""  # noqa: S608
