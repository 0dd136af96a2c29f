"""The outbox's backlog launches a flush: by rows, or by the age of the oldest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg

from assets.jobs import IN_PROGRESS, flush
from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError
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
    except UsageError as error:
        return dg.SkipReason(str(error))
    if backlog.oldest_recorded_at is None and not backlog.batches:
        return dg.SkipReason("the outbox is empty")
    age_s = (now - (backlog.oldest_recorded_at or 0)) // US_PER_SECOND
    if backlog.rows < settings.backlog_rows and age_s < settings.backlog_age_s:
        return dg.SkipReason(f"{backlog.rows} events wait, the oldest for {age_s} s")
    recent = datetime.now(UTC) - STUCK_AFTER
    flushing = dg.RunsFilter(job_name=flush.name, statuses=IN_PROGRESS, updated_after=recent)
    if context.instance.get_runs_count(flushing):
        return dg.SkipReason("a flush is in progress")
    return dg.RunRequest(tags={"render_platform/backlog_rows": str(backlog.rows)})
