"""What is wrong is told: discrepant hours, runs that failed, checks that failed. See render_platform.operations.alerts.

An alert that is recorded is sent in the end; a tick that could not record one keeps its cursor and comes again. What a
channel did not take fails the tick, unless the tick has something to hand over: then a later one says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from urllib.parse import quote

import dagster as dg
from dagster._core.storage.asset_check_execution_record import COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES

from assets import ASSETS, CHECKS
from assets.jobs import IN_PROGRESS, START, hour_key, hour_of_key, hours_of, repair
from render_platform.clock import US_PER_SECOND, SystemClock, time_us
from render_platform.config import Settings
from render_platform.errors import Unavailable, UsageError
from render_platform.operations.alert_channels import Alert, open_channels
from render_platform.operations.alerts import Alerts, Undelivered, link, open_alerts, send_unrecorded
from render_platform.pipeline import Platform
from resources.platform import PlatformResource

PATIENCE_S = 1_800
"""How long an hour may be unreported or out of date, as seen here: the schedule comes every five minutes."""
MAX_FOLLOWED = 1_000
"""Hours whose time without a report is kept in the cursor; more are one trouble anyway."""
MAX_NAMED = 10
MAX_ERROR = 500
MAX_REPAIRS = 12
"""Repairs that may be in progress; the next tick asks for more."""
MAX_LOOKED_AT = 200
"""Discrepant hours that are looked at for a repair, the newest first."""
RETRY_AFTER = (timedelta(minutes=5), timedelta(hours=1), timedelta(days=1))
"""The wait after each failed repair of one report; after one more it is left to a person. The last is long enough for
what needs its day rebuilt, which is refused until the day is over."""
STUCK_AFTER = timedelta(hours=1)
"""A run that has said nothing for so long is not believed to be at work."""
REPAIRS_TAG = "render_platform/repairs"
"""On runs that are asked for here: the hour and the revision of its report."""
MAX_EVALUATIONS = 20
"""Evaluations of one check that a tick looks at, the newest."""
NO_CHANNEL = "no alert channel is configured: docs/alerts.md says how"

_MODULE = re.compile(r"^(?:\w+\.)+(\w+): ")
_VARYING = re.compile(r"[\w-]*\d[\w-]*")
"""Words of an error that differ from time to time: hours, counts, ids."""


class Unreported(NamedTuple):
    """An hour without a current report, and since when that is seen here."""

    name: str
    status: str
    since_us: int


@dg.sensor(
    job=repair,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Alerts where hours are discrepant, or have had no current report for half an hour. Where repair_automatically "
        "is 1, it launches a repair of each discrepant report as well."
    ),
)
def discrepancies(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult | dg.SkipReason:
    try:
        with platform.open() as open_platform:
            settings, clock = open_platform.settings, open_platform.clock
            bad = open_platform.hours.unreconciled(open_platform.reconciler.kept_from())
            unreported = follow(bad, context.cursor, clock.now_us())
            cursor = json.dumps({one.name: one.since_us for one in unreported})
            requests = _repairs(open_platform, context.instance, bad) if settings.repair_automatically else []
            found = [*_of_discrepant(settings, bad, clock.now_us()), _of_late(settings, unreported, clock.now_us())]
            alerts = Alerts(open_platform.database, open_channels(settings), clock, settings.alert_repeat_s)
            _tell(context, alerts, [found], bool(requests) or cursor != (context.cursor or "{}"))
    except UsageError as error:
        return dg.SkipReason(str(error))
    said = "; ".join(alert.title for alert in found) or "what was discrepant is being reconciled again"
    said += "" if open_channels(settings) else f"; {NO_CHANNEL}"
    return dg.SensorResult(run_requests=requests, cursor=cursor, skip_reason=None if requests else dg.SkipReason(said))


@dg.run_failure_sensor(
    minimum_interval_seconds=10,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Alerts where a run of this code location failed: once for a job and an error, with a link to the run.",
)
def failures(context: dg.RunFailureSensorContext, platform: PlatformResource) -> dg.SkipReason | None:
    """Dagster never comes back to a failure, whatever is raised here: what cannot be recorded is sent at once."""
    try:
        settings = platform.settings()
    except UsageError as error:
        return dg.SkipReason(str(error))
    if not open_channels(settings):
        return dg.SkipReason(NO_CHANNEL)
    alert = _of_failure(settings, context.dagster_run, _error_of(context))
    try:
        with open_alerts(settings) as alerts:
            alerts.notify(alert)
    except Undelivered:
        raise
    except (Unavailable, UsageError):
        send_unrecorded(settings, alert)
        raise
    return None


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Alerts where an asset check failed as an error, and again when it passes.",
)
def checks(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult | dg.SkipReason:
    """The cursor holds the time of the last evaluation that was seen of each check, in µs."""
    try:
        settings = platform.settings()
        if not open_channels(settings):
            return dg.SkipReason(NO_CHANNEL)
        seen = _read_cursor(context.cursor)
        failed, passed = [], []
        for spec in _check_specs():
            name = f"{spec.asset_key.to_user_string()}/{spec.name}"
            new = [one for one in _evaluations(context.instance, spec.key) if one.at_us > seen.get(name, 0)]
            new = new if name in seen else new[:1]  # what was before the first tick is history
            error = next((one for one in new if one.is_error), None)
            failed += [_of_check(settings, spec, error)] if error else []
            passed += [_of_check(settings, spec, new[0])] if new and new[0].found.passed else []
            seen |= {name: new[0].at_us} if new else {}
        cursor = json.dumps(seen)
        with open_alerts(settings) as alerts:  # first what failed, even where it has passed since
            _tell(context, alerts, [failed, passed], cursor != (context.cursor or "{}"))
    except UsageError as error:
        return dg.SkipReason(str(error))
    said = f"{len(failed)} checks failed and {len(passed)} passed since the last look"
    return dg.SensorResult(cursor=cursor, skip_reason=dg.SkipReason(said))


def _tell(
    context: dg.SensorEvaluationContext, alerts: Alerts, groups: Sequence[Sequence[Alert]], handed_over: bool
) -> None:
    """Each group recorded and sent before the next. Undelivered only where the tick has nothing to hand over: an error
    would lose its cursor and its requests."""
    undelivered: Undelivered | None = None
    for group in groups:
        try:
            alerts.notify(*group)
        except Undelivered as error:
            undelivered = error
    if undelivered and not handed_over:
        raise undelivered
    if undelivered:
        context.log.error(str(undelivered))


# Hours.


def follow(bad: Iterable[tuple[str, str]], cursor: str | None, now_us: int) -> list[Unreported]:
    """The hours without a current report, the longest so first, with the time that the cursor has of them, or now."""
    since = _read_cursor(cursor)
    found = [Unreported(name, status, since.get(name, now_us)) for name, status in bad if status != "discrepant"]
    return sorted(found, key=lambda one: one.since_us)[:MAX_FOLLOWED]


def _of_discrepant(settings: Settings, bad: Sequence[tuple[str, str]], now_us: int) -> list[Alert]:
    """None where it is not known: an hour whose report is out of date may be discrepant still."""
    key, names = "reconciliation/discrepant", [name for name, status in bad if status == "discrepant"]
    if not names:
        unknown = any(status == "out of date" for _, status in bad)
        said = "Each report says that ClickHouse holds what was billed."
        path = "assets/reconciliation"
        return [] if unknown else [Alert(key, "resolved", "no hour is discrepant", said, link(settings, path), now_us)]
    doing = "Materialize fast_path_repair for these hours, or run `render-platform repair`."
    if settings.repair_automatically:
        doing = "A repair is launched by itself; where this stays, see why the job `repair` fails."
    text = (
        f"ClickHouse does not hold what was billed: {_named(names)}. Bills are not affected. What differs stands in "
        f"the metadata of `reconciliation`, and in `render-platform repair --plan`. {doing}"
    )
    partition = quote(hour_key(time_us(names[0])))
    path = f"assets/fast_path_repair?view=partitions&partition={partition}"
    return [Alert(key, "error", f"{_count(names)} discrepant", text, link(settings, path), now_us)]


def _of_late(settings: Settings, unreported: Iterable[Unreported], now_us: int) -> Alert:
    late = [one for one in unreported if now_us - one.since_us >= PATIENCE_S * US_PER_SECOND]
    key, target = "reconciliation/late", link(settings, "assets/reconciliation?view=partitions")
    if not late:
        said = "Every closed hour is reported, or has not waited for long."
        return Alert(key, "resolved", "no hour has waited long for its report", said, target, now_us)
    names = _named([f"{one.name} is {one.status}" for one in late])
    text = (
        f"Not known to be well for {PATIENCE_S // 60} minutes: {names}. See why runs of the job `reconcile` fail, "
        "which is mostly ClickHouse that cannot be read, and that the schedule reconciliation_every_five_minutes is on."
    )
    title = f"{_count(late)} without a current report"
    return Alert(key, "warning", title, text, target, now_us)


def _count(hours: Sequence[object]) -> str:
    return "1 hour is" if len(hours) == 1 else f"{len(hours):,} hours are"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _repairs(platform: Platform, instance: dg.DagsterInstance, bad: Sequence[tuple[str, str]]) -> list[dg.RunRequest]:
    """A run for each discrepant report, the newest hours first, unless one is at it, has succeeded, or failed too often
    or a moment ago. The key counts what was asked before: a key that was used is never launched again."""
    oldest, now = hour_of_key(f"{START}-00:00"), datetime.now(UTC)
    hours = [time_us(name) for name, status in reversed(bad) if status == "discrepant"]
    hours = [hour for hour in hours if oldest <= hour <= platform.clock.now_us()][:MAX_LOOKED_AT]
    revisions = {hour: last.revision for hour in hours if (last := platform.hours.last_report(hour))}
    wanted = {f"{hour_key(hour)}/r{revision}": hour for hour, revision in revisions.items()}
    if not wanted:
        return []
    recent = dg.RunsFilter(job_name=repair.name, statuses=IN_PROGRESS, updated_after=now - STUCK_AFTER)
    working = instance.get_runs(recent, limit=MAX_LOOKED_AT)
    at_work = {hour for run in working for hour in hours_of(run)}
    asked: dict[str, list[dg.RunRecord]] = {tag: [] for tag in wanted}
    mine = dg.RunsFilter(job_name=repair.name, tags={REPAIRS_TAG: list(wanted)})
    for record in instance.get_run_records(mine, limit=MAX_LOOKED_AT * (len(RETRY_AFTER) + 1)):
        asked[record.dagster_run.tags[REPAIRS_TAG]].append(record)
    requests = [
        dg.RunRequest(f"{tag}/{len(asked[tag])}", partition_key=hour_key(hour), tags={REPAIRS_TAG: tag})
        for tag, hour in wanted.items()
        if hour not in at_work and _may_run(asked[tag], now)
    ]
    return requests[: max(0, MAX_REPAIRS - len(working))]


def _may_run(asked: Sequence[dg.RunRecord], now: datetime) -> bool:
    """`asked` holds the repairs of one report so far, the newest first; none of them is at work."""
    if not asked:
        return True
    if len(asked) > len(RETRY_AFTER) or any(one.dagster_run.is_success for one in asked):
        return False
    at = asked[0].update_timestamp
    return (at if at.tzinfo else at.replace(tzinfo=UTC)) + RETRY_AFTER[len(asked) - 1] <= now


# Runs.


def _error_of(context: dg.RunFailureSensorContext) -> str:
    """What the first step that failed raised, or why the run ended where none did; without a traceback."""
    for event in context.get_step_failure_events():
        if error := event.step_failure_data.error:
            return (error.cause or error).message
    return context.failure_event.message or "the run ended without saying why"


def _of_failure(settings: Settings, run: dg.DagsterRun, error: str) -> Alert:
    error = _MODULE.sub(r"\1: ", error.strip())
    error = error if len(error) <= MAX_ERROR else error[: MAX_ERROR - 1] + "…"
    return Alert(
        key=f"run/{run.job_name}/{_VARYING.sub('#', error)[:200]}",
        severity="error",
        title=f"a run of {run.job_name} failed",
        text=f"{error}\nThe run's page has the log; once the cause is gone, re-execute it there. Everything may be run "
        "again: nothing is billed twice.",
        link=link(settings, f"runs/{run.run_id}"),
        at_us=SystemClock().now_us(),
    )


# Checks.


class Evaluation(NamedTuple):
    at_us: int
    run_id: str
    found: dg.AssetCheckEvaluation

    @property
    def is_error(self) -> bool:
        return not self.found.passed and self.found.severity == dg.AssetCheckSeverity.ERROR


def _check_specs() -> Iterator[dg.AssetCheckSpec]:
    for one in (*ASSETS, *CHECKS):
        if isinstance(one, dg.AssetsDefinition):
            yield from one.check_specs


def _evaluations(instance: dg.DagsterInstance, key: dg.AssetCheckKey) -> list[Evaluation]:
    """The newest first."""
    records = instance.event_log_storage.get_asset_check_execution_history(
        key, MAX_EVALUATIONS, status=COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES
    )
    found = []
    for record in records:
        event = record.event and record.event.dagster_event
        if record.event and event and isinstance(event.event_specific_data, dg.AssetCheckEvaluation):
            at_us = int(record.event.timestamp * US_PER_SECOND)
            found.append(Evaluation(at_us, record.run_id, event.event_specific_data))
    return sorted(found, key=lambda one: -one.at_us)


def _of_check(settings: Settings, spec: dg.AssetCheckSpec, one: Evaluation) -> Alert:
    asset = spec.asset_key.to_user_string()
    name = f"{asset}/{spec.name}"
    said = f"{one.found.description or 'The check gives no reason.'}\n{spec.description or ''}".strip()
    page = f"runs/{one.run_id}" if one.run_id else f"assets/{asset}?view=checks&checkDetail={quote(spec.name)}"
    if one.found.passed:
        return Alert(f"check/{name}", "resolved", f"the check {name} passes", said, link(settings, page), one.at_us)
    return Alert(f"check/{name}", "error", f"the check {name} failed", said, link(settings, page), one.at_us)


def _read_cursor(text: str | None) -> dict[str, int]:
    """Times by name; a cursor that is none begins anew."""
    try:
        return {str(name): int(us) for name, us in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}
