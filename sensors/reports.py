"""Fills in what the serving side did not report: materializations of `gpu_jobs` for ranges that no report covers.

The gateway reports what it committed, best effort. This sensor goes after it, two minutes behind: it keeps the time up
to which all is reported, reads the reports that stand, and asks SQL what lies in the holes between them, for each
gateway. What it fills in is a report like any other: after a tick that was cut short, the next one finds it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

import dagster as dg
import sqlalchemy as sa

from assets.billing import gpu_jobs
from render_platform.clock import DAY_US, US_PER_SECOND, iso
from render_platform.database import lanes
from render_platform.errors import UsageError
from render_platform.gateway.reporter import FROM_US, GATEWAY, THROUGH_US, report_metadata
from render_platform.outbox import LIVE
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

BEHIND_S = 120
"""Younger events may still be reported; where a gateway reports less often than every minute, twice its interval."""
MAX_REPORTS = 2_000
MAX_FILLED = 50
"""Reports read, and holes filled, by one tick; the next one goes on."""


class Range(NamedTuple):
    """Of `recorded_at`, half-open."""

    from_us: int
    through_us: int


class Report(NamedTuple):
    """A materialization that stands; no gateway and an empty range where somebody else made it."""

    storage_id: int
    at_us: int
    gateway: str
    range: Range


class Hole(NamedTuple):
    """A range that no report of the gateway covers."""

    range: Range
    gateway: str


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Materializes gpu_jobs for recorded jobs that no gateway reported within two minutes.",
)
def gpu_jobs_backstop(
    context: dg.SensorEvaluationContext, platform: PlatformResource
) -> dg.SensorResult | dg.SkipReason:
    done_us, after_id = _read_cursor(context.cursor)
    reports = _read_reports(context.instance, after_id)
    try:
        with platform.open() as open_platform:
            begin = _kept_begin(open_platform, done_us)
            end = settled_until(open_platform.clock.now_us(), reports, open_platform.settings.report_every_s)
            if begin is None or end <= begin:
                return dg.SkipReason("nothing new was recorded more than two minutes ago")
            gateways = sorted({gateway for gateway, _, _ in open_platform.outbox.live_totals(begin, end)})
            found, end = bounded(holes(reports, gateways, Range(begin, end)), end)
            filled = [event for hole in found if (event := _fill(open_platform, hole))]
    except UsageError as error:
        return dg.SkipReason(str(error))
    settled = takewhile(lambda report: report.range.through_us <= end, reports)
    after_id = max((report.storage_id for report in settled), default=after_id)
    said = f"{len(filled)} ranges filled in; all is reported up to {iso(end)}"
    return dg.SensorResult(
        asset_events=filled,
        cursor=json.dumps({"through_us": end, "after_id": after_id}),
        skip_reason=dg.SkipReason(said),
    )


def holes(reports: Iterable[Report], gateways: Iterable[str], within: Range) -> list[Hole]:
    """What the reports of each gateway leave of a range, in the order of time."""
    reports = sorted(reports, key=lambda report: report.range)
    found = []
    for gateway in gateways:
        reached = within.from_us
        for report in reports:
            if report.gateway != gateway:
                continue
            if report.range.from_us > reached:
                found.append(Hole(Range(reached, min(report.range.from_us, within.through_us)), gateway))
            reached = max(reached, report.range.through_us)
            if reached >= within.through_us:
                break
        if reached < within.through_us:
            found.append(Hole(Range(reached, within.through_us), gateway))
    return sorted(found)


def settled_until(now_us: int, reports: Sequence[Report], report_every_s: int) -> int:
    """The time before which every report that will come has been read."""
    if len(reports) >= MAX_REPORTS:  # there may be more, and they were made later
        now_us = min(now_us, reports[-1].at_us)
    return now_us - max(BEHIND_S, 2 * report_every_s) * US_PER_SECOND


def bounded(found: Sequence[Hole], end_us: int) -> tuple[list[Hole], int]:
    """The first MAX_FILLED holes, cut where the next one begins, and the time up to which nothing is left out."""
    if len(found) <= MAX_FILLED:
        return list(found), end_us
    end_us = found[MAX_FILLED].range.from_us
    cut = [Hole(Range(hole.range.from_us, min(hole.range.through_us, end_us)), hole.gateway) for hole in found]
    return [hole for hole in cut if hole.range.from_us < end_us], end_us


def _fill(platform: Platform, hole: Hole) -> dg.AssetMaterialization | None:
    """A report of what SQL holds of the hole; None where that is nothing. The same hole has the same report id."""
    totals = platform.outbox.live_totals(*hole.range)
    figures = {(model, status): one for (gateway, model, status), one in totals.items() if gateway == hole.gateway}
    if not figures:
        return None
    report_id = f"{hole.gateway}/{hole.range.from_us}-{hole.range.through_us}"
    return dg.AssetMaterialization(
        gpu_jobs.key,
        description="Read from SQL: the gateway did not report these jobs.",
        metadata=report_metadata(hole.gateway, *hole.range, figures, report_id),
    )


def _kept_begin(platform: Platform, done_us: int | None) -> int | None:
    """What is reported already, or the begin of the live lane; but no time whose reports, or rows in SQL, housekeeping
    may have deleted: figures of some rows alone would be wrong. None where nothing is recorded."""
    with platform.database.read() as connection:
        begin = connection.execute(sa.select(lanes.c.start_us).filter_by(lane=LIVE)).scalar()
    settings, now_us = platform.settings, platform.clock.now_us()
    rows_us = now_us - settings.outbox_retention_days * DAY_US
    if done_us is not None:
        return max(done_us, rows_us)
    return None if begin is None else max(int(begin), rows_us, now_us - settings.dagster_retention_days * DAY_US)


def _read_reports(instance: dg.DagsterInstance, after_id: int) -> list[Report]:
    """The reports stored after one, in that order."""
    wanted = dg.AssetRecordsFilter(asset_key=gpu_jobs.key, after_storage_id=after_id)
    records = instance.fetch_materializations(wanted, limit=MAX_REPORTS, ascending=True).records
    return [_report_of(record) for record in records]


def _report_of(record: dg.EventLogRecord) -> Report:
    at_us = int(record.timestamp * US_PER_SECOND)
    materialization = record.asset_materialization
    metadata = {} if materialization is None else materialization.metadata
    gateway, start, end = [
        metadata[name].value if name in metadata else None for name in (GATEWAY, FROM_US, THROUGH_US)
    ]
    if isinstance(gateway, str) and isinstance(start, int) and isinstance(end, int):
        return Report(record.storage_id, at_us, gateway, Range(start, end))
    return Report(record.storage_id, at_us, "", Range(0, 0))


def _read_cursor(text: str | None) -> tuple[int | None, int]:
    """The time up to which all is reported, and the last report before it; a cursor that is none begins anew."""
    try:
        found = json.loads(text or "")
        return int(found["through_us"]), int(found["after_id"])
    except (ValueError, KeyError, TypeError):
        return None, 0
