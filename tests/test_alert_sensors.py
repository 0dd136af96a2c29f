"""The sensors that alert, ticked for real on a state folder's own instance, with a receiver of alerts."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster_duckdb import DuckDBResource

from assets.fast_path import duplicates
from assets.jobs import HOURS, hour_key
from definitions import defs
from render_platform.clock import HOUR_US, US_PER_SECOND
from resources.platform import PlatformResource
from sensors import SENSORS
from sensors.alerts import MAX_REPAIRS, PATIENCE_S, RETRY_AFTER, checks, discrepancies, failures, follow
from tests.factories import START_US
from tests.platforms import record
from tests.receivers import Receiver, free_port
from tests.test_dagster_layer import (
    LANE,
    NOWHERE,
    QUIET,
    Location,
    billed_twice,
    location,  # noqa: F401  fixtures
    sound_events,
)
from tests.test_dagster_runs import BOTH, two_hours

FIRST, SECOND = "2023-11-16T18:00:00Z", "2023-11-16T19:00:00Z"


@pytest.fixture
def receiver(location: Location) -> Iterator[Receiver]:
    with Receiver() as opened:
        location.patch.setenv("RENDER_PLATFORM_ALERT_WEBHOOK", opened.url)
        location.patch.setenv("RENDER_PLATFORM_DAGSTER_URL", "http://ui")
        yield opened


def tick(location: Location, sensor: dg.SensorDefinition, cursor: str | None = None) -> SensorExecutionData:
    resources = {"platform": location.resource}
    with dg.build_sensor_context(
        instance=location.instance, resources=resources, cursor=cursor, definitions=defs
    ) as context:
        return sensor.evaluate_tick(context)


def said(receiver: Receiver) -> list[tuple[str, str]]:
    """Key and severity of each alert, in the order in which they came."""
    return [(document["key"], document["severity"]) for document in receiver.documents]


def lose_some(location: Location, rng: random.Random) -> None:
    """Two hours, of which the first is discrepant."""
    two_hours(location, rng, lose=[3, 4])
    location.dagster.reconcile(BOTH)


def age_runs(location: Location, seconds: int) -> None:
    with closing(sqlite3.connect(location.state / "dagster" / "history" / "runs.db")) as connection, connection:
        connection.execute(f"UPDATE runs SET update_timestamp = datetime(update_timestamp, '-{seconds} seconds')")


def asked(data: SensorExecutionData) -> list[tuple[str | None, str | None]]:
    return [(request.partition_key, request.run_key) for request in data.run_requests or []]


def fail(location: Location, request: dg.RunRequest) -> None:
    """A run of the request that failed."""
    tags = {**request.tags, "dagster/partition": str(request.partition_key), "dagster/run_key": str(request.run_key)}
    job = defs.resolve_job_def("repair")
    run = location.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=tags)
    location.instance.report_run_failed(run)


# Discrepancies.


def test_they_are_on_from_the_start_and_say_what_they_do() -> None:
    for sensor in (discrepancies, failures, checks):
        assert sensor in SENSORS
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        assert len(sensor.description or "") > 40
    assert [job.name for job in discrepancies.jobs] == ["repair"]


def test_a_discrepant_hour_is_told_once_and_its_end_too(
    location: Location, receiver: Receiver, rng: random.Random
) -> None:
    lose_some(location, rng)
    cursor = None
    for _ in range(3):
        data = tick(location, discrepancies, cursor)
        assert asked(data) == [], "repair is manual"
        assert "1 hour is discrepant" in (data.skip_message or "")
        cursor = data.cursor
    (document,) = receiver.documents
    assert (document["key"], document["severity"]) == ("reconciliation/discrepant", "error")
    assert document["title"] == "1 hour is discrepant"
    assert FIRST in document["text"]
    assert SECOND not in document["text"]
    assert "Materialize fast_path_repair" in document["text"]
    assert document["link"] == "http://ui/assets/fast_path_repair?view=partitions&partition=2023-11-16-18%3A00"
    location.dagster.repair([START_US])
    for _ in range(2):
        assert "no hour is discrepant" in (tick(location, discrepancies, cursor).skip_message or "")
    assert said(receiver)[1:] == [("reconciliation/discrepant", "resolved")]


def test_a_discrepant_hour_that_is_out_of_date_is_not_resolved(
    location: Location, receiver: Receiver, rng: random.Random
) -> None:
    lose_some(location, rng)
    tick(location, discrepancies)
    with location.platform.database.write() as connection:
        connection.exec_driver_sql("UPDATE reports SET dirty = 1")
    tick(location, discrepancies)
    assert said(receiver) == [("reconciliation/discrepant", "error")], "unknown is not well"


def test_an_hour_without_a_report_is_told_when_it_has_waited_long(
    location: Location, receiver: Receiver, rng: random.Random
) -> None:
    two_hours(location, rng)
    cursor = tick(location, discrepancies).cursor or ""
    assert sorted(json.loads(cursor)) == [FIRST, SECOND]
    assert tick(location, discrepancies, cursor).cursor == cursor, "since when is kept"
    assert receiver.documents == []
    long_ago = json.loads(cursor)[FIRST] - PATIENCE_S * US_PER_SECOND
    cursor = json.dumps(json.loads(cursor) | {FIRST: long_ago})
    tick(location, discrepancies, cursor)
    (document,) = receiver.documents
    assert (document["key"], document["severity"]) == ("reconciliation/late", "warning")
    assert f"{FIRST} is not reported" in document["text"]
    assert SECOND not in document["text"]
    location.dagster.reconcile(BOTH)
    assert tick(location, discrepancies, cursor).cursor == "{}"
    assert said(receiver)[1:] == [("reconciliation/late", "resolved")]


def test_a_cursor_that_is_none_begins_anew() -> None:
    for cursor in (None, "", "nonsense", "[]", '{"a": "b"}'):
        assert follow([("h", "not reported"), ("i", "discrepant")], cursor, 7) == [("h", "not reported", 7)]


def test_a_receiver_that_is_down_fails_the_tick_and_stops_no_repair(location: Location, rng: random.Random) -> None:
    location.patch.setenv("RENDER_PLATFORM_ALERT_WEBHOOK", f"http://127.0.0.1:{free_port()}/SECRET")
    lose_some(location, rng)
    with pytest.raises(Exception, match=r"alerts wait: 1 for webhook: 127\.0\.0\.1 gave no answer") as raised:
        tick(location, discrepancies, "{}")
    assert "SECRET" not in str(raised.value)
    location.patch.setenv("RENDER_PLATFORM_REPAIR_AUTOMATICALLY", "1")
    assert len(asked(tick(location, discrepancies, "{}"))) == 1


def test_without_channels_and_without_a_state_it_says_so(
    location: Location, rng: random.Random, tmp_path: Path
) -> None:
    lose_some(location, rng)
    assert "no alert channel is configured" in (tick(location, discrepancies).skip_message or "")
    assert "no alert channel is configured" in (tick(location, checks).skip_message or "")
    resource = PlatformResource(state_dir=str(tmp_path / "none"), duckdb=DuckDBResource(database=":memory:"))
    with dg.build_sensor_context(resources={"platform": resource}) as context:
        assert "no platform state" in (discrepancies.evaluate_tick(context).skip_message or "")


# Automatic repair.


def test_automatic_repair_asks_once_for_each_discrepant_report(
    location: Location, receiver: Receiver, rng: random.Random
) -> None:
    location.patch.setenv("RENDER_PLATFORM_REPAIR_AUTOMATICALLY", "1")
    lose_some(location, rng)
    data = tick(location, discrepancies)
    (request,) = data.run_requests or []
    assert asked(data) == [("2023-11-16-18:00", "2023-11-16-18:00/r1/0")]
    assert HOURS.has_partition_key(str(request.partition_key))
    assert "launched by itself" in receiver.documents[0]["text"]
    assert asked(tick(location, discrepancies)) == asked(data), "nobody has launched it yet: Dagster knows the key"
    done = defs.resolve_job_def("repair").execute_in_process(
        instance=location.instance, partition_key=request.partition_key, tags=dict(request.tags), run_config=QUIET
    )
    assert done.success
    assert location.platform.hours.unreconciled() == []
    assert asked(tick(location, discrepancies)) == []
    with location.platform.database.write() as connection:  # whatever else: the same report is not repaired again
        connection.exec_driver_sql(f"UPDATE reports SET status = 'discrepant', revision = 1 WHERE hour_us = {START_US}")
    assert asked(tick(location, discrepancies)) == []
    with location.platform.database.write() as connection:
        connection.exec_driver_sql("UPDATE reports SET revision = 7 WHERE status = 'discrepant'")
    assert asked(tick(location, discrepancies)) == [("2023-11-16-18:00", "2023-11-16-18:00/r7/0")]


def test_a_repair_that_fails_is_asked_for_three_times_more_ever_later(location: Location, rng: random.Random) -> None:
    location.patch.setenv("RENDER_PLATFORM_REPAIR_AUTOMATICALLY", "1")
    lose_some(location, rng)
    keys = []
    for wait in RETRY_AFTER:
        (request,) = tick(location, discrepancies).run_requests or []
        keys.append(request.run_key)
        fail(location, request)
        age_runs(location, int(wait.total_seconds()) - 60)
        assert asked(tick(location, discrepancies)) == [], "not yet"
        age_runs(location, 60)
    (request,) = tick(location, discrepancies).run_requests or []
    keys.append(request.run_key)
    assert keys == [f"2023-11-16-18:00/r1/{n}" for n in range(4)], "a key that was used is never launched again"
    fail(location, request)
    age_runs(location, 30 * 86_400)
    assert asked(tick(location, discrepancies)) == [], "it is left to a person"


def test_an_hour_that_a_repair_is_at_is_left_to_it(location: Location, rng: random.Random) -> None:
    location.patch.setenv("RENDER_PLATFORM_REPAIR_AUTOMATICALLY", "1")
    lose_some(location, rng)
    job = defs.resolve_job_def("repair")
    by_hand = {"dagster/partition": hour_key(START_US)}
    run = location.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=by_hand)
    assert asked(tick(location, discrepancies)) == []
    location.instance.report_run_canceled(run)
    assert len(asked(tick(location, discrepancies))) == 1


def test_one_tick_asks_for_a_bounded_number_of_repairs(location: Location, rng: random.Random) -> None:
    location.patch.setenv("RENDER_PLATFORM_REPAIR_AUTOMATICALLY", "1")
    hours = MAX_REPAIRS + 3
    record(location.platform, LANE, [e for h in range(hours) for e in sound_events(rng, 2, START_US + h * HOUR_US)])
    location.finish_lane(hours)
    location.dagster.flush()
    location.dagster.reconcile([START_US + hour * HOUR_US for hour in range(hours)])
    found = asked(tick(location, discrepancies))
    newest = [hour_key(START_US + hour * HOUR_US) for hour in range(hours - 1, 2, -1)]
    assert [partition for partition, _ in found] == newest


# Runs that failed.


def test_a_failed_run_is_told_once_for_its_error_with_a_link(
    location: Location, receiver: Receiver, rng: random.Random
) -> None:
    cursor = tick(location, failures).cursor
    two_hours(location, rng)
    location.patch.setenv("RENDER_PLATFORM_CLICKHOUSE_DSN", NOWHERE)
    runs = [location.run("reconcile", hour_key(hour)).run_id for hour in BOTH]
    for _ in range(2):
        cursor = tick(location, failures, cursor).cursor
    (document,) = receiver.documents
    assert document["severity"] == "error"
    assert document["title"] == "a run of reconcile failed"
    assert "1 of 1 hours could not be read" in document["text"]
    assert document["link"] in [f"http://ui/runs/{run}" for run in runs], "the other hour's error is the same one"
    assert "Traceback" not in document["text"]


def test_errors_are_cut_and_runs_without_a_step_have_one(location: Location, receiver: Receiver) -> None:
    cursor = tick(location, failures).cursor
    run = location.instance.create_run_for_job(defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED)
    location.instance.report_run_failed(run, "x" * 5_000)
    tick(location, failures, cursor)
    (document,) = receiver.documents
    error, _ = document["text"].split("\n")
    assert error == "x" * 499 + "…"


def test_runs_of_another_location_are_its_own_business(location: Location, receiver: Receiver) -> None:
    cursor = tick(location, failures).cursor
    elsewhere = RemoteJobOrigin(
        RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("other"), "__repository__"), "theirs"
    )
    for origin in (elsewhere, None):
        run = location.instance.create_run_for_job(
            defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED, remote_job_origin=origin
        )
        location.instance.report_run_failed(run, f"of {(origin and 'another') or 'this'} location")
    for _ in range(2):
        cursor = tick(location, failures, cursor).cursor
    assert ["this location" in document["text"] for document in receiver.documents] == [True]


def test_a_failure_is_told_even_where_sql_is_what_has_failed(location: Location, receiver: Receiver) -> None:
    cursor = tick(location, failures).cursor
    run = location.instance.create_run_for_job(defs.resolve_job_def("flush"), status=dg.DagsterRunStatus.STARTED)
    location.instance.report_run_failed(run, "the database cannot be used")
    location.platform.close()
    for file in location.state.glob("platform.db*"):
        file.write_bytes(b"this is no database" * 1_000)
    (reaction,) = tick(location, failures, cursor).dagster_run_reactions or []
    assert reaction.error is not None, "and the tick shows it"
    assert [document["title"] for document in receiver.documents] == ["a run of flush failed"]


# Checks.


def evaluate(location: Location, passed: bool, severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR) -> None:
    """An evaluation of the check of duplicates, reported as the webserver does for others."""
    (key,) = duplicates.check_keys
    found = dg.AssetCheckEvaluation(key.asset_key, key.name, passed, {}, severity=severity, description="3 rows")
    location.instance.report_runless_asset_event(found)


def test_a_failed_check_is_told_and_its_end_too(location: Location, receiver: Receiver) -> None:
    evaluate(location, passed=True)
    cursor = tick(location, checks).cursor
    assert said(receiver) == []
    evaluate(location, passed=False, severity=dg.AssetCheckSeverity.WARN)
    cursor = tick(location, checks, cursor).cursor
    assert said(receiver) == [], "a warning is for the UI"
    evaluate(location, passed=False)
    for _ in range(2):
        cursor = tick(location, checks, cursor).cursor
    (document,) = receiver.documents
    assert (document["key"], document["severity"]) == ("check/inference_events/duplicates", "error")
    assert "3 rows" in document["text"]
    assert "rebuil" in document["text"], "what to do, as the check's own description says it"
    assert document["link"] == "http://ui/assets/inference_events?view=checks&checkDetail=duplicates"
    evaluate(location, passed=True)
    tick(location, checks, cursor)
    assert said(receiver)[1:] == [("check/inference_events/duplicates", "resolved")]


def test_a_check_that_failed_between_two_ticks_is_told_although_it_passes(
    location: Location, receiver: Receiver
) -> None:
    evaluate(location, passed=True)
    cursor = tick(location, checks).cursor
    evaluate(location, passed=False)
    evaluate(location, passed=True)
    tick(location, checks, cursor)
    assert [severity for _, severity in said(receiver)] == ["error", "resolved"]


def test_of_what_was_before_the_first_tick_only_what_fails_now_is_told(location: Location, receiver: Receiver) -> None:
    evaluate(location, passed=False)
    evaluate(location, passed=True)
    tick(location, checks)
    assert said(receiver) == []
    evaluate(location, passed=False)
    tick(location, checks)
    assert said(receiver) == [("check/inference_events/duplicates", "error")]


def test_the_check_of_a_run_leads_to_the_run(location: Location, receiver: Receiver, rng: random.Random) -> None:
    record(location.platform, LANE, billed_twice(rng))
    result = location.run("flush")
    tick(location, checks)
    (document,) = receiver.documents
    assert document["key"] == "check/cas_batches/conservation"
    assert document["link"] == f"http://ui/runs/{result.run_id}"
    assert "was busy for" in document["text"]


def test_a_receiver_that_is_down_loses_no_evaluation(location: Location) -> None:
    with Receiver([500]) as broken:
        location.patch.setenv("RENDER_PLATFORM_ALERT_WEBHOOK", broken.url)
        evaluate(location, passed=False)
        cursor = tick(location, checks).cursor
        assert cursor, "the cursor is handed over: the alert is recorded"
        with pytest.raises(Exception, match=r"alerts wait: 1 for webhook: 127\.0\.0\.1 answered 500"):
            tick(location, checks, cursor)
        assert len(broken.requests) == 1, "it is left alone for a minute"
