"""Housekeeping: what is old goes, files and all; what partitions, assets and checks are judged by stays as it was."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import StepMaterializationData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID

from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND, SystemClock
from render_platform.config import load_settings
from render_platform.errors import UsageError
from sensors.housekeeping import Pruned, prune
from tests.factories import START_US, make_event
from tests.homes import age_runs
from tests.platforms import LIVE, record
from tests.postgres import sqlite_only
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    Location,
    location,  # noqa: F401  fixtures
    sound_events,
)
from tests.test_reports_sensor import report, tick

LATER = timedelta(days=40)
"""After the retention of whatever happens now."""
ASSETS = [asset.key for asset in defs.resolve_asset_graph().asset_nodes]
CHECKS = list(defs.resolve_asset_graph().asset_check_keys)


def everything_is_old() -> datetime:
    return datetime.now(UTC) + LATER


def make_history(location: Location, rng: random.Random) -> None:
    """Six runs: two flushes, two hours reconciled twice together and one of them once alone, and a day verified."""
    record(location.platform, LANE, sound_events(rng, 3))
    location.dagster.flush()
    location.finish_lane(2)
    location.dagster.flush()
    for _ in range(2):
        location.dagster.reconcile([START_US, START_US + HOUR_US])
    location.dagster.reconcile([START_US])
    assert location.run("verify", partition="2023-11-16").success


def status(location: Location) -> dict[str, Any]:
    """What people and sensors read of assets, partitions and checks."""
    found: dict[str, Any] = {}
    storage = location.instance.event_log_storage
    for key in ASSETS:
        event = location.instance.get_latest_materialization_event(key)
        latest = None if event is None else (event.run_id, event.timestamp, event.asset_materialization)
        partitions = sorted(location.instance.get_materialized_partitions(key))
        planned = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
        asked = storage.get_latest_storage_id_by_partition(key, planned)
        found[key.to_user_string()] = latest, partitions, dict(asked)
    for check in CHECKS:
        history = storage.get_asset_check_execution_history(check, limit=1)
        found[str(check)] = [(one.run_id, one.status) for one in history]
    return found


def files_of(location: Location, run_id: str) -> list[Path]:
    return [path for path in (location.state / "dagster").rglob(f"*{run_id}*") if path.exists()]


def test_what_is_judged_by_stays_and_the_rest_goes(location: Location, rng: random.Random) -> None:
    make_history(location, rng)
    before, runs = status(location), {run.run_id for run in location.instance.get_runs()}
    pruned = prune(location.instance, everything_is_old())
    left = {run.run_id for run in location.instance.get_runs()}
    assert status(location) == before
    assert pruned.runs == len(runs - left) == 2, "the first flush, and the hours that were all reconciled again since"
    for run_id in runs - left:
        assert files_of(location, run_id) == []
    assert prune(location.instance, everything_is_old()) == Pruned(0, 0, 0), "and nothing is left to do"


def test_what_is_young_stays_whole(location: Location, rng: random.Random) -> None:
    make_history(location, rng)
    before = status(location), sorted(path.name for path in (location.state / "dagster").rglob("*"))
    assert prune(location.instance, datetime.now(UTC) - timedelta(days=30)) == Pruned(0, 0, 0)
    assert (status(location), sorted(path.name for path in (location.state / "dagster").rglob("*"))) == before


def test_runs_in_progress_stay_however_old(location: Location) -> None:
    job = defs.resolve_job_def("flush")
    left = [
        location.instance.create_run_for_job(job, status=one)
        for one in (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED)
    ]
    assert prune(location.instance, everything_is_old()).runs == 0
    assert {run.run_id for run in location.instance.get_runs()} == {run.run_id for run in left}


def test_a_failed_hour_stays_failed(location: Location, rng: random.Random) -> None:
    """The newest that was asked for stays beside the newest that was made: the partition is shown as failed."""
    record(location.platform, LANE, sound_events(rng, 3))
    location.finish_lane(1)
    location.dagster.flush()
    location.dagster.reconcile([START_US])
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    failed = [location.run("reconcile", "2023-11-16-18:00").run_id for _ in range(2)]
    before = status(location)
    assert prune(location.instance, everything_is_old()).runs == 1
    assert status(location) == before
    left = {run.run_id: run.status for run in location.instance.get_runs()}
    assert (failed[0] in left, left.get(failed[1])) == (False, dg.DagsterRunStatus.FAILURE)


def test_the_run_that_a_kept_one_is_a_retry_of_stays(location: Location) -> None:
    """Without it the page of the retry is an error."""
    job, started = defs.resolve_job_def("flush"), dg.DagsterRunStatus.STARTED
    root = location.instance.create_run_for_job(job, status=started)
    retry = location.instance.create_run_for_job(
        job, status=started, parent_run_id=root.run_id, root_run_id=root.run_id
    )
    made = StepMaterializationData(dg.AssetMaterialization("audit_log"))
    event = dg.DagsterEvent("ASSET_MATERIALIZATION", "flush", event_specific_data=made)
    location.instance.report_dagster_event(event, retry.run_id)
    for run in (root, retry):
        location.instance.report_run_failed(run)
    assert prune(location.instance, everything_is_old()).runs == 0
    assert location.instance.get_run_group(retry.run_id) is not None
    assert {run.run_id for run in location.instance.get_runs()} == {root.run_id, retry.run_id}


def test_one_call_deletes_a_bounded_number_the_oldest_first(location: Location, rng: random.Random) -> None:
    make_history(location, rng)
    runs = [run.run_id for run in location.instance.get_runs()]
    assert prune(location.instance, everything_is_old(), at_most=1).runs == 1
    left = {run.run_id for run in location.instance.get_runs()}
    assert set(runs) - left == {runs[-1]}
    assert prune(location.instance, everything_is_old()).runs == 1


def test_a_run_whose_deletion_was_cut_short_is_deleted_by_the_next_call(location: Location, rng: random.Random) -> None:
    make_history(location, rng)
    oldest = location.instance.get_runs()[-1]
    location.instance.event_log_storage.delete_events(oldest.run_id)
    assert prune(location.instance, everything_is_old()).runs == 2
    assert location.instance.get_run_by_id(oldest.run_id) is None
    assert files_of(location, oldest.run_id) == []


def size_of(location: Location) -> int:
    return sum(path.stat().st_size for path in (location.state / "dagster").rglob("*") if path.is_file())


@sqlite_only
def test_the_storage_is_bounded(location: Location, rng: random.Random) -> None:
    """As many runs again as were deleted fit into what their deletion left."""
    sizes = []
    for day in range(3):
        for number in range(3):
            record(location.platform, LANE, sound_events(rng, 2, START_US + day * HOUR_US + number * HOUR_US // 4))
            location.dagster.flush()
        prune(location.instance, everything_is_old())
        sizes.append(size_of(location))
    assert sizes[2] - sizes[1] < 64 * 1024, sizes
    assert len(location.instance.get_runs()) == 1


# Reports, which belong to no run, and ticks.


def test_old_reports_go_and_the_backstop_does_not_fill_them_in_again(location: Location, rng: random.Random) -> None:
    def recorded(days: int) -> None:
        at = SystemClock().now_us() - days * 24 * HOUR_US
        made = [make_event(rng, recorded_at=at + n * US_PER_SECOND, gateway_id="gw-1") for n in range(3)]
        report(location, record(location.platform, LIVE, made))

    for days in (50, 45, 40, 2):
        recorded(days)
    latest = location.instance.get_latest_materialization_event(dg.AssetKey("gpu_jobs"))
    pruned = prune(location.instance, datetime.now(UTC) - timedelta(days=30))
    assert pruned == Pruned(0, 0, 3)
    assert len(location.materializations("gpu_jobs")) == 1
    assert location.instance.get_latest_materialization_event(dg.AssetKey("gpu_jobs")) == latest
    tick(location)
    assert len(location.materializations("gpu_jobs")) == 1, "a cursor that was lost begins with what is kept"


def test_the_newest_report_stays_however_old(location: Location) -> None:
    at = (datetime.now(UTC) - timedelta(days=90)).timestamp()
    for number in range(3):
        made = StepMaterializationData(dg.AssetMaterialization("gpu_jobs", metadata={"jobs": number}))
        event = dg.DagsterEvent("ASSET_MATERIALIZATION", RUNLESS_JOB_NAME, event_specific_data=made)
        location.instance.report_dagster_event(event, RUNLESS_RUN_ID, timestamp=at + number)
    assert prune(location.instance, datetime.now(UTC) - timedelta(days=30)).reports == 2
    (left,) = location.materializations("gpu_jobs")
    assert left.metadata["jobs"].value == 2


# The job, and when it runs.


def test_the_job_deletes_what_is_older_than_the_setting_says(location: Location, rng: random.Random) -> None:
    make_history(location, rng)
    age_runs(location.instance, timedelta(days=5))
    assert location.run("housekeeping").success
    assert len(location.instance.get_runs()) == 6 + 1, "nothing is a week old"
    location.patch.setenv("RENDER_PLATFORM_DAGSTER_RETENTION_DAYS", "4")
    assert location.run("housekeeping").success
    assert len(location.instance.get_runs()) == 4 + 2


def test_it_is_every_night_and_on() -> None:
    schedule = defs.resolve_schedule_def("housekeeping_daily")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("37 3 * * *", "UTC")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    with pytest.raises(UsageError, match="dagster_retention_days"):
        load_settings(environ={"RENDER_PLATFORM_DAGSTER_RETENTION_DAYS": "0"})
