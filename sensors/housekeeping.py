"""Keeps storage bounded: once a day, what is old goes.

Of SQL: live events that are published, and their jobs, after `outbox_retention_days`; see `Outbox.prune`. Of the log:
the partial tiles that full ones have superseded, after a day; see `tiles.prune_partials`.

Of Dagster's own storage: runs, reports and ticks after `dagster_retention_days`. Two exceptions stay for good, because
partition status, the last materialization and the last verdict of a check are read from them:

- a run that holds the newest event of a kind of an asset's partition, or the newest evaluation of a check, and the run
  that it is a retry of: but not the log of its steps, where that is a file of its own;
- of the materializations that were reported without a run (`gpu_jobs`), the newest.

What is deleted makes room in SQLite's files for what comes; the files themselves stay as large as they once were. They
are not written anew (VACUUM): that would hold up every run. No evidence is lost by any of it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import sqlalchemy as sa
from dagster._core.events import ASSET_EVENTS
from dagster._core.instance.utils import RUNLESS_RUN_ID
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.storage.dagster_run import FINISHED_STATUSES
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage

from render_platform.clock import SystemClock
from render_platform.tiles import prune_partials
from resources.platform import PlatformResource

MAX_RUNS = 10_000
"""Runs deleted by one run of the job, at most: two days of flushes. The next day goes on."""
SKIPPED_TICKS = timedelta(days=1)
"""A tick that found nothing to do says little, and there is one every few seconds."""
_PAGE = 500
_EVENTS, _CHECKS = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c


class Pruned(NamedTuple):
    """What was deleted: runs, step logs of runs that stay, and reports without a run."""

    runs: int
    logs: int
    reports: int


@dg.op(description="Deletes Dagster's runs, reports and ticks that are older than dagster_retention_days.")
def prune_event_log(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    now = datetime.now(UTC)
    before = now - timedelta(days=platform.settings().dagster_retention_days)
    pruned = prune(context.instance, before)
    prune_ticks(context.instance, before, now - SKIPPED_TICKS)
    context.add_output_metadata({"older than": before.isoformat(timespec="seconds"), **pruned._asdict()})


@dg.op(description="Deletes published events and their jobs from SQL that are older than outbox_retention_days.")
def prune_outbox(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    with platform.open() as open_platform:
        context.add_output_metadata({"events": open_platform.prune()})


@dg.op(description="Deletes the log's partial tiles a day after the full ones: those begin with them.")
def prune_partial_tiles(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    with platform.open() as open_platform:
        checkpoint = open_platform.log.published()
        if checkpoint is not None:
            done = prune_partials(open_platform.log_objects, checkpoint.size, SystemClock())  # stores have their own
            context.add_output_metadata(asdict(done))


@dg.job(
    executor_def=dg.in_process_executor,
    tags={"dagster/priority": "-10"},
    description="Delete what is old from SQL, the log's files and Dagster's storage. Safe to launch at any time.",
)
def housekeeping() -> None:
    prune_event_log()
    prune_outbox()
    prune_partial_tiles()


housekeeping_daily = dg.ScheduleDefinition(
    name="housekeeping_daily",
    job=housekeeping,
    cron_schedule="37 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Keeps storage bounded: deletes what is older than outbox_ and dagster_retention_days.",
)


def prune(instance: dg.DagsterInstance, before: datetime, at_most: int = MAX_RUNS) -> Pruned:
    """Delete finished runs and runless reports from before a time; see the module.

    A crash at any point: a run's row goes last, so that the next call finds the run again and deletes the rest.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):  # a service that keeps it has a retention of its own
        return Pruned(0, 0, 0)
    kept = _newest_runs(storage)
    old, staying = [], []
    for run in _finished(instance, before):  # the newest first: a retry comes before what it is a retry of
        if run.run_id in kept:
            kept.update({run.root_run_id} - {None})
            staying.append(run.run_id)
        else:
            old.append(run.run_id)
    doomed = old[-at_most:]
    for run_id in doomed:
        _delete_run(instance, storage, run_id)
    logs = sum(_remove_log(storage, run_id) for run_id in staying)
    return Pruned(len(doomed), logs, _delete_reports(storage, before))


