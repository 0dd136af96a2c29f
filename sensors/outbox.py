"""The outbox's backlog launches a flush: by rows, or by the age of the oldest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import takewhile

import dagster as dg

from assets.jobs import IN_PROGRESS, flush
from render_platform.clock import US_PER_SECOND
from render_platform.config import Settings
from render_platform.errors import UsageError
from render_platform.outbox import Backlog
from resources.platform import PlatformResource

STUCK_AFTER = timedelta(minutes=10)
"""A flush takes seconds: one that has said nothing for so long is dead, and a second one would be harmless anyway."""


@dg.sensor(
    job=flush,
    minimum_interval_seconds=4,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Launches a flush when the outbox holds many events, or one that has waited for long.",
)
def outbox_backlog(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.RunRequest | dg.SkipReason:
    """No run key: a key made of the high-water mark would never fire again after a failed run."""
    try:
        with platform.open() as open_platform:
            backlog = open_platform.outbox.backlog()
            settings, now = open_platform.settings, open_platform.clock.now_us()
            due = open_platform.outbox.hour_is_due(now)
    except UsageError as error:
        return dg.SkipReason(str(error))
    if not due and (reason := _too_little(backlog, settings, now)):
        return dg.SkipReason(reason)
    if reason := _failing(context.instance):
        return dg.SkipReason(reason)
    recent = datetime.now(UTC) - STUCK_AFTER
    flushing = dg.RunsFilter(job_name=flush.name, statuses=IN_PROGRESS, updated_after=recent)
    if context.instance.get_runs_count(flushing):
        return dg.SkipReason("a flush is in progress")
    return dg.RunRequest(tags={"render_platform/backlog_rows": str(backlog.rows)})


def _too_little(backlog: Backlog, settings: Settings, now_us: int) -> str:
    """Why there is nothing to flush yet; empty where there is."""
    if backlog.oldest_recorded_at is None and not backlog.batches:
        return "the outbox is empty"
    age_s = (now_us - (backlog.oldest_recorded_at or 0)) // US_PER_SECOND
    if backlog.rows < settings.backlog_rows and age_s < settings.backlog_age_s:
        return f"{backlog.rows} events wait, the oldest for {age_s} s"
    return ""


def _failing(instance: dg.DagsterInstance) -> str:
    """Why to wait after flushes that failed: twice as long after each in a row, up to ten minutes."""
    records = instance.get_run_records(dg.RunsFilter(job_name=flush.name), limit=8)
    failed = list(takewhile(lambda record: record.dagster_run.status == dg.DagsterRunStatus.FAILURE, records))
    if not failed:
        return ""
    wait = min(timedelta(seconds=5 * 2 ** len(failed)), STUCK_AFTER)
    ended = failed[0].update_timestamp
    ended = ended if ended.tzinfo else ended.replace(tzinfo=UTC)
    left = ended + wait - datetime.now(UTC)
    return f"the last {len(failed)} flushes failed; the next in {left}" if left > timedelta() else ""
