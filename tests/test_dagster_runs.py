"""More of test_dagster_layer.py: dagster runs."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import ASSETS
from assets.fast_path import duplicates
from assets.jobs import hour_key
from definitions import defs
from render_platform.clock import DAY_US, HOUR_US, US_PER_SECOND
from render_platform.errors import Unavailable, UsageError
from render_platform.events import UsageEvent, table_from_events
from resources.local import LOCAL_TAG, LocalDagster
from tests.factories import START_US
from tests.homes import age_runs, database_of, open_instance
from tests.platforms import record
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    Location,
    flip_blob,
    location,  # noqa: F401  fixtures
    open_location,
    record_live,
    requested,
    restore_blob,
    skipped,
    sound_events,
    table_of,
    tick,
)


def test_the_sensor_fires_on_age(location: Location, rng: random.Random) -> None:
    record_live(location, rng, 1, age_s=15)
    assert "the oldest for 1" in skipped(tick(location))
    location.patch.setenv("RENDER_PLATFORM_BACKLOG_AGE_S", "15")
    requested(tick(location))


def test_the_sensor_fires_for_a_batch_that_was_sealed_and_goes_no_further(
    location: Location, rng: random.Random
) -> None:
    record_live(location, rng, 2, age_s=60)
    location.platform.seal()
    requested(tick(location))
    location.platform.store()
    requested(tick(location))
    location.platform.log_batches()
    assert "empty" in skipped(tick(location))


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_the_sensor_skips_during_a_flush_and_fires_again_after_a_failure(
    location: Location, rng: random.Random, status: dg.DagsterRunStatus
) -> None:
    record_live(location, rng, 2, age_s=60)
    job = defs.resolve_job_def("flush")
    run = location.instance.create_run_for_job(job, status=status)
    assert "in progress" in skipped(tick(location))
    location.instance.report_run_failed(run)
    assert "the last 1 flushes failed" in skipped(tick(location)), "not again at once"
    an_hour_passes(location)
    requested(tick(location))
    done = location.instance.create_run_for_job(defs.resolve_job_def("reconcile"), status=dg.DagsterRunStatus.STARTED)
    requested(tick(location))
    location.instance.report_run_failed(done)


def test_a_flush_that_has_said_nothing_for_long_does_not_hold_the_sensor(
    location: Location, rng: random.Random
) -> None:
    """Its process was killed, and nobody will ever end its run."""
    record_live(location, rng, 2, age_s=60)
    location.instance.create_run_for_job(defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED)
    assert "in progress" in skipped(tick(location))
    an_hour_passes(location)
    requested(tick(location))


def test_the_sensor_waits_longer_after_each_failure(location: Location, rng: random.Random) -> None:
    record_live(location, rng, 2, age_s=60)
    said = []
    for failures in range(1, 4):
        run = location.instance.create_run_for_job(defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED)
        location.instance.report_run_failed(run)
        said.append(skipped(tick(location)))
        assert f"the last {failures} flushes failed" in said[-1]
    left = [text.split("the next in ")[1] for text in said]
    assert left == sorted(left), "each wait is longer than the one before"


def an_hour_passes(location: Location) -> None:
    """For the runs that stand in the instance."""
    age_runs(location.instance, timedelta(hours=1))


def test_the_sensor_fires_again_after_a_flush_that_failed(location: Location, rng: random.Random) -> None:
    record(location.platform, LANE, sound_events(rng, 5))
    location.platform.seal()
    location.platform.store()
    path = flip_blob(location)
    first = requested(tick(location))
    assert not location.run("flush").success
    an_hour_passes(location)
    second = requested(tick(location))
    assert (first.run_key, second.run_key) == (None, None)
    restore_blob(path)
    assert location.run("flush").success
    assert "empty" in skipped(tick(location))


# Reconciliation and repair of hours.


def two_hours(location: Location, rng: random.Random, lose: Sequence[int] = ()) -> list[UsageEvent]:
    """Ten events in each of two closed hours, flushed; those at `lose` never reached ClickHouse."""
    events = [*sound_events(rng, 10), *sound_events(rng, 10, START_US + HOUR_US)]
    recorded = record(location.platform, LANE, events)
    location.platform.clickhouse.insert_events(
        table_from_events([event for number, event in enumerate(recorded) if number not in lose]), "first"
    )
    location.finish_lane(2)
    location.dagster.flush()
    return recorded


BOTH = [START_US, START_US + HOUR_US]


def of_partition(found: Sequence[dg.AssetMaterialization]) -> dict[str | None, dict[str, Any]]:
    return {one.partition: {name: value.value for name, value in one.metadata.items()} for one in found}


def test_two_hours_in_one_run_each_with_its_own_metadata(location: Location, rng: random.Random) -> None:
    two_hours(location, rng, lose=[3, 4])
    location.dagster.reconcile(BOTH)
    (run,) = location.instance.get_runs(dg.RunsFilter(job_name="reconcile"))
    assert run.status == dg.DagsterRunStatus.SUCCESS
    found = of_partition(location.materializations("reconciliation", run.run_id))
    assert set(found) == {hour_key(hour) for hour in BOTH}
    first, second = (found[hour_key(hour)] for hour in BOTH)
    assert (first["status"], first["missing"], first["fast events"]) == ("discrepant", 2, 8)
    assert (second["status"], second["missing"], second["fast events"]) == ("reconciled", 0, 10)
    for metadata in (first, second):
        assert metadata["dagster/partition_row_count"] == 10
        assert metadata["GPU seconds"] == "0.01"
        assert not {"windows", "findings"} & set(metadata), "a table would be copied into each partition's event"

    location.dagster.reconcile([START_US])
    assert len(location.instance.get_runs(dg.RunsFilter(job_name="reconcile"))) == 2
    latest = location.materializations("reconciliation")[0]
    windows, findings = table_of(latest, "windows"), table_of(latest, "findings")
    assert len(windows) == 12
    assert (sum(w["events"] for w in windows), sum(w["fast events"] for w in windows)) == (10, 8)
    assert sum(finding["missing"] for finding in findings) == 2


def threshold_of(location: Location) -> tuple[bool, str]:
    key = dg.AssetCheckKey(dg.AssetKey("reconciliation"), "threshold")
    (latest,) = location.instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    evaluation = latest.event and latest.event.dagster_event and latest.event.dagster_event.event_specific_data
    assert isinstance(evaluation, dg.AssetCheckEvaluation)
    return evaluation.passed, evaluation.description or ""


def test_repair_makes_a_discrepant_hour_reconciled(location: Location, rng: random.Random) -> None:
    two_hours(location, rng, lose=[3, 4])
    location.dagster.reconcile(BOTH)
    passed, said = threshold_of(location)
    assert not passed
    assert "2023-11-16T18:00:00Z is discrepant" in said
    assert "T19" not in said
    location.dagster.repair([START_US])
    assert of_partition(location.materializations("fast_path_repair")) == {
        hour_key(START_US): {
            "way": "insert",
            "inserted": 2,
            "status before": "discrepant",
            "status after": "reconciled",
        }
    }
    location.dagster.reconcile(BOTH)
    assert threshold_of(location) == (True, "every report is reconciled")
    location.dagster.repair(BOTH)
    assert location.platform.clickhouse.totals() == (20, 20 * 1_000_000), "repairing what is whole inserts nothing"


def test_repair_mends_a_rollup_that_a_crash_left_without_its_rows(location: Location, rng: random.Random) -> None:
    """ClickHouse, killed between the two parts of one insert, keeps the raw rows without their rollup."""
    two_hours(location, rng)
    location.platform.clickhouse._command("TRUNCATE TABLE usage_minute")
    location.dagster.reconcile(BOTH)
    found = of_partition(location.materializations("reconciliation"))
    assert {metadata["status"] for metadata in found.values()} == {"discrepant"}
    location.dagster.repair(BOTH)
    repaired = of_partition(location.materializations("fast_path_repair"))
    assert {metadata["status after"] for metadata in repaired.values()} == {"reconciled"}
    assert location.platform.clickhouse.totals() == (20, 20 * 1_000_000)


def test_without_clickhouse_the_run_fails_clearly_and_can_be_run_again(location: Location, rng: random.Random) -> None:
    two_hours(location, rng)
    dsn = os.environ["RENDER_PLATFORM_CLICKHOUSE_DSN"]
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    with pytest.raises(Unavailable) as raised:
        location.dagster.reconcile(BOTH)
    assert "2 of 2 hours could not be read" in raised.value.message
    assert "ClickHouse" in raised.value.message
    (failed,) = location.instance.get_runs(dg.RunsFilter(job_name="reconcile"))
    assert failed.status == dg.DagsterRunStatus.FAILURE
    assert failed.run_id in raised.value.message
    unknown = [status for _, status in location.platform.hours.unreconciled()]
    assert unknown == ["not reported", "not reported"], "unknown is neither good nor discrepant"

    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", dsn)
    location.dagster.reconcile(BOTH)
    found = of_partition(location.materializations("reconciliation"))
    assert {metadata["status"] for metadata in found.values()} == {"reconciled"}


def test_repair_without_clickhouse_fails_and_inserts_nothing(location: Location, rng: random.Random) -> None:
    two_hours(location, rng, lose=[0])
    dsn = os.environ["RENDER_PLATFORM_CLICKHOUSE_DSN"]
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    with pytest.raises(Unavailable, match=r"1 of 1 hours were not repaired: 2023-11-16-18:00: .*cannot be repaired"):
        location.dagster.repair([START_US])
    (run,) = location.instance.get_runs(dg.RunsFilter(job_name="repair"))
    (failed,) = location.instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records
    step = failed.event_log_entry.dagster_event
    assert step is not None
    error = step.step_failure_data.error
    assert error is not None
    assert "Unavailable" not in error.to_string(), "a sentence, not what was raised inside"
    assert location.materializations("fast_path_repair") == []
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", dsn)
    location.dagster.repair([START_US])
    assert location.platform.clickhouse.totals()[0] == 20


def test_rows_that_stand_twice_fail_the_check_of_duplicates(location: Location, rng: random.Random) -> None:
    recorded = two_hours(location, rng)

    def check() -> dg.AssetCheckEvaluation:
        result = dg.materialize(
            [duplicates, *[asset for asset in ASSETS if isinstance(asset, dg.AssetSpec)]],
            selection=dg.AssetSelection.checks(duplicates),
            instance=location.instance,
            resources={"platform": location.resource},
        )
        (evaluation,) = result.get_asset_check_evaluations()
        return evaluation

    assert check().passed
    location.platform.clickhouse.insert_events(table_from_events(recorded[:3]), "again")
    found = check()
    assert (found.passed, found.metadata["rows too many"].value) == (False, 3)


def test_a_day_s_evidence_is_verified_and_what_is_wrong_is_named(location: Location, rng: random.Random) -> None:
    two_hours(location, rng)
    day = hour_key(START_US)[:10]
    good = location.run("verify", partition=day)
    assert good.success
    (materialized,) = location.materializations("audit_verification")
    assert materialized.partition == day
    assert materialized.metadata["events re-read"].value == 20
    assert START_US % DAY_US, "the hour is not the day's first: the day holds it nevertheless"

    blobs = sorted(path for path in (location.state / "blobs" / "sha256").rglob("*") if path.is_file())
    path = rng.choice(blobs)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    bad = location.run("verify", partition=day)
    assert not bad.success
    (step,) = [event for event in bad.all_events if event.is_step_failure]
    failure = step.step_failure_data.user_failure_data
    assert failure is not None
    assert path.name in str(failure.metadata["problems"].value)


# The state folder's own instance.


def test_runs_are_visible_in_the_state_s_instance_afterwards(tmp_path: Path, rng: random.Random) -> None:
    with open_location(tmp_path / "state") as location:
        two_hours(location, rng, lose=[0])
        location.dagster.reconcile(BOTH)
        location.dagster.repair(BOTH)
    home = tmp_path / "state" / "dagster"
    assert "telemetry: {enabled: false}" in (home / "dagster.yaml").read_text()
    with open_instance(home, **database_of(location.platform.settings)) as instance:
        runs = instance.get_runs()
        assert {run.job_name for run in runs} == {"flush", "reconcile", "repair"}
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        for name in ("sealed_batches", "cas_batches", "audit_log", "reconciliation", "fast_path_repair"):
            assert instance.get_latest_materialization_event(dg.AssetKey(name)) is not None, name
        assert instance.telemetry_enabled is False


def test_one_process_works_in_a_state_folder(location: Location) -> None:
    with pytest.raises(Unavailable, match="another process"):
        LocalDagster(location.platform.settings)


def test_a_run_of_a_killed_process_is_ended_by_the_next(tmp_path: Path, rng: random.Random) -> None:
    with open_location(tmp_path / "state") as location:
        record(location.platform, LANE, sound_events(rng, 3))
        whose = {LOCAL_TAG: f"{socket.gethostname()}:{tmp_path / 'state'}"}
        left = location.instance.create_run_for_job(
            defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED, tags=whose
        )
        assert "in progress" in skipped(tick(location))
    with open_location(tmp_path / "state") as location:
        ended = location.instance.get_run_by_id(left.run_id)
        assert ended is not None
        assert ended.status == dg.DagsterRunStatus.FAILURE
        an_hour_passes(location)
        requested(tick(location))


def test_hours_that_are_no_partitions_are_refused(location: Location) -> None:
    location.dagster.check_hours(BOTH)
    for hour in (1_640_995_200 * US_PER_SECOND, 4_000_000_000_000_000 - 4_000_000_000_000_000 % HOUR_US):
        with pytest.raises(UsageError, match="is not a partition"):
            location.dagster.check_hours([hour])
