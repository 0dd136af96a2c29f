"""Partitions, by hours and days of `recorded_at` (UTC), and the jobs that sensors, schedules and people launch."""

from __future__ import annotations

from collections.abc import Iterable

import dagster as dg
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARTITION_NAME_TAG,
)

from render_platform.clock import DAY_US, HOUR_US, hour_of, iso, time_us

START = "2023-01-01"
HOURS = dg.HourlyPartitionsDefinition(start_date=f"{START}-00:00", end_offset=1)
DAYS = dg.DailyPartitionsDefinition(start_date=START)
MONTHS = dg.MonthlyPartitionsDefinition(start_date=START)
IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]
SEQUENCER = "sequencer"
"""The pool of everything that appends to the log: one step at a time."""
RANGE = 744
"""Partitions of one run, at most: a month of hours."""
BACKFILL = dg.BackfillPolicy.multi_run(max_partitions_per_run=RANGE)
RECONCILES_TAG = "render_platform/reconciles"
"""On runs of the job `reconcile`: the run queue starts one of them at a time, so that a flush always finds a place."""


def hour_key(hour_us: int) -> str:
    """`2023-11-16-18:00`, as Dagster names the hour."""
    return iso(hour_of(hour_us))[:16].replace("T", "-")


def hour_of_key(key: str) -> int:
    return time_us(f"{key[:10]}T{key[11:]}:00Z")


def tags_of(first_us: int, last_us: int) -> dict[str, str]:
    """The tags of a run over the hours from `first_us` through `last_us`."""
    return {ASSET_PARTITION_RANGE_START_TAG: hour_key(first_us), ASSET_PARTITION_RANGE_END_TAG: hour_key(last_us)}


def hours_of(run: dg.DagsterRun) -> range:
    """The hours that a run is over; empty where it is over none."""
    key = run.tags.get(PARTITION_NAME_TAG, "")
    first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG, key), run.tags.get(ASSET_PARTITION_RANGE_END_TAG, key)
    return range(hour_of_key(first), hour_of_key(last) + HOUR_US, HOUR_US) if first and last else range(0)


def ranges(hours_us: Iterable[int]) -> list[tuple[int, int]]:
    """Hours as ranges without holes, first and last hour, in order; each at most RANGE hours."""
    found: list[tuple[int, int]] = []
    for hour in sorted(hours_us):
        if found and found[-1][1] + HOUR_US == hour < found[-1][0] + RANGE * HOUR_US:
            found[-1] = (found[-1][0], hour)
        else:
            found.append((hour, hour))
    return found


def day_of_key(key: str) -> tuple[int, int]:
    """Begin and end of a day."""
    start = time_us(f"{key}T00:00:00Z")
    return start, start + DAY_US


FRESHNESS = dg.AssetSelection.checks(
    dg.AssetCheckKey(dg.AssetKey("audit_log"), "flush_freshness"),
    dg.AssetCheckKey(dg.AssetKey("inference_events"), "fast_path_freshness"),
    dg.AssetCheckKey(dg.AssetKey("reconciliation"), "reconciliation_freshness"),
)
"""Looked at by the clock, and not with each run of what they look at."""

flush = dg.define_asset_job(
    "flush",
    selection=dg.AssetSelection.assets("sealed_batches", "cas_batches", "audit_log") - FRESHNESS,
    executor_def=dg.in_process_executor,
    tags={"dagster/priority": "10"},
    description="Seal, store, log and publish everything in the outbox. Safe to launch at any time.",
)
reconcile = dg.define_asset_job(
    "reconcile",
    selection=dg.AssetSelection.assets("reconciliation") - FRESHNESS,
    run_tags={RECONCILES_TAG: "yes"},
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
daily = dg.define_asset_job(
    "daily",
    selection=dg.AssetSelection.assets("audit_verification", "daily_report")
    | dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey("inference_events"), "duplicates")),
    description="Verify days of evidence, report on them, and look for events that stand twice in ClickHouse.",
)
health = dg.define_asset_job(
    "health",
    selection=FRESHNESS,
    description="Check that flush, fast path and reconciliation are fresh. Changes nothing.",
)
capacity = dg.define_asset_job(
    "capacity",
    selection=dg.AssetSelection.assets("capacity_plan"),
    description="Plan how many GPUs are needed, from hours of the fast path.",
)
charges = dg.define_asset_job(
    "charges",
    selection=dg.AssetSelection.assets("usage_charges"),
    description="Rate closed days at the price book's prices, and log their charges.",
)
invoicing = dg.define_asset_job(
    "invoicing",
    selection=dg.AssetSelection.assets("invoices"),
    description="Log the invoices of months that are over, or the corrections of what changed since.",
)

JOBS = [flush, reconcile, repair, verify, daily, health, capacity, charges, invoicing]
