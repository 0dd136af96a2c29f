"""Charges by the clock, and budgets: closed days are charged, finished months invoiced, spent budgets told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
)

from assets.jobs import IN_PROGRESS, START, charges, day_of_key, invoicing
from render_platform.charges.chain import DAY, INVOICE, TYPES, month_bounds, month_of
from render_platform.charges.charging import Charging
from render_platform.charges.commands import spending_of
from render_platform.charges.spend import Budgets, Spend, book_of
from render_platform.clock import DAY_US, iso
from render_platform.config import Settings
from render_platform.database import Database, log_entries
from render_platform.errors import UsageError
from render_platform.operations.alerts import Alert, link, open_alerts
from resources.platform import PlatformResource

MAX_RUNS = 4
"""Runs over due days that one tick asks for; the next tick asks for more."""
RANGE_DAYS = 92
MAX_FAILURES = 3
MEMORY = timedelta(hours=6)
"""How long a failed run counts against its days, and how long one that says nothing is believed to be at work."""
WARN_AT = Decimal("0.8")
_LOOKED_AT = 500


@dg.schedule(
    job=charges,
    cron_schedule="40 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Charges closed days that are not charged, or whose events have grown since.",
)
def charges_daily(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> list[dg.RunRequest] | dg.SkipReason:
    """A day that a run is at is left to it; one that failed three times within six hours waits until they are over."""
    try:
        with platform.open() as open_platform:
            due = Charging(open_platform, book_of(open_platform.settings)).due()
            now_us = open_platform.clock.now_us()
    except UsageError as error:
        return dg.SkipReason(str(error))
    working, failures = _recent(context.instance, charges.name)
    days = [day for day in due if day_of_key(START)[0] <= day <= now_us - DAY_US]
    wanted = [day for day in days if _key(day) not in working and failures[_key(day)] < MAX_FAILURES]
    if not wanted:
        return dg.SkipReason(
            f"{len(days)} due days are in runs already, or failed {MAX_FAILURES} times within six hours"
            if days
            else "every closed day is charged"
        )
    at = context.scheduled_execution_time.isoformat()
    return [_request(at, *one) for one in _ranges(wanted, failures)[:MAX_RUNS]]


@dg.schedule(
    job=invoicing,
    cron_schedule="10 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Invoices months that are over and charged, and bills what their corrections changed since.",
)
def invoices_monthly(
    context: dg.ScheduleEvaluationContext, platform: PlatformResource
) -> list[dg.RunRequest] | dg.SkipReason:
    """Looks each day: a month is due when all its days are charged, which may be late. A failed run is asked again."""
    try:
        with platform.open() as open_platform:
            now_us = open_platform.clock.now_us()
            charging = Charging(open_platform, book_of(open_platform.settings))
            waiting = {month_of(day) for day in charging.due()}
            months = [month for month in _not_invoiced(open_platform.database) if charging.owes(month)]
    except UsageError as error:
        return dg.SkipReason(str(error))
    working, _ = _recent(context.instance, invoicing.name)
    over = [month for month in months if month_bounds(month)[1] <= now_us and month >= START[:7]]
    ready = [month for month in over if month not in waiting and f"{month}-01" not in working]
    if not ready:
        held = [month for month in over if month in waiting]
        return dg.SkipReason(f"{held[0]} has days to charge first" if held else "every finished month is invoiced")
    at = context.scheduled_execution_time.isoformat()
    return [dg.RunRequest(run_key=f"{at}/{month}", partition_key=f"{month}-01") for month in ready[:MAX_RUNS]]


def _not_invoiced(database: Database) -> list[str]:
    """Months, in order, that hold a day's record after their last invoice."""
    columns = log_entries.c.hour_us, log_entries.c.batch_id
    query = sa.select(*columns).where(log_entries.c.type.in_(TYPES)).order_by(log_entries.c.log_index)
    open_months: set[str] = set()
    with database.read() as connection:
        for hour_us, name in connection.execute(query):
            if name.startswith(DAY):
                open_months.add(month_of(hour_us))
            elif name.startswith(INVOICE):
                open_months.discard(month_of(hour_us))
    return sorted(open_months)


def _key(day_us: int) -> str:
    return iso(day_us)[:10]


