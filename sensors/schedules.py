"""Schedules: the current hour is reconciled every five minutes; at the full hour, the one that just ended."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

from assets.jobs import hour_key, reconcile
from render_platform.clock import US_PER_SECOND
from render_platform.errors import UsageError
from resources.platform import PlatformResource


@dg.schedule(
    job=reconcile,
    cron_schedule="*/5 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Reconciles the hour of the scheduled time less a second, if any lane records into it.",
)
def reconciliation_every_five_minutes(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> dg.RunRequest | dg.SkipReason:
    at = context.scheduled_execution_time - timedelta(seconds=1)
    at_us = int(at.timestamp()) * US_PER_SECOND
    try:
        with platform.open() as open_platform:
            covered = open_platform.hours.covered(at_us)
    except UsageError as error:
        return dg.SkipReason(str(error))
    if not covered:
        return dg.SkipReason(f"nothing records into {hour_key(at_us)}")
    return dg.RunRequest(run_key=f"{context.scheduled_execution_time.isoformat()}", partition_key=hour_key(at_us))
