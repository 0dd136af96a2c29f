"""What launches runs and fills in reports: sensors on the outbox, schedules on the clock."""

from sensors.outbox import outbox_backlog
from sensors.reports import gpu_jobs_backstop
from sensors.schedules import reconciliation_every_five_minutes

SENSORS = [outbox_backlog, gpu_jobs_backstop]
SCHEDULES = [reconciliation_every_five_minutes]
