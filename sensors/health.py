"""Schedules of what is looked at all the time: the checks of freshness, and the day that is over."""

from datetime import timedelta

import dagster as dg

from assets.jobs import daily, day_of_key, health
from render_platform.errors import UsageError
from resources.platform import PlatformResource


@dg.schedule(
    job=health,
    cron_schedule="3-58/5 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Checks every five minutes that flush, fast path and reconciliation are fresh.",
)
def health_every_five_minutes(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> dg.RunRequest | dg.SkipReason:
    try:
        with platform.open():
            return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat())
    except UsageError as error:
        return dg.SkipReason(str(error))


@dg.schedule(
    job=daily,
    cron_schedule="20 0 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Verifies the evidence of the day that is over, row by row, reports on it, and looks for duplicates.",
)
def daily_at_twenty_past_midnight(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> dg.RunRequest | dg.SkipReason:
    """By then the day's last hour is closed and reported."""
    day = f"{context.scheduled_execution_time - timedelta(days=1):%Y-%m-%d}"
    try:
        with platform.open() as open_platform:
            if not open_platform.hours.known(*day_of_key(day)):
                return dg.SkipReason(f"nothing is recorded of {day}")
    except UsageError as error:
        return dg.SkipReason(str(error))
    return dg.RunRequest(run_key=context.scheduled_execution_time.isoformat(), partition_key=day)
