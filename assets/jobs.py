"""Partitions, by hours and days of `recorded_at` (UTC), and the jobs that sensors, schedules and people launch."""

from __future__ import annotations

import dagster as dg

from render_platform.clock import DAY_US, hour_of, iso, time_us

START = "2023-01-01"
HOURS = dg.HourlyPartitionsDefinition(start_date=f"{START}-00:00", end_offset=1)
DAYS = dg.DailyPartitionsDefinition(start_date=START)
IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]
SEQUENCER = "sequencer"
"""The pool of everything that appends to the log: one step at a time."""
BACKFILL = dg.BackfillPolicy.multi_run(max_partitions_per_run=744)


def hour_key(hour_us: int) -> str:
    """`2023-11-16-18:00`, as Dagster names the hour."""
    return iso(hour_of(hour_us))[:16].replace("T", "-")


def hour_of_key(key: str) -> int:
    return time_us(f"{key[:10]}T{key[11:]}:00Z")


def day_of_key(key: str) -> tuple[int, int]:
    """Begin and end of a day."""
    start = time_us(f"{key}T00:00:00Z")
    return start, start + DAY_US


flush = dg.define_asset_job(
    "flush",
    selection=dg.AssetSelection.assets("sealed_batches", "cas_batches", "audit_log"),
    executor_def=dg.in_process_executor,
    tags={"dagster/priority": "10"},
    description="Seal, store, log and publish everything in the outbox. Safe to launch at any time.",
)
reconcile = dg.define_asset_job(
    "reconcile",
    selection=dg.AssetSelection.assets("reconciliation"),
    description="Reconcile hours of the slow path with ClickHouse.",
)
repair = dg.define_asset_job(
    "repair",
    selection=dg.AssetSelection.assets("fast_path_repair"),
    description="Insert into ClickHouse what reconciliation found missing.",
)
verify = dg.define_asset_job(
    "verify",
    selection=dg.AssetSelection.assets("audit_verification"),
    description="Re-read days of evidence, row by row.",
)

JOBS = [flush, reconcile, repair, verify]
