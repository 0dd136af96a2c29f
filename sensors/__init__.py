"""What launches runs: sensors on the outbox, schedules on the clock."""

from sensors.outbox import outbox_backlog
from sensors.schedules import reconciliation_every_five_minutes

SENSORS = [outbox_backlog]
SCHEDULES = [reconciliation_every_five_minutes]
