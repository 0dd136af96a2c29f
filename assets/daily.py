"""A day: what its batches hold, added up, and the report of its hours with plots."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import dagster as dg
import duckdb
import pyarrow as pa

from assets import plots, views
from assets.jobs import BACKFILL, DAYS, day_of_key
from render_platform import canonical
from render_platform.clickhouse_schema import DeviceHour, Latency
from render_platform.clock import DAY_US, HOUR_US, iso
from render_platform.errors import PlatformError, Unavailable
from render_platform.pipeline import Platform
from render_platform.slow_path import CLICKHOUSE, DUCKDB, Statement, Words
from resources.platform import PlatformResource

ROW = ["hour", "status", "revision", "events", "fast events", "events missing", "GPU seconds", "GPU seconds missing"]
_KINDS = ("str", "str", "int", "int", "int", "int", "decimal", "decimal")
NO_DEVICE = "no device told"


def _sums(words: Words) -> str:
    at, total = words.micros.format("recorded_at"), words.total.format("gpu_time_ns")
    return f"""
        SELECT {at} % {DAY_US} - {at} % {HOUR_US} AS hour_us, model_name, customer_ref,
               count(*) AS events, {total} AS gpu_ns
        FROM {words.batches} GROUP BY GROUPING SETS ((hour_us, model_name), (customer_ref))
    """  # noqa: S608  constants only


_SUMS_SCHEMA = pa.schema(
    [
        ("hour_us", pa.int64()),
        ("model_name", pa.string()),
        ("customer_ref", pa.string()),
        ("events", pa.int64()),
        ("gpu_ns", pa.decimal128(38, 0)),
    ]
)
"""`hour_us` counts from the day's begin."""
_SUMS = Statement(_sums(DUCKDB), _sums(CLICKHOUSE), _SUMS_SCHEMA)


class Used(NamedTuple):
    """What a day's batches hold: exact GPU ns by (model, hour of the day), and (customer, events, GPU ns)."""

    by_model: dict[tuple[str, int], int]
    by_customer: list[tuple[str, int, int]]


class Hour(NamedTuple):
    """What the last report of an hour says; numbers are None where there is none."""

    hour_us: int
    status: str
    revision: int | None = None
    events: int | None = None
    fast_events: int | None = None
    gpu_time_ns: int | None = None
    fast_gpu_time_ns: int | None = None


class Day(NamedTuple):
    """`deltas` are, by window, (µs since the day's begin, events, GPU ns) that the fast path lacks."""

    hours: list[Hour]
    deltas: list[tuple[int, int, int]]
    latencies: list[Latency]
    devices: list[DeviceHour]


@dg.asset(
    deps=["inference_events", "reconciliation"],
    partitions_def=DAYS,
    backfill_policy=BACKFILL,
    group_name="operations",
    kinds={"clickhouse", "json"},
    owners=["team:operations"],
    output_required=False,
    description=(
        "A day at a glance: what the reports of its hours say, and what ClickHouse says of models and devices. One row "
        "is one hour of the day. Materialized over one day it has plots; over a range, the figures alone."
    ),
    metadata={
        "dagster/column_schema": views.columns(
            *((name, kind, name not in ("hour", "status")) for name, kind in zip(ROW, _KINDS, strict=True))
        )
    },
)
def daily_report(context: dg.AssetExecutionContext, platform: PlatformResource) -> Iterator[dg.MaterializeResult[None]]:
    """Each day is materialized when it was read; one that cannot be read spoils no other."""
    keys = context.partition_keys
    unread = []
    with platform.open() as open_platform:
        for key in keys:
            try:
                day = read_day(open_platform, day_of_key(key)[0])
            except PlatformError as error:
                unread.append(f"{key}: {error}")
                continue
            if len(keys) == 1:
                yield dg.MaterializeResult(metadata={**figures(day), **pictures(day)})
            else:
                context.log_event(dg.AssetMaterialization("daily_report", metadata=figures(day), partition=key))
    if unread:
        raise dg.Failure(
            f"{len(unread)} of {len(keys)} days could not be read: {unread[0]}",
            metadata={"days": views.problems(unread)},
        )


def read_day(platform: Platform, day_us: int) -> Day:
    """The reports of a day's hours, as the log binds them, and ClickHouse's rollups of the day.

    Unavailable where a report or ClickHouse cannot be read, or no longer keeps the day: unknown is not zero.
    """
    end_us = day_us + DAY_US
    if day_us < platform.reconciler.kept_from():
        raise Unavailable(f"ClickHouse no longer keeps {iso(day_us)[:10]}", "see the reports of its hours in the log")
    read = [_hour(platform, hour_us) for hour_us in range(day_us, end_us, HOUR_US)]
    return Day(
        hours=[hour for hour, _ in read],
        deltas=[(start - day_us, events, ns) for _, deltas in read for start, events, ns in deltas],
        latencies=platform.clickhouse.latency_quantiles(day_us, end_us),
        devices=platform.clickhouse.device_hours(day_us, end_us),
    )


