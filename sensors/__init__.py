"""What launches runs and fills in reports: sensors on the outbox, schedules on the clock."""

from sensors.alerts import checks, discrepancies, failures
from sensors.charges import budgets, charges_daily, invoices_monthly
from sensors.health import daily_at_twenty_past_midnight, health_every_five_minutes
from sensors.housekeeping import housekeeping_daily
from sensors.operations import capacity_hourly
from sensors.outbox import outbox_backlog
from sensors.reports import gpu_jobs_backstop
from sensors.schedules import reconciliation_every_five_minutes

SENSORS = [outbox_backlog, gpu_jobs_backstop, discrepancies, failures, checks, budgets]
SCHEDULES = [
    reconciliation_every_five_minutes,
    health_every_five_minutes,
    daily_at_twenty_past_midnight,
    housekeeping_daily,
    capacity_hourly,
    charges_daily,
    invoices_monthly,
]
