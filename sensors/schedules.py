"""Schedules: the current hour is reconciled every five minutes, and every closed hour once.

An hour that closed while nobody looked, or was re-opened by a late batch, or could not be read, is due until it is
reported. Due hours are asked for in runs over ranges, those first that failed least, then the newest. An hour that a
run is at is left to it, and one that failed three times within an hour waits until that is over: what cannot be read
never holds up what can. A discrepant hour has its report, and is not due.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import dagster as dg

from assets.jobs import IN_PROGRESS, START, hour_key, hour_of_key, hours_of, ranges, reconcile, tags_of
from render_platform.clock import US_PER_SECOND, hour_of
from render_platform.errors import UsageError
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

MAX_RUNS = 12
"""Runs over due hours that one tick asks for; the next tick asks for more."""
MAX_FAILURES = 3
MEMORY = timedelta(hours=1)
"""How long a failed run counts against its hours, and how long one that says nothing is believed to be at work."""
_LOOKED_AT = 500


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
    current = hour_of(int(at.timestamp()) * US_PER_SECOND)
    try:
        with platform.open() as open_platform:
            due = _due(open_platform)
            covered = open_platform.hours.covered(current)
    except UsageError as error:
        return dg.SkipReason(str(error))
    working, failures = _recent(context.instance)
    wanted = [hour for hour in due if hour not in working and hour != current and failures[hour] < MAX_FAILURES]
    asked = _in_turn(wanted, failures)[:MAX_RUNS]
    if covered and current not in working:
        asked.append((current, current))
    if not asked:
        return dg.SkipReason(_nothing(current, covered, due))
    return [_request(context.scheduled_execution_time, *one) for one in asked]


def _due(platform: Platform) -> list[int]:
    """Due hours, but for those that ClickHouse no longer keeps, which nobody can ever report, and those that are no
    partition: one of these would fail the whole tick."""
    oldest = max(platform.reconciler.kept_from(), hour_of_key(f"{START}-00:00"))
    return [hour for hour in platform.hours.due() if oldest <= hour <= hour_of(platform.clock.now_us())]


def _recent(instance: dg.DagsterInstance) -> tuple[set[int], Counter[int]]:
    """Hours that a run of the last hour is at, or is to be at; and how many such runs failed, by hour."""
    since = datetime.now(UTC) - MEMORY
    working: set[int] = set()
    failures: Counter[int] = Counter()
    statuses = [*IN_PROGRESS, dg.DagsterRunStatus.FAILURE]
    found = dg.RunsFilter(job_name=reconcile.name, statuses=statuses, updated_after=since)
    for run in instance.get_runs(found, limit=_LOOKED_AT):
        (failures if run.status == dg.DagsterRunStatus.FAILURE else working).update(hours_of(run))
    return working, failures


def _in_turn(hours_us: list[int], failures: Counter[int]) -> list[tuple[int, int]]:
    """Ranges of hours that failed equally often: the fewest failures first, then the newest."""
    counts = sorted({failures[hour] for hour in hours_us})
    return [one for n in counts for one in reversed(ranges(hour for hour in hours_us if failures[hour] == n))]


def _request(at: datetime, first_us: int, last_us: int) -> dg.RunRequest:
    """The key is the tick's own: after a run that failed, the next tick asks again."""
    key = f"{at.isoformat()}/{hour_key(first_us)}"
    if first_us == last_us:
        return dg.RunRequest(run_key=key, partition_key=hour_key(first_us))
    return dg.RunRequest(run_key=key, tags=tags_of(first_us, last_us))


def _nothing(current: int, covered: bool, due: list[int]) -> str:
    here = f"a run is at {hour_key(current)}" if covered else f"nothing records into {hour_key(current)}"
    if due:
        return f"{here}, and {len(due)} due hours are in runs already, or failed {MAX_FAILURES} times within an hour"
    return f"{here}, and every closed hour is reported"
