"""Checks of what runs all the time: is the flush fresh, is the fast path, is reconciliation; and conservation.

The job `health` runs them every five minutes. They hold on the lane of what happens now: a trace's hours are old when
they are recorded. What cannot be read is unknown, and unknown fails: it never passes. None is partitioned.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from assets.jobs import START, day_of_key
from render_platform.clickhouse_schema import RANGE
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND, WINDOW_US, hour_of, iso
from render_platform.database import UNPUBLISHED, batches, lanes, usage_events
from render_platform.errors import PlatformError
from render_platform.metering import conservation
from render_platform.outbox import LIVE
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

ERROR = dg.AssetCheckSeverity.ERROR
SLOW_PATH_S = 60
"""An event is under a published checkpoint within this time, or within `backlog_age_s` where that is longer."""
MARGIN_S = 30
FAST_PATH_BEHIND_S = 60
RECONCILED_WITHIN_US = 2 * HOUR_US
NEWEST_ROWS = "SELECT toInt64(count()) AS rows, toUnixTimestamp64Micro(max(recorded_at)) AS newest_us FROM usage_events"
LATE_ROWS = f"SELECT toInt64(count()) AS rows FROM usage_events WHERE {RANGE}"  # noqa: S608  a constant


class Look(NamedTuple):
    """What a check saw."""

    passed: bool
    said: str
    metadata: Mapping[str, Any]


def result_of(platform: PlatformResource, look: Callable[[Platform], Look]) -> dg.AssetCheckResult:
    """What `look` sees of the platform, at ERROR; a part that cannot be read fails the check, and is named."""
    try:
        with platform.open() as opened:
            passed, said, metadata = look(opened)
    except PlatformError as error:
        passed, said, metadata = False, f"unknown: {error}", {}
    return dg.AssetCheckResult(passed=passed, severity=ERROR, description=said, metadata=metadata)


@dg.asset_check(
    asset="audit_log",
    name="flush_freshness",
    description=(
        "Every live event is under a published checkpoint within a minute. If not: see why the last runs of the job "
        "flush failed, or why none was launched (sensor outbox_backlog, Dagster's daemon); then launch flush. Nothing "
        "is lost meanwhile: events wait in SQL."
    ),
)
def flush_freshness(platform: PlatformResource) -> dg.AssetCheckResult:
    return result_of(platform, look_at_flush)


@dg.asset_check(
    asset="inference_events",
    name="fast_path_freshness",
    description=(
        "ClickHouse holds what SQL recorded more than a minute ago. If not: see that ClickHouse answers, and what the "
        "gateway says of fast_path_dropped; then reconcile the hours, and materialize fast_path_repair for them."
    ),
)
def fast_path_freshness(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    """Also observes `inference_events`, which nobody materializes: how many rows there are, and how new they are."""

    def look(opened: Platform) -> Look:
        found = look_at_fast_path(opened)
        context.op_execution_context.log_event(dg.AssetObservation("inference_events", metadata=found.metadata))
        return found

    return result_of(platform, look)


@dg.asset_check(
    asset="reconciliation",
    name="reconciliation_freshness",
    description=(
        "No closed hour waits for its report for more than two hours. If one does: see why the last runs of the job "
        "reconcile failed, and that the schedule reconciliation_every_five_minutes is on; then launch reconcile for it."
    ),
)
def reconciliation_freshness(platform: PlatformResource) -> dg.AssetCheckResult:
    return result_of(platform, look_at_reconciliation)


def look_at_flush(platform: Platform) -> Look:
    """The oldest live event that no published checkpoint covers, against the promise."""
    with platform.database.read() as connection:
        oldest_us = oldest_unpublished(connection)
    limit_s = max(SLOW_PATH_S, platform.settings.backlog_age_s) + MARGIN_S
    if oldest_us is None:
        return Look(True, "every live event is under a published checkpoint", {"limit s": limit_s})
    age_s = max(0, platform.clock.now_us() - oldest_us) // US_PER_SECOND
    said = f"the oldest event that is not published was recorded {age_s} s ago, at {iso(oldest_us)}"
    return Look(age_s <= limit_s, said, {"age s": age_s, "limit s": limit_s})


def look_at_fast_path(platform: Platform) -> Look:
    """The newest row of ClickHouse against the newest live event that the fast path had time for."""
    now_us = platform.clock.now_us()
    with platform.database.read() as connection:
        settled_us = newest_settled(connection, now_us - platform.settings.fast_path_deadline_s * US_PER_SECOND)
    row = platform.clickhouse.query(NEWEST_ROWS).to_pylist()[0]
    late = platform.clickhouse.query(LATE_ROWS, start=now_us - HOUR_US, end=now_us + DAY_US).to_pylist()[0]
    newest_us = int(row["newest_us"]) if row["rows"] else None
    metadata: dict[str, Any] = {"dagster/row_count": int(row["rows"]), "rows of the last hour": int(late["rows"])}
    metadata["newest row"] = iso(newest_us) if newest_us is not None else "none"
    if settled_us is None:
        return Look(True, "no live event of the last day is old enough to be asked for", metadata)
    behind_s = max(0, settled_us - (newest_us or 0)) // US_PER_SECOND
    there = f"ClickHouse's newest row is of {metadata['newest row']}" if newest_us else "ClickHouse holds no row"
    said = f"{there}; SQL holds an event of {iso(settled_us)}"
    return Look(behind_s <= FAST_PATH_BEHIND_S, said, {**metadata, "behind s": behind_s})


def look_at_reconciliation(platform: Platform) -> Look:
    """Live hours that are closed, and have had no current report for long."""
    now_us = platform.clock.now_us()
    with platform.database.read() as connection:
        begin_us = connection.execute(sa.select(lanes.c.start_us).filter_by(lane=LIVE)).scalar()
    if begin_us is None:
        return Look(True, "nothing was ever recorded live", {})
    oldest_us = max(int(begin_us), platform.reconciler.kept_from(), day_of_key(START)[0])
    due = [hour for hour in platform.hours.due() if hour >= oldest_us]
    late = [iso(hour) for hour in due if hour + HOUR_US + RECONCILED_WITHIN_US < now_us]
    said = f"{len(late)} hours wait for their report for more than two hours, since {late[0]}" if late else ""
    metadata = {"hours": late[:50], "due hours": len(due)}
    return Look(not late, said or "no live hour waits for its report for long", metadata)


def oldest_unpublished(connection: sa.Connection) -> int | None:
    """`recorded_at` of the oldest live event that no published checkpoint covers; indexes serve each part."""
    filling = sa.select(batches.c.batch_id).filter_by(lane=LIVE, state="filling")
    at = sa.func.min(usage_events.c.recorded_at)
    parts = (
        sa.select(at).where(usage_events.c.lane == LIVE, usage_events.c.batch_id.is_(None)),
        sa.select(at).where(usage_events.c.batch_id.in_(filling)),  # whose own times are not known yet
        sa.select(sa.func.min(batches.c.first_recorded_at)).where(
            batches.c.lane == LIVE, batches.c.type == "usage_batch", batches.c.state.in_(UNPUBLISHED)
        ),
    )
    found = [connection.execute(part).scalar() for part in parts]
    return min((int(one) for one in found if one is not None), default=None)


def newest_settled(connection: sa.Connection, until_us: int) -> int | None:
    """`recorded_at` of a live event at or before `until_us`, of the last day: the newest, or near it.

    Of a batch that begins before and ends after that time, its first event is taken: it surely is one.
    """
    event, batch = usage_events.c, batches.c
    last = sa.case(
        (batch.last_recorded_at <= until_us, batch.last_recorded_at),
        (batch.first_recorded_at <= until_us, batch.first_recorded_at),
    )
    since_us = hour_of(until_us - DAY_US)
    parts = (
        sa.select(sa.func.max(event.recorded_at)).where(
            event.lane == LIVE, event.batch_id.is_(None), event.recorded_at.between(since_us, until_us)
        ),
        sa.select(sa.func.max(last)).where(
            batch.lane == LIVE, batch.type == "usage_batch", batch.hour_us.between(since_us, until_us)
        ),
    )
    found = [connection.execute(part).scalar() for part in parts]
    return max((int(one) for one in found if one is not None), default=None)


def overbilled(table: pa.Table) -> list[str]:
    """What breaks conservation in a table of EVENT_SCHEMA: the window of five minutes in which the GPU work began, the
    device, what was billed and what ran. Conservation holds for any subset of events: so for those of each window, and
    for all of them together, where the windows alone show nothing."""
    began = pc.divide(table.column("gpu_started_at").cast(pa.int64()), WINDOW_US).combine_chunks()
    order = pc.sort_indices(began)
    sorted_table, windows = table.take(order), np.asarray(began.take(order))
    found, first, counts = np.unique(windows, return_index=True, return_counts=True)
    broken = [
        f"window {iso(int(window) * WINDOW_US)}: {problem}"
        for window, start, count in zip(found.tolist(), first.tolist(), counts.tolist(), strict=True)
        for problem in conservation(sorted_table.slice(start, count))
    ]
    if broken or len(found) < 2:
        return broken
    span = f"windows {iso(int(found[0]) * WINDOW_US)} to {iso(int(found[-1]) * WINDOW_US)}"
    return [f"{span}: {problem}" for problem in conservation(table)]
