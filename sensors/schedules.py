"""Schedules: the current hour is reconciled every five minutes; at the full hour, the one that just ended."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

from assets.jobs import hour_key, reconcile
from render_platform.clock import US_PER_SECOND, hour_of
from render_platform.errors import UsageError
from resources.platform import PlatformResource

MAX_HOURS = 12
"""Hours that one tick asks for; the next tick asks for the rest."""


@dg.schedule(
    job=reconcile,
    cron_schedule="*/5 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Reconciles the hour of the scheduled time less a second, and closed hours without a current report.",
)
def reconciliation_every_five_minutes(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> list[dg.RunRequest] | dg.SkipReason:
    at = context.scheduled_execution_time - timedelta(seconds=1)
    at_us = int(at.timestamp()) * US_PER_SECOND
    try:
        with platform.open() as open_platform:
            hours = open_platform.hours.due()[:MAX_HOURS]
            if open_platform.hours.covered(at_us) and hour_of(at_us) not in hours:
                hours.append(hour_of(at_us))
    except UsageError as error:
        return dg.SkipReason(str(error))
    if not hours:
        return dg.SkipReason(f"nothing records into {hour_key(at_us)}, and every closed hour is reported")
    return [
        dg.RunRequest(
            run_key=f"{context.scheduled_execution_time.isoformat()}/{hour_key(hour)}", partition_key=hour_key(hour)
        )
        for hour in hours
    ]