def prune_ticks(instance: dg.DagsterInstance, before: datetime, skipped_before: datetime) -> None:
    """Delete the ticks of every sensor and schedule from before a time, and those that were skipped from another."""
    for state in instance.all_instigator_state():
        of = state.instigator_origin_id, state.selector_id
        instance.purge_ticks(*of, before=before.timestamp())
        instance.purge_ticks(*of, before=skipped_before.timestamp(), tick_statuses=[TickStatus.SKIPPED])


def _finished(instance: dg.DagsterInstance, before: datetime) -> Iterator[dg.DagsterRun]:
    """Runs that ended, and were not touched since, before a time; the newest first."""
    wanted = dg.RunsFilter(statuses=FINISHED_STATUSES, updated_before=before)
    cursor = None
    while page := instance.get_runs(wanted, cursor=cursor, limit=_PAGE):
        yield from page
        cursor = page[-1].run_id


def _newest_events() -> sa.Select[tuple[int]]:
    """The newest event of each kind, asset and partition: what is there, what was asked for, what was seen."""
    return (
        sa.select(sa.func.max(_EVENTS.id))
        .where(_EVENTS.asset_key.is_not(None), _EVENTS.dagster_event_type.in_([kind.value for kind in ASSET_EVENTS]))
        .group_by(_EVENTS.dagster_event_type, _EVENTS.asset_key, _EVENTS.partition)
    )


def _newest_runs(storage: SqlEventLogStorage) -> set[str | None]:
    """The runs that hold a newest event, or the newest evaluation of a check."""
    checks = sa.select(sa.func.max(_CHECKS.id)).group_by(_CHECKS.asset_key, _CHECKS.check_name, _CHECKS.partition)
    with storage.index_connection() as connection:
        of_events = sa.select(_EVENTS.run_id).where(_EVENTS.id.in_(_newest_events()))
        of_checks = sa.select(_CHECKS.run_id).where(_CHECKS.id.in_(checks))
        return {run_id for query in (of_events, of_checks) for run_id in connection.execute(query).scalars()}


def _delete_run(instance: dg.DagsterInstance, storage: SqlEventLogStorage, run_id: str) -> None:
    """`DagsterInstance.delete_run` leaves evaluations of checks, files of output, and a file of 170 KB a run."""
    with storage.index_connection() as connection:
        connection.execute(AssetCheckExecutionsTable.delete().where(_CHECKS.run_id == run_id))
        storage.delete_events_for_run(connection, run_id)
    storage.free_concurrency_slots_for_run(run_id)
    _remove_log(storage, run_id)
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    instance.run_storage.delete_run(run_id)


def _remove_log(storage: SqlEventLogStorage, run_id: str) -> bool:
    """Whether there was a file of the run's own. Without it the run's page shows no steps; assets read another file."""
    if not isinstance(storage, SqliteEventLogStorage):
        return False
    path = Path(storage.path_for_shard(run_id))
    found = path.exists()
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        file.unlink(missing_ok=True)
    return found


def _delete_reports(storage: SqlEventLogStorage, before: datetime) -> int:
    """Delete events that belong to no run, from before a time, but for the newest ones; gives how many."""
    naive = before.astimezone(UTC).replace(tzinfo=None)  # as Dagster keeps it
    old = sa.and_(_EVENTS.run_id == RUNLESS_RUN_ID, _EVENTS.timestamp < naive)
    with storage.index_connection() as connection:
        doomed = sa.select(_EVENTS.id).where(old, _EVENTS.id.not_in(_newest_events()))
        ids = list(connection.execute(doomed).scalars())
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            connection.execute(AssetEventTagsTable.delete().where(AssetEventTagsTable.c.event_id.in_(page)))
            connection.execute(SqlEventLogStorageTable.delete().where(_EVENTS.id.in_(page)))
    if ids and isinstance(storage, SqliteEventLogStorage):  # a copy of each stands in the file of the run that is none
        with storage.run_connection(RUNLESS_RUN_ID) as connection:
            connection.execute(SqlEventLogStorageTable.delete().where(old))
    return len(ids)
