"""Schedules of operations: what is looked at once an hour."""

from __future__ import annotations

import dagster as dg

from assets.jobs import capacity, hour_key
from render_platform.clock import HOUR_US, US_PER_SECOND, hour_of
from render_platform.errors import UsageError
from resources.platform import PlatformResource


@dg.schedule(
    job=capacity,
    cron_schedule="7 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Plans capacity from the hour before: by seven minutes past, its events are in ClickHouse.",
)
def capacity_hourly(context: dg.ScheduleEvaluationContext, platform: PlatformResource) -> dg.RunRequest | dg.SkipReason:
    """The key is the tick's own; a run that failed is not asked for again: the next hour has its own plan."""
    at = context.scheduled_execution_time
    hour = hour_of(int(at.timestamp()) * US_PER_SECOND) - HOUR_US
    try:
        with platform.open() as open_platform:
            covered = open_platform.hours.covered(hour)
    except UsageError as error:
        return dg.SkipReason(str(error))
    if not covered:
        return dg.SkipReason(f"nothing recorded into {hour_key(hour)}")
    return dg.RunRequest(run_key=at.isoformat(), partition_key=hour_key(hour))