def _recent(instance: dg.DagsterInstance, job: str) -> tuple[set[str], Counter[str]]:
    """Partitions that a recent run is at, or is to be at; and how many such runs failed, by partition."""
    working: set[str] = set()
    failures: Counter[str] = Counter()
    statuses = [*IN_PROGRESS, dg.DagsterRunStatus.FAILURE]
    found = dg.RunsFilter(job_name=job, statuses=statuses, updated_after=datetime.now(UTC) - MEMORY)
    for run in instance.get_runs(found, limit=_LOOKED_AT):
        (failures if run.status == dg.DagsterRunStatus.FAILURE else working).update(_partitions(run))
    return working, failures


def _partitions(run: dg.DagsterRun) -> Iterable[str]:
    if name := run.tags.get(PARTITION_NAME_TAG):
        return [name]
    first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG), run.tags.get(ASSET_PARTITION_RANGE_END_TAG)
    return map(_key, range(day_of_key(first)[0], day_of_key(last)[1], DAY_US)) if first and last else []


def _ranges(days: Iterable[int], failures: Counter[str]) -> list[tuple[int, int]]:
    """First and last day of ranges without holes that failed equally often; the fewest failures first, then in order:
    a month's records follow its days."""
    found: dict[int, list[tuple[int, int]]] = {}
    for day in sorted(days):
        of_count = found.setdefault(failures[_key(day)], [])
        if of_count and of_count[-1][1] + DAY_US == day < of_count[-1][0] + RANGE_DAYS * DAY_US:
            of_count[-1] = (of_count[-1][0], day)
        else:
            of_count.append((day, day))
    return [one for count in sorted(found) for one in found[count]]


def _request(at: str, first_us: int, last_us: int) -> dg.RunRequest:
    """The key is the tick's own: after a run that failed, the next tick asks again."""
    first, last = _key(first_us), _key(last_us)
    if first == last:
        return dg.RunRequest(run_key=f"{at}/{first}", partition_key=first)
    tags = {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}
    return dg.RunRequest(run_key=f"{at}/{first}", tags=tags)


@dg.sensor(
    minimum_interval_seconds=300,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Alerts where a customer has spent 80 % of this month's budget, and again at all of it; and where a budget is "
        "in another currency than the charges."
    ),
)
def budgets(platform: PlatformResource) -> dg.SkipReason:
    """What is not known of spend is not held against a budget: what is charged may pass it all the same."""
    try:
        with platform.open() as open_platform:
            settings, now_us = open_platform.settings, open_platform.clock.now_us()
            limits = Budgets(open_platform.database, open_platform.clock).all()
            if not limits:
                return dg.SkipReason("nobody has a budget: `render-platform budget set`")
            book = book_of(settings)
            found = spending_of(open_platform, book).all(iso(now_us)[:7], limits).values()
        with open_alerts(settings) as alerts:
            alerts.notify(*(_alert(settings, one, now_us) for one in found if one.budget))
    except UsageError as error:
        return dg.SkipReason(str(error))
    over = [one for one in found if one.share is not None and one.share >= WARN_AT]
    unknown, other = sum(one.estimated is None for one in found), sum(bool(one.not_compared) for one in found)
    said = f"{len(over)} of {len(limits)} budgets are spent to 80 % or more"
    said += f"; {other} are in another currency than the charges, and not compared" if other else ""
    return dg.SkipReason(f"{said}; of {unknown} customers only what is charged is known" if unknown else said)


def _alert(settings: Settings, one: Spend, now_us: int) -> Alert:
    """Of a budget that has room, that all is well: said only where something else was said before."""
    key, where = f"budget/{one.customer_ref}/{one.month}", link(settings, "assets/usage_charges")
    if one.not_compared:
        text = (
            f"Customer {one.customer_ref}: {one.not_compared}. However much is spent in {one.month}, nobody is told, "
            "and no job is refused. `render-platform budget set` sets it anew, in the price book's currency."
        )
        title = f"a budget is not compared: customer {one.customer_ref[:12]}"
        return Alert(key, "warning", title, text, where, now_us)
    share = one.share or Decimal(0)
    severity = "error" if share >= 1 else "warning" if share >= WARN_AT else "resolved"
    amount = "" if one.budget is None else f"{one.budget.amount:f} {one.budget.currency}"
    estimated = sum((sku.amount for sku in one.estimated or ()), Decimal(0))
    text = (
        f"Customer {one.customer_ref} has spent {one.spent:f} {one.currency} in {one.month}, of which {estimated:f} "
        f"are an estimate: {share * 100:.1f} % of {amount}. See `render-platform usage --ref {one.customer_ref}`; "
        "raise it with `render-platform budget set`."
    )
    title = f"{share * 100:.0f} % of a budget is spent: customer {one.customer_ref[:12]}"
    return Alert(key, severity, title, text, where, now_us)