def _hour(platform: Platform, hour_us: int) -> tuple[Hour, list[tuple[int, int, int]]]:
    last = platform.hours.last_report(hour_us)
    if last is None:
        return Hour(hour_us, "not reported"), []
    windows = canonical.decode(platform.cas.get(last.digest))["windows"]
    sums = [sum(window[name] for window in windows) for name in Hour._fields[3:]]
    deltas = [
        (w["start_us"], w["events"] - w["fast_events"], w["gpu_time_ns"] - w["fast_gpu_time_ns"]) for w in windows
    ]
    return Hour(hour_us, "out of date" if last.dirty else last.status, last.revision, *sums), deltas


def figures(day: Day) -> dict[str, Any]:
    """A few numbers: they stand in the event of each partition of a range."""
    known = [hour for hour in day.hours if hour.revision is not None]
    return {
        "dagster/partition_row_count": len(day.hours),
        "hours reported": len(known),
        "hours reconciled": sum(hour.status == "reconciled" for hour in day.hours),
        "events reported": sum(hour.events or 0 for hour in known),
        "events missing from the fast path": sum(events for _, events, _ in day.deltas),
        "GPU seconds missing from the fast path": views.gpu_seconds(sum(ns for *_, ns in day.deltas)),
        "events in ClickHouse": sum(one.events for one in day.devices),
        "GPU seconds in ClickHouse": views.gpu_seconds(sum(one.gpu_time_ns for one in day.devices)),
    }


def pictures(day: Day) -> dict[str, Any]:
    """The table of hours, and the plots, for a run over one day."""
    by_model: dict[tuple[str, int], int] = defaultdict(int)
    by_device: dict[tuple[str, int], int] = defaultdict(int)
    for one in day.devices:
        hour = one.hour_us % DAY_US // HOUR_US
        by_model[one.model_name, hour] += one.gpu_time_ns
        by_device[one.device_uuid or NO_DEVICE, hour] += one.gpu_time_ns
    busiest = sorted(day.latencies, key=lambda model: -model.events)
    return {
        "hours": views.table([_row(hour) for hour in day.hours], ROW),
        "GPU seconds by model": plots.svg(plots.gpu_seconds_by_model(by_model)),
        "deltas": plots.svg(plots.deltas(day.deltas)),
        "latency": plots.svg(plots.latency([(one.model_name, one.p50_us, one.p90_us, one.p99_us) for one in busiest])),
        "utilisation": plots.svg(plots.utilisation(by_device)),
    }


def _row(hour: Hour) -> dict[str, Any]:
    known = (hour.events, hour.fast_events, hour.gpu_time_ns, hour.fast_gpu_time_ns)
    values: tuple[Any, ...] = (None,) * 5
    if hour.revision is not None:
        events, fast_events, ns, fast_ns = (one or 0 for one in known)
        seconds = views.gpu_seconds(ns), views.gpu_seconds(ns - fast_ns)
        values = (events, fast_events, events - fast_events, *seconds)
    return dict(zip(ROW, (iso(hour.hour_us)[11:16], hour.status, hour.revision, *values), strict=True))


def day_of_batches(platform: Platform, connection: duckdb.DuckDBPyConnection, start_us: int, end_us: int) -> Used:
    """What the published batches of a day's hours hold, read once, each blob checked against its digest.

    Finding where a blob is not what the log names; Unavailable where one, or the engine, cannot be read.
    """
    by_model: dict[tuple[str, int], int] = defaultdict(int)
    events: dict[str, int] = defaultdict(int)
    gpu_time_ns: dict[str, int] = defaultdict(int)
    for hour_us in range(start_us, end_us, HOUR_US):
        for chunk in platform.slow.read(platform.slow.hour(hour_us), _SUMS, connection):
            for row in chunk.to_pylist():
                if row["customer_ref"] is None:
                    by_model[row["model_name"], row["hour_us"] // HOUR_US] += int(row["gpu_ns"])
                else:
                    events[row["customer_ref"]] += row["events"]
                    gpu_time_ns[row["customer_ref"]] += int(row["gpu_ns"])
    return Used(dict(by_model), [(ref, events[ref], gpu_time_ns[ref]) for ref in events])
